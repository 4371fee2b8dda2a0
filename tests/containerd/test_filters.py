"""containerd's filter language, with the cases of its own tests among others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.containerd.errors import InvalidArgumentError
from snapshotter.containerd.filters import compile_filters
from snapshotter.containerd.snapshots import Info, Kind


def info(
    name: str, kind: Kind = Kind.COMMITTED, parent: str = "", labels: dict[str, str] | None = None
) -> Info:
    return Info(kind, name, parent, labels or {}, 0, 0)


SNAPSHOTS = [
    info("a-np", Kind.ACTIVE),
    info("p", labels={"l": "1", "containerd.io/gc.root": "check-walk"}),
    info("a", Kind.ACTIVE, "p", {"l": "2"}),
    info("v", Kind.VIEW, "p", {"l": "3", "other": "x y, z"}),
    info("k8s.io/3/sha256:ab", Kind.COMMITTED, "k8s.io/2/sha256:cd", {"/path|": 'say "hi"'}),
]
SHA = "k8s.io/3/sha256:ab"


def matching(*filters: str) -> list[str]:
    matches = compile_filters(filters)
    return [snapshot.name for snapshot in SNAPSHOTS if matches(snapshot)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["a-np", "p", "a", "v", SHA]),
        ("kind==active", ["a-np", "a"]),
        ("kind==committed,parent!=p", ["p", SHA]),
        ("kind == view", ["v"]),
        ('parent==""', ["a-np", "p"]),
        ("name==k8s.io/3/sha256:ab", [SHA]),
        ("name,kind==view", ["v"]),
        ("labels", []),  # a label with an empty name
        ("labels.l", ["p", "a", "v"]),
        ("labels.l==2", ["a"]),
        ('labels."containerd.io/gc.root"==check-walk', ["p"]),
        ("labels.containerd", []),
        ('labels.containerd."io/gc".root', ["p"]),  # parts are joined with dots
        ('labels.other=="x y, z"', ["v"]),
        (r'labels."/path|"=="say \"hi\""', [SHA]),
        ("labels.l!=2", ["a-np", "p", "v", SHA]),  # one that is not there is not equal
        ("labels.l!=2,labels.l", ["p", "v"]),
        ("name~=^a", ["a-np", "a"]),
        ("name~=/^k8s.io\\/[0-9]+\\/sha256:/", [SHA]),
        ("name~=|sha(256|512)|", None),  # the bar ends the quote
        (r"name~=|sha(256\|512)|", [SHA]),
        ('name~="^.$"', ["p", "a", "v"]),
        ("labels.l~=^$", ["a-np", SHA]),  # nothing is searched as an empty text
        (r"name~=^[[:alpha:]]\z", ["p", "a", "v"]),
        ("name~=^[]a[|]$", ["a"]),
        ("name~=^[^]a[|]$", ["p", "v"]),
        ("unknown", []),
        ("unknown==x", []),
        ("unknown!=x", ["a-np", "p", "a", "v", SHA]),
        ("kind.more==active", ["a-np", "a"]),
        (r'name=="\x61" ', None),
        (r'name=="\x61"', ["a"]),
        (r'name=="\141"', ["a"]),
        (r'name=="\u0061"', ["a"]),
        (r'name=="\U00000061"', ["a"]),
        (r'name=="\xff"', []),
    ],
)
def test_what_matches(text: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(InvalidArgumentError):
            matching(text)
    else:
        assert matching(text) == names


def test_several_filters_match_what_any_of_them_matches() -> None:
    assert matching("kind==view", "labels.l==1") == ["p", "v"]
    assert matching("kind==view", "") == [snapshot.name for snapshot in SNAPSHOTS]


def test_no_filter_matches_everything() -> None:
    assert matching() == [snapshot.name for snapshot in SNAPSHOTS]


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "kind==",
        "kind==,",
        "kind===active",
        "kind=active",
        "kind<active",
        "kind==active kind==view",
        "==active",
        "kind==active,",
        ".kind",
        "labels.",
        "labels..l",
        'labels."l',
        'name=="a\nb"',
        "name==/a/",
        "name==|a|",
        r'name=="\q"',
        r'name=="\'"',
        r'name=="\x6"',
        r'name=="\777"',
        r'name=="\ud800"',
        r'name=="\UFFFFFFFF"',
        "name~=(",
        "name~=[[:nothing:]]",
        "name~=[+--]",
        "name~=" + "(" * 3000,
        "name==" + "x" * 5000,
        "name==\x01",
        "name==\ud800",
    ],
)
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        compile_filters([text])


def test_the_error_says_where() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'kind=active', character 6: .*==, != or ~="):
        compile_filters(["kind=active"])


ALPHABET = "abklnx019._-/|\"'\\=!~, ()[]*+?^$&:{}\n\t\x00é"


@given(st.one_of(st.text(max_size=60), st.text(ALPHABET, max_size=60)))
def test_any_text_is_a_filter_or_an_invalid_argument(text: str) -> None:
    for prefix in ("", "name~=", 'labels."', "name~=["):
        try:
            matches = compile_filters([prefix + text])
        except InvalidArgumentError:
            continue
        for snapshot in SNAPSHOTS[:1]:
            matches(snapshot)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")))
def test_every_name_can_be_quoted(name: str) -> None:
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    matches = compile_filters([f'name=="{quoted}"'])
    assert matches(info(name))
    assert not matches(info(name + "x"))


@pytest.mark.parametrize(
    ("filters", "label"),
    [
        (
            ['labels."containerd.io/snapshot.ref"==sha256:1'],
            ("containerd.io/snapshot.ref", "sha256:1"),
        ),
        (['labels.a.b==1,parent==""'], ("a.b", "1")),
        (['kind==active,labels.a=="1"'], ("a", "1")),
        (["labels.a!=1"], None),
        (["labels.a"], None),
        (["parent==a"], None),
        (["labels.a==1", "labels.a==2"], None),
        ([""], None),
        ([], None),
    ],
)
def test_a_label_that_every_match_has_is_known(
    filters: list[str], label: tuple[str, str] | None
) -> None:
    assert compile_filters(filters).label == label
