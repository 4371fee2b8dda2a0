"""The configuration file: what is taken, and what is said about the rest."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from snapshotter.cli.config import config as command
from snapshotter.daemon import config
from snapshotter.daemon.config import (
    Config,
    ImagesConfig,
    MetricsConfig,
    MountsConfig,
    RegistryConfig,
    StoreConfig,
    decode,
    encode,
    load,
    parse,
)
from snapshotter.daemon.config_check import keys, line_of
from snapshotter.daemon.errors import ConfigError
from snapshotter.podman.rootless import User

REPOSITORY = Path(__file__).parents[2]

EVERYTHING = """\
root = "/srv/firstbyte"
state = "/run/other"
address = "/run/other/containerd.sock"
[registry]
config_path = "/etc/registries"
[images]
trust = ["annotation"]
build = false
never = ["docker.io/library/postgres:*", "registry.example/app@sha256:*"]
[mounts]
mode = "fuse"
[store]
limit = "50 GiB"
keep_free = "5%"
[metrics]
address = "127.0.0.1:9431"
"""
ALL_READ = Config(
    root=Path("/srv/firstbyte"),
    state=Path("/run/other"),
    address=Path("/run/other/containerd.sock"),
    registry=RegistryConfig(config_path=Path("/etc/registries")),
    images=ImagesConfig(
        trust=("annotation",),
        build=False,
        never=("docker.io/library/postgres:*", "registry.example/app@sha256:*"),
    ),
    mounts=MountsConfig(mode="fuse"),
    store=StoreConfig(limit="50 GiB", keep_free="5%"),
    metrics=MetricsConfig(address="127.0.0.1:9431"),
)


def refused(text: str | bytes) -> str:
    """What is said about a configuration, behind the name of the file."""
    with pytest.raises(ConfigError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), "FILE")
    line = str(caught.value)
    assert line.startswith("FILE")
    assert line.isprintable()
    return line.removeprefix("FILE").removeprefix(", ").removeprefix(": ")


# --- what is taken ---


def test_every_key_is_read() -> None:
    assert parse(EVERYTHING.encode(), "") == ALL_READ


def test_every_key_is_optional() -> None:
    assert parse(b"", "") == Config()
    for text in EVERYTHING.splitlines():
        if text.startswith("["):
            assert parse(text.encode(), "") == Config()


def test_the_socket_is_in_the_state_directory_unless_it_has_an_address() -> None:
    assert parse(b'state = "/run/other"', "").socket == Path("/run/other/firstbyte.sock")
    assert parse(b'address = "/run/x.sock"', "").socket == Path("/run/x.sock")


def test_a_configuration_travels_to_the_daemon() -> None:
    assert decode(encode(ALL_READ)) == ALL_READ
    assert decode(encode(Config())) == Config()


# --- what is refused, and how that is said ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('rot = "/x"', "line 1: rot: there is no such key: did you mean root?"),
        (
            '\n[images]\nroot = "/x"',
            "line 3: images.root: there is no such key: it belongs above all tables",
        ),
        ("build = true", "line 1: build: there is no such key: it belongs below [images]"),
        ("[image]", "line 1: image: there is no such key: did you mean images?"),
        ("[mounts]\nkind = 1", "line 2: mounts.kind: there is no such key: the keys here are mode"),
        ('"a\\nb" = 1', 'line 1: "a\\nb": there is no such key: the keys here are '),
        ("[images]\n  biuld = 1", "line 2: images.biuld: "),
        ("images.biuld = 1", "line 1: images.biuld: "),
        ("images = { biuld = 1 }", "line 1: images.biuld: "),
        ("['images']\r\n'biuld' = 1\r\n", "line 2: images.biuld: "),
    ],
)
def test_unknown_keys_with_what_may_have_been_meant(text: str, says: str) -> None:
    assert refused(text).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root = 3", "root: expected a path, not a number: write it in quotes"),
        ("root = 2020-01-01", "root: expected a path, not a date or time: write it in quotes"),
        ("root = 0x" + "f" * 5000, "root: expected a path, not a number: write it in quotes"),
        ("images = []", "images: expected a table, not a list: write it below a line [images]"),
        ("[[images]]", "images: expected a table, not a list: write it below a line [images]"),
        ("[address]", "address: expected a path, not a table: write it in quotes"),
        (
            'images.build = "yes"',
            'images.build: expected true or false, not "yes": write build = true',
        ),
        ("images.build = 0", "images.build: expected true or false, not a number: write build = f"),
        (
            'images.trust = "referrer"',
            'images.trust: expected a list, each one of "annotation", "referrer", '
            'not "referrer": write trust = ["referrer"]',
        ),
        ("images.never = [3]", "images.never: expected a text, not a number: write it in quotes"),
    ],
)
def test_wrong_types_with_what_to_write(text: str, says: str) -> None:
    assert refused(text).startswith(f"line 1: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('root = "firstbyte"', 'root: "firstbyte" is not an absolute path'),
        ('root = ""', 'root: "" is not an absolute path'),
        ('root = "~/images"', 'root: "~/images" is not an absolute path: ~ means nothing here'),
        ('state = "/run/../x"', 'state: "/run/../x" has .. in it'),
        ('state = "//"', 'state: "//" is the root directory'),
        ('root = "/a\\u0000b"', 'root: "/a\\u0000b" has a control character in it'),
        (f'state = "/{"s" * 84}"', "state: the path is too long for a socket: 84 bytes"),
        (f'address = "/{"s" * 104}"', "address: the path is too long for a socket: 104 bytes"),
        ('registry.config_path = "/a:/b"', "registry.config_path: more than one directory"),
        ('root = "/run/firstbyte"', "root: root and state are the same directory"),
        ('state = "/var/lib/firstbyte"', "state: root and state are the same directory"),
        ('address = "/run/firstbyte/firstbyte-control.sock"', "address: this is where the daemon"),
        ('mounts.mode = "erof"', 'mounts.mode: expected one of "auto", "erofs", "fuse", not "ero'),
        ('images.trust = ["anotation"]', "images.trust: expected one of"),
        (
            'images.trust = ["referrer", "referrer"]',
            'images.trust: "referrer" is in the list twice',
        ),
        ('images.never = [""]', "images.never: an empty pattern"),
        ('images.never = ["a/b:[12"]', 'images.never: "a/b:[12" has a bracket without its partner'),
        (
            'images.never = ["docker\\\\.io/.*"]',
            'images.never: no reference can match "docker\\\\.io/.*": patterns are as in a shell',
        ),
        (
            'images.never = ["postgres"]',
            'images.never: "postgres" is not a whole reference: '
            'did you mean "docker.io/library/postgres:*"?',
        ),
        (
            'images.never = ["registry.example:5000/app"]',
            'images.never: "registry.example:5000/app" is not a whole reference: '
            'did you mean "registry.example:5000/app:*"?',
        ),
    ],
)
def test_values_that_cannot_be_right(text: str, says: str) -> None:
    assert refused(text).startswith(f"line 1: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root = /x", "line 1, column 8: this is no value: texts and paths are in quotes"),
        ('root = "/x', "at its end: unterminated string"),
        ('root = "/x"\nroot = "/y"\n', "line 2, column 12: this key is there already"),
        ("[images]\n[images]\n", "line 2, column 8: this table is there already"),
        ("x = " + "9" * 5000, "a number in it is too long"),
        (b"# fine\n\xff", "line 2: not UTF-8"),
        ("x = " + "[" * 20_000, "lists and tables are nested too deep"),
        (b"#" * (config.MAX_BYTES + 1), " is no configuration: it has more than 1 MiB"),
    ],
)
def test_what_is_no_toml(text: str | bytes, says: str) -> None:
    assert refused(text).startswith(says)


def test_errors_show_the_start_of_what_is_long() -> None:
    assert len(refused(f'{"k" * 5000} = "{"v" * 5000}"')) < 300
    assert len(refused(f'root = "{"v" * 5000}"')) < 300


# --- lines ---


def test_the_line_of_a_key_in_every_way_to_write_it() -> None:
    text = (
        "# a comment\n\n"
        'root = """\n/srv\n[images]\nbuild = 1\n"""\n'
        "[registry]  # x = 1\n"
        "\n"
        "[ 'images' ]\n"
        "never = [\n  # build = 2\n  'a',\n  'b',\n]\n"
        "build = true"
    )
    tomllib.loads(text)
    assert line_of(text, ("root",)) == 3
    assert line_of(text, ("registry",)) == 8
    assert line_of(text, ("images",)) == 10
    assert line_of(text, ("images", "never")) == 11
    assert line_of(text, ("images", "build")) == 16


@given(
    st.lists(st.sampled_from(["", "# x = 0", "{} = 1", "{} = [\n1,\n]", "[t{}]"]), max_size=30),
    st.sampled_from(["\n", "\r\n"]),
)
def test_the_line_of_a_key_is_where_it_begins(parts: list[str], newline: str) -> None:
    lines: list[str] = []
    places: list[tuple[tuple[str, ...], int]] = []
    table: tuple[str, ...] = ()
    for number, part in enumerate(parts):
        if part.startswith("["):
            table = (f"t{number}",)
            places.append((table, len(lines) + 1))
        elif part.startswith("{"):
            places.append(((*table, f"k{number}"), len(lines) + 1))
        name = number if part.startswith("[") else f"k{number}"
        lines += part.replace("{}", str(name)).split("\n")
    text = newline.join(lines)
    for place, line in places:
        assert line_of(text, place) == line


# --- any bytes ---

WORDS = [*(".".join(key.place) for key in keys(Config)), "images", "[images]", "[mounts]", "="]
WORDS += [
    '"/x"',
    "true",
    "[",
    "]",
    "{",
    "}",
    ",",
    '"',
    "'",
    "\n",
    "#",
    '"annotation"',
    "0x" + "f" * 20,
]


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.lists(st.sampled_from(WORDS)).map(lambda words: " ".join(words).encode())
)
@example(b"root = 1e999")
@example(b'"\\u0085" = 1')
def test_any_bytes_are_a_configuration_or_an_error_of_one_line(text: bytes) -> None:
    problem = ""
    try:
        parsed = parse(text, "FILE")
    except ConfigError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("FILE")
        assert "\n" not in problem
    else:
        assert parse(text, "other") == parsed
        assert decode(encode(parsed)) == parsed


# --- files ---


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/none does not exist$"):
        load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"^cannot read .*: Is a directory$"):
        load(tmp_path)


def test_only_the_usual_file_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_CONFIG", tmp_path / "config.toml")
    assert load(None) == Config()
    (tmp_path / "config.toml").write_text("root = 3")
    with pytest.raises(ConfigError, match=r"/config\.toml, line 1: root"):
        load(None)


def test_a_user_without_root_has_other_places(tmp_path: Path) -> None:
    user = User(1000, tmp_path / "data", tmp_path / "config", Path("/run/user/1000"))
    found = parse(b"", "", user)
    assert (found.root, found.state) == (
        tmp_path / "data/firstbyte",
        Path("/run/user/1000/firstbyte"),
    )
    assert found.registry == RegistryConfig()
    mirrors = tmp_path / "config/containers/registries.conf"
    mirrors.parent.mkdir(parents=True)
    mirrors.touch()
    assert parse(b"", "", user).registry.registries_conf == mirrors
    named = parse(b'root = "/r"\n[registry]\nregistries_conf = "/m"', "", user)
    assert (named.root, named.registry.registries_conf) == (Path("/r"), Path("/m"))
    with pytest.raises(ConfigError, match="expected a table"):
        parse(b"registry = 1", "", user)


# --- the command, and what is made from the structs ---


def test_check_says_right_or_wrong(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(EVERYTHING)
    done = CliRunner().invoke(command, ["check", str(file)])
    assert (done.exit_code, done.output) == (0, f"{file} is right\n")
    file.write_text("rot = 1")
    done = CliRunner().invoke(command, ["check", str(file)])
    assert isinstance(done.exception, ConfigError)


def test_show_prints_a_configuration_that_means_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(EVERYTHING)
    shown = CliRunner().invoke(command, ["show", "--config", str(file)]).output
    assert parse(shown.encode(), "") == ALL_READ
    as_json = CliRunner().invoke(command, ["show", "--config", str(file), "--json"]).output
    assert decode(as_json) == ALL_READ


def test_show_has_every_key_even_if_nothing_is_configured(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("")
    shown = tomllib.loads(CliRunner().invoke(command, ["show", "--config", str(file)]).output)
    assert shown.pop("address") == "/run/firstbyte/firstbyte.sock"
    assert set(shown) | {"address"} == set(Config.__struct_fields__)
    assert shown["images"] == {"trust": ["annotation", "referrer"], "build": True, "never": []}


def test_the_page_and_the_example_are_up_to_date(tmp_path: Path) -> None:
    """If not: scripts/make-config-reference."""
    subprocess.run([REPOSITORY / "scripts/make-config-reference", tmp_path], check=True)
    for name in ("docs/configuration.md", "systemd/config.toml"):
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()


def test_the_page_has_a_meaning_for_every_key() -> None:
    page = (REPOSITORY / "docs/configuration.md").read_text()
    for key in keys(Config):
        assert key.meaning
        assert f"| `{key.place[-1]}` | {key.type} |" in page


def test_the_example_changes_nothing_and_neither_does_it_with_its_comments_taken_away() -> None:
    example_text = (REPOSITORY / "systemd/config.toml").read_text()
    assert parse(example_text.encode(), "") == Config()
    lines = [line for line in example_text.splitlines() if " = " in line or line.startswith("[")]
    active = os.linesep.join(line.removeprefix("# ") for line in lines)
    assert parse(active.encode(), "") == Config(address=Config().socket)
