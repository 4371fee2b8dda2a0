"""containerd's filter language, as far as it applies to snapshots.

    filter    := selector ("," selector)*            all must match; of several filters, any
    selector  := fieldpath [operator value]          without an operator: the field is there
    fieldpath := field ("." field)*                  kind, name, parent, labels."any.thing"
    field     := "quoted" | [A-Za-z0-9_-]+
    operator  := "==" | "!=" | "~="                  the last one searches a regular expression
    value     := "quoted" | anything without comma and space; after "~=" also /quoted/, |quoted|

From containerd's pkg/filters (parser.go, scanner.go, quote.go). A field that is not there is not
equal to anything; for "!=" and "~=" it counts as an empty value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from snapshotter.containerd.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snapshotter.containerd.snapshots import Info

    Predicate = Callable[[Info], bool]

_LONGEST = 4096  # characters of a filter; containerd's own stay below 300
_FIELD = re.compile(r"[A-Za-z0-9_-]+")
_SPACES = re.compile(r"\s*")
_OPERATOR = re.compile(r"[=!~]+")
_QUOTED = re.compile(r'(["/|])((?:\\.|(?!\1)[^\\\n])*)\1')
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv])|([0-3][0-7]{2})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))"
)
_CONTROLS = dict(zip("abfnrtv", b"\a\b\f\n\r\t\v", strict=True))


@dataclass(frozen=True, slots=True)
class Filter:
    """Call it with a snapshot: whether it matches.

    `label` is a label's name and value that every match has, if there is one: who keeps snapshots
    by their labels need not look at all of them.
    """

    predicate: Predicate
    label: tuple[str, str] | None = None

    def __call__(self, info: Info) -> bool:
        return self.predicate(info)


def compile_filters(filters: Sequence[str]) -> Filter:
    """Whether a snapshot matches any of `filters`; no filters, or an empty one, match all.

    Raises InvalidArgumentError for text that is no filter.
    """
    parsers = [_Parser(text) for text in filters]
    alternatives = [parser.parse() for parser in parsers]
    if not alternatives or not all(alternatives):
        return Filter(lambda info: True)
    label = parsers[0].label if len(parsers) == 1 else None
    return Filter(
        lambda info: any(
            all(selector(info) for selector in selectors) for selectors in alternatives
        ),
        label,
    )


class _Parser:
    """One filter's text, and how far it is read. `label` is one that it asks for."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.label: tuple[str, str] | None = None

    def parse(self) -> list[Predicate]:
        """The selectors, none for an empty text."""
        if len(self._text) > _LONGEST:
            raise InvalidArgumentError(f"a filter is longer than {_LONGEST} characters")
        if not self._text:
            return []
        selectors = [self._selector()]
        while self._at < len(self._text):
            if self._next() != ",":
                self._fail("a comma belongs here")
            self._at += 1
            selectors.append(self._selector())
        return selectors

    def _selector(self) -> Predicate:
        path = self._path()
        if self._next() in ("", ","):
            return lambda info: _field(info, path) is not None
        self._take(_SPACES)
        operator = self._take(_OPERATOR)
        if operator not in ("==", "!=", "~="):
            self._fail("an operator belongs here: ==, != or ~=")
        value = self._value(operator)
        if operator == "==":
            if path[0] == "labels":
                self.label = ".".join(path[1:]), value
            return lambda info: _field(info, path) == value
        if operator == "!=":
            return lambda info: (_field(info, path) or "") != value
        expression = self._expression(value)
        return lambda info: expression.search(_field(info, path) or "") is not None

    def _path(self) -> tuple[str, ...]:
        fields = [self._one_field()]
        while self._next() == ".":
            self._at += 1
            fields.append(self._one_field())
        return tuple(fields)

    def _one_field(self) -> str:
        self._take(_SPACES)
        if self._next() == '"':
            return self._quoted()
        name = self._take(_FIELD)
        if not name:
            self._fail("the name of a field belongs here")
        return name

    def _value(self, operator: str) -> str:
        self._take(_SPACES)
        first = self._next()
        if first == '"' or (first in ("/", "|") and operator == "~="):
            return self._quoted()
        if first in ("/", "|", ".", ""):
            self._fail('a value belongs here, in "quotes" unless it is a plain word')
        start = self._at
        while (char := self._next()) and char.isprintable() and char != "," and char != " ":
            self._at += 1
        if self._at == start:
            self._fail('a value belongs here, in "quotes" unless it is a plain word')
        return self._text[start : self._at]

    def _quoted(self) -> str:
        found = _QUOTED.match(self._text, self._at)
        if found is None:
            self._fail("a quote is not closed on its line")
        quote, inside = found[1], found[2]
        try:
            # Escapes give bytes: \xc3\xa4 is one character, and half of one matches nothing.
            pieces = re.split(r"(\\(?:[0-3][0-7]{2}|x..|u.{4}|U.{8}|.))", inside)
            value = b"".join(
                _unescape(piece, quote) if piece.startswith("\\") else piece.encode()
                for piece in pieces
            ).decode(errors="surrogateescape")
        except (ValueError, OverflowError):
            self._fail("a quoted value has an escape that Go does not know")
        self._at = found.end()
        return value

    def _expression(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(_to_python(pattern))
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise InvalidArgumentError(
                f"filter {self._text!r}: {pattern!r} is no regular expression: {error}"
            ) from error

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def _fail(self, why: str) -> NoReturn:
        raise InvalidArgumentError(f"filter {self._text!r}, character {self._at + 1}: {why}")


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    """The value of a field, None if there is none (a label's name may have dots in it)."""
    match path[0]:
        case "kind":
            return info.kind.value
        case "name":
            return info.name
        case "parent":
            return info.parent
        case "labels":
            return info.labels.get(".".join(path[1:]))
    return None


def _unescape(escape: str, quote: str) -> bytes:
    """The bytes of one escape of a Go string. Raises ValueError, OverflowError."""
    found = _ESCAPE.fullmatch(escape)
    if found is None:
        raise ValueError(escape)
    control, octal, byte, short, long, other = found.groups()
    if control:
        return bytes((_CONTROLS[control],))
    if octal:
        return bytes((int(octal, 8),))
    if byte:
        return bytes((int(byte, 16),))
    if short or long:
        return chr(int(short or long, 16)).encode()  # of a surrogate: UnicodeEncodeError
    if other not in ("\\", quote):
        raise ValueError(escape)
    return str(other).encode()


_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "digit": "0-9",
    "lower": "a-z",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": r"0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_PART = re.compile(r"\\.|\[:(\w+):\]|.", re.DOTALL)


def _to_python(pattern: str) -> str:
    """A regular expression of Go (RE2) as one of Python.

    They agree on what filters are made of; inside [sets] Python reserves characters that are
    themselves in Go, and does not know [:classes:]. Raises ValueError for what is different.
    """
    result: list[str] = []
    first = -1  # in an open set: where its first member would be in `result`
    for part in _PART.finditer(pattern):
        text, name = part[0], part[1]
        if first < 0:
            if name:
                raise ValueError(f"{text} outside of a set")
            if text == "[":
                first = len(result) + 1
            elif text == r"\z":
                text = r"\Z"
        elif name:
            if name not in _CLASSES:
                raise ValueError(f"[:{name}:] is not supported")
            text = _CLASSES[name]
        elif text == "^" and len(result) == first and result[-1] == "[":
            first += 1
        elif text == "]" and len(result) > first:
            first = -1
        elif text in "[]&~|":
            text = "\\" + text
        elif text == "-" and result[-1] == "-":
            raise ValueError("write - as the last character of a set")
        result.append(text)
    return "".join(result)
