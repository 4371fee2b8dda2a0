"""What is wrong with a configuration: which key, on which line, and what may have been meant.

Works on any tree of msgspec structs whose fields are tables, paths, switches, words to choose from,
texts, and lists of those; a field's `Meta` has its description and what else must hold for it. The
checks are ours and not msgspec's, whose errors name types of JSON and no lines.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SYNTAX = re.compile(r"(?P<words>.*) \(at (?P<place>line \d+, column \d+|end of document)\)")
_DECLARED = re.compile(r"Cannot declare \(.*\) twice")
_SHOWN = 60  # characters of what somebody has written
_TRIES = 200  # parts of a document that are parsed to find a line; ten or so usually do

_YES = ("true", "yes", "on", "1", 1)
_NO = ("false", "no", "off", "0", 0)

Place = tuple[str, ...]
"""Names of tables and then of a key; an element of a list is at the list's place."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with a value, to be read after its key, and what to do about it."""

    words: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a place."""

    place: Place
    wrong: Wrong


Rule = Callable[[Any], Wrong | None]


def described(description: str, rule: Rule | None = None) -> msgspec.Meta:
    """For a field's annotation: its meaning, and a rule for values of the right type."""
    return msgspec.Meta(description=description, extra={"rule": rule} if rule else None)


@dataclass(frozen=True, slots=True)
class Key:
    """One key that there is: `type` and `default` as in TOML, but for a default of None."""

    place: Place
    type: str
    default: str
    meaning: str


def keys(kind: type[msgspec.Struct], place: Place = ()) -> Iterator[Key]:
    """All keys of a configuration and its tables, in the order of the fields."""
    for field in msgspec.structs.fields(kind):
        annotated = _hints(kind)[field.name]
        bare, meta = _bare(annotated)
        if _is_table(bare):
            yield from keys(bare, (*place, field.name))
        else:
            default = "" if field.default is None else in_toml(field.default)
            words = _expected(bare)
            meaning = meta.description if meta and meta.description else ""
            yield Key((*place, field.name), words, default, meaning)


def first_problem(data: Mapping[str, Any], kind: type[msgspec.Struct]) -> Problem | None:
    """The first thing in a parsed document that is no configuration of this kind."""
    return next(_table_problems(data, kind, kind, ()), None)


def in_toml(value: object) -> str:
    """A key's value as TOML has it, on one line."""
    match value:
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return "true" if value else "false"
        case tuple():
            return f"[{', '.join(map(in_toml, value))}]"
    raise TypeError(f"no key has such a value: {value!r}")


def dotted(place: Place) -> str:
    """A place as TOML writes a key."""
    return ".".join(name if _BARE_KEY.fullmatch(name) else in_toml(name) for name in place)


def shorten(text: str) -> str:
    """As much of what somebody has written as is good to read in an error."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def syntax_problem(error: ValueError) -> tuple[str, Wrong]:
    """Where tomllib found that a document is no TOML, and why."""
    match = _SYNTAX.fullmatch(str(error))
    if match is None:  # Python's own: numbers of thousands of digits
        return "", Wrong("a number in it is too long")
    place = match["place"].replace("end of document", "at its end")
    words = match["words"]
    if _DECLARED.fullmatch(words):
        return place, Wrong("this table is there already", "put its keys together")
    if words == "Cannot overwrite a value":
        return place, Wrong("this key is there already", "keep one of them")
    if words == "Invalid value":
        return place, Wrong("this is no value", "texts and paths are in quotes")
    return place, Wrong(shorten(words[:1].lower() + words[1:]))


def line_of(text: str, place: Place) -> int | None:
    """The line on which a key of a valid document is, however it is written.

    Found by parsing parts: the key begins behind the longest part, from the start on and of whole
    lines, that can be parsed and lacks it. None if that takes too many tries.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    tries = 0

    def parsed_from(first: int) -> tuple[int, bool]:
        """The shortest part of `first` lines or more that can be parsed, and if it has the key."""
        nonlocal tries
        for end in range(first, found):
            tries += 1
            if tries > _TRIES:
                break
            try:
                return end, _has(tomllib.loads("\n".join(lines[:end])), place)
            except ValueError:
                continue
        return found, True

    # Parts of `below` lines and less lack the key, the part of `found` lines has it, and between
    # `top` and that nothing can be parsed.
    below, top, found = 0, len(lines), len(lines)
    while below + 1 < top:
        middle = (below + top) // 2
        end, there = parsed_from(middle)
        if there:
            found, top = end, middle
        else:
            below = end
    if tries > _TRIES:
        return None
    for number in range(below, found):
        if not re.match(r"\s*(#|$)", lines[number]):
            return number + 1
    return found


def _table_problems(
    data: Mapping[str, Any], kind: type[msgspec.Struct], root: type[msgspec.Struct], place: Place
) -> Iterator[Problem]:
    hints = _hints(kind)
    for name, value in data.items():
        here = (*place, name)
        if name not in hints:
            yield Problem(here, Wrong("there is no such key", _meant(here, root)))
            continue
        bare, meta = _bare(hints[name])
        if _is_table(bare) and isinstance(value, dict):
            yield from _table_problems(value, bare, root, here)
        elif wrong := _wrong(value, bare, meta, dotted((name,))):
            yield Problem(here, wrong)


def _wrong(value: object, kind: Any, meta: msgspec.Meta | None, name: str) -> Wrong | None:
    """What is wrong with a value that is to be of `kind`; `name` is its key's."""
    wrong = _wrong_type(value, kind, name)
    if wrong is None and get_origin(kind) is tuple:
        assert isinstance(value, list)
        element, element_meta = _bare(get_args(kind)[0])
        for number, one in enumerate(value):
            if wrong := _wrong(one, element, element_meta, name):
                return wrong
            if one in value[:number]:
                return Wrong(f"{in_toml(one)} is in the list twice", "once is enough")
    if wrong is None and meta is not None and meta.extra:
        rule: Rule = meta.extra["rule"]
        wrong = rule(Path(value) if kind is Path and isinstance(value, str) else value)
    return wrong


def _wrong_type(value: object, kind: Any, name: str) -> Wrong | None:
    if kind is bool:
        if isinstance(value, bool):
            return None
        word = value.lower() if isinstance(value, str) else value
        hint = "true" if word in _YES else "false" if word in _NO else ""
        return _not(value, kind, f"write {name} = {hint}" if hint else "")
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value in choices:
            return None
        near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        return _not(value, kind, f"did you mean {in_toml(near[0])}?" if near else "")
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            return None
        text = isinstance(value, str)
        return _not(value, kind, f"write {name} = [{in_toml(value)}]" if text else "")
    if _is_table(kind):
        return _not(value, kind, f"write it below a line [{name}]")
    if not isinstance(value, str):
        return _not(value, kind, "write it in quotes")
    if _CONTROL.search(value):
        return Wrong(f"{_shown(value)} has a control character in it")
    return _wrong_path(value) if kind is Path else None


def _wrong_path(value: str) -> Wrong | None:
    if not value.startswith("/"):
        hint = "~ means nothing here" if value.startswith("~") else "it begins with /"
        return Wrong(f"{_shown(value)} is not an absolute path", hint)
    if ".." in value.split("/"):
        return Wrong(f"{_shown(value)} has .. in it", "write the path without it")
    if not value.strip("/"):
        return Wrong(f"{_shown(value)} is the root directory", "name a directory of its own")
    return None


def _not(value: object, kind: Any, hint: str = "") -> Wrong:
    return Wrong(f"expected {_expected(kind)}, not {_shown(value)}", hint)


def _expected(kind: Any) -> str:
    """The values that there are, in words."""
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(in_toml, get_args(kind)))}"
    if get_origin(kind) is tuple:
        element, _ = _bare(get_args(kind)[0])
        return "a list of texts" if element is str else f"a list, each {_expected(element)}"
    if _is_table(kind):
        return "a table"
    return "a path" if kind is Path else "a text"


def _shown(value: object) -> str:
    match value:
        case str() | bool():
            return shorten(in_toml(value))
        case dict():
            return "a table"
        case list():
            return "a list"
        case int() | float():
            return "a number"
        case _:
            return "a date or time"


def _meant(place: Place, root: type[msgspec.Struct]) -> str:
    """What somebody who wrote an unknown key may have meant."""
    places = [*_places(root, ())]
    for other in places:  # the right key in the wrong table
        if other[-1] == place[-1]:
            table = dotted(other[:-1])
            return f"it belongs below [{table}]" if table else "it belongs above all tables"
    siblings = {other[-1] for other in places if other[:-1] == place[:-1]}
    near = difflib.get_close_matches(place[-1], sorted(siblings), n=1)
    return (
        f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(sorted(siblings))}"
    )


def _places(kind: type[msgspec.Struct], place: Place) -> Iterator[Place]:
    for name, annotated in _hints(kind).items():
        bare, _ = _bare(annotated)
        yield (*place, name)
        if _is_table(bare):
            yield from _places(bare, (*place, name))


def _has(data: object, place: Place) -> bool:
    for name in place:
        if not isinstance(data, dict) or name not in data:
            return False
        data = data[name]
    return True


def _hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _bare(annotated: Any) -> tuple[Any, msgspec.Meta | None]:
    """A type without annotation and without None, and the annotation."""
    meta = None
    if get_origin(annotated) is Annotated:
        annotated, meta = get_args(annotated)[:2]
    if get_origin(annotated) in (Union, types.UnionType):
        annotated = next(one for one in get_args(annotated) if one is not type(None))
    return annotated, meta


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
