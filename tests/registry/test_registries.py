"""registries.conf: which rule counts, what it makes of a reference, and changes while we run."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.errors import FirstByteError
from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import Use
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.locations import Locations
from snapshotter.registry.platform import Platform
from snapshotter.registry.reference import Reference
from snapshotter.registry.registries import parse_registries, rule_for
from snapshotter.registry.registries_conf import RegistriesConf
from tests.support.images import put, sample_image

if TYPE_CHECKING:
    from snapshotter.registry.credentials import CredentialStore
    from snapshotter.registry.host import Host
    from snapshotter.registry.transport import Transport
    from tests.support.faults import FaultRegistry

PATH = Path("/etc/containers/registries.conf")
DIGEST = "sha256:" + "5" * 64


def found(text: str, reference: str) -> str | None:
    """The prefix of the rule that counts."""
    rule = rule_for(parse_registries(text.encode(), PATH), Reference.parse(reference))
    return rule and rule.prefix


async def hosts(directory: Path, text: str, reference: str) -> tuple[Host, ...] | None:
    path = directory / "registries.conf"
    path.write_text(text)
    return await RegistriesConf(path).lookup(Reference.parse(reference))


async def urls(directory: Path, text: str, reference: str) -> list[str]:
    """Where the image's repository is asked for, in order."""
    parsed = Reference.parse(reference)
    answer = await hosts(directory, text, reference)
    return [h.endpoint.base + (h.repository or parsed.repository) for h in answer or ()]


# --- which rule ---


def test_the_longest_prefix_counts() -> None:
    text = "".join(
        f'[[registry]]\nprefix = "{prefix}"\nlocation = "m.test"\n'
        for prefix in ("a.test", "a.test/team", "a.test/team/app", "*.wild.test", "docker.io")
    )
    assert found(text, "a.test/other:v1") == "a.test"
    assert found(text, "a.test/team/other") == "a.test/team"
    assert found(text, "a.test/team/app/part") == "a.test/team/app"
    assert found(text, "a.test/teams/app") == "a.test"
    assert found(text, "x.wild.test:5000/app") == "*.wild.test"
    assert found(text, "wild.test/app") is None
    assert found(text, "python:3") == "docker.io"
    assert found(text, "a.test:5000/app") is None


def test_a_location_alone_is_its_own_prefix() -> None:
    assert found('[[registry]]\nlocation = "a.test/team"\n', "a.test/team/app") == "a.test/team"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[[", "is not valid TOML"),
        ("registry = 1", "registry is not a list of tables"),
        ("[[registry]]\nblocked = true", "registry 1: neither prefix nor location"),
        ('[[registry]]\nlocation = "https://a.test"', "prefix 'https://a.test' is no host"),
        ('[[registry]]\nprefix = "*.*.test"\nlocation = "a"', "prefix '*.*.test' is no host"),
        ('[[registry]]\nlocation = "a.test"\ninsecure = "yes"', "insecure is neither true nor"),
        ('[[registry]]\nlocation = "a"\n[[registry.mirror]]', "mirror: location '' is no host"),
        (
            '[[registry]]\nlocation = "a"\n[[registry.mirror]]\nlocation = "b"\n'
            'pull-from-mirror = "some"',
            "pull-from-mirror is 'some', and not one of all, digest-only, tag-only",
        ),
    ],
)
def test_what_cannot_be_understood_is_said_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(HostsError, match=re.escape(problem)) as caught:
        parse_registries(text.encode(), PATH)
    assert str(PATH) in str(caught.value)


@given(st.binary() | st.text().map(str.encode))
def test_nothing_but_an_error_comes_of_nonsense(raw: bytes) -> None:
    with suppress(FirstByteError):
        parse_registries(raw, PATH)


# --- which hosts ---


async def test_mirrors_come_before_the_registry_and_paths_are_replaced(tmp_path: Path) -> None:
    text = """
    [[registry]]
    prefix = "a.test/team"
    location = "b.test:5000/moved/to"
    [[registry.mirror]]
    location = "mirror.test/copies"
    [[registry.mirror]]
    location = "localhost:5001"
    """
    assert await urls(tmp_path, text, "a.test/team/app:v1") == [
        "https://mirror.test/v2/copies/app",
        "http://localhost:5001/v2/app",
        "https://b.test:5000/v2/moved/to/app",
    ]
    assert await hosts(tmp_path, text, "a.test/other:v1") is None


async def test_a_prefix_of_all_subdomains_keeps_the_name(tmp_path: Path) -> None:
    text = '[[registry]]\nprefix = "*.a.test"\n[[registry.mirror]]\nlocation = "m.test/x"\n'
    assert await urls(tmp_path, text, "eu.a.test/team/app") == [
        "https://m.test/v2/x/team/app",
        "https://eu.a.test/v2/team/app",
    ]


async def test_insecure_is_tls_that_nobody_vouches_for_and_then_none(tmp_path: Path) -> None:
    answer = await hosts(
        tmp_path, '[[registry]]\nlocation = "a.test"\ninsecure = true\n', "a.test/x"
    )
    assert answer is not None
    assert [host.endpoint.scheme for host in answer] == ["https", "http"]
    assert answer[0].tls is not None
    assert not answer[0].tls.own.check_hostname


async def test_who_is_asked_for_tags_and_who_for_digests(tmp_path: Path) -> None:
    text = '[[registry]]\nlocation = "a.test"\n' + "".join(
        f'[[registry.mirror]]\nlocation = "{mode}.test"\npull-from-mirror = "{mode}"\n'
        for mode in ("all", "digest-only", "tag-only")
    )
    for reference, use, expected in (
        ("a.test/x:v1", Use.TAG, ["all", "tag-only", "a"]),
        ("a.test/x:v1", Use.CONTENT, ["all", "digest-only", "tag-only", "a"]),
        (f"a.test/x@{DIGEST}", Use.CONTENT, ["all", "digest-only", "a"]),
    ):
        answer = await hosts(tmp_path, text, reference) or ()
        asked = [host.endpoint.host.removesuffix(".test") for host in answer if host.may(use)]
        assert asked == expected


async def test_what_is_blocked_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(HostsError, match=r"a\.test/x is blocked"):
        await hosts(tmp_path, '[[registry]]\nprefix = "a.test"\nblocked = true\n', "a.test/x")


async def test_drop_ins_are_read_after_it_and_changes_count_at_once(tmp_path: Path) -> None:
    conf = RegistriesConf(tmp_path / "registries.conf")
    reference = Reference.parse("a.test/app")
    assert await conf.lookup(reference) is None
    drop_ins = tmp_path / "registries.conf.d"
    drop_ins.mkdir()
    for path, location in (
        (tmp_path / "registries.conf", "one.test"),
        (drop_ins / "10-b.conf", "three.test"),
        (drop_ins / "00-a.conf", "two.test"),
        (drop_ins / "99-ignored", "four.test"),
    ):
        path.write_text(f'[[registry]]\nprefix = "a.test"\nlocation = "{location}"\n')
    (host,) = await conf.lookup(reference) or ()
    assert host.endpoint.host == "three.test"
    (drop_ins / "10-b.conf").unlink()
    (host,) = await conf.lookup(reference) or ()
    assert host.endpoint.host == "two.test"


# --- on the wire ---


async def test_an_image_comes_from_a_mirror_under_its_name_there(
    tmp_path: Path,
    faulty: FaultRegistry,
    mirror: FaultRegistry,
    transport: Transport,
    credentials: CredentialStore,
) -> None:
    """hosts.toml says nothing of this registry; the one that has the image under its own name is
    not asked."""
    sample = sample_image(seed=81, size=50_000)
    put(mirror, "copies/app", sample, "v1")
    path = tmp_path / "registries.conf"
    path.write_text(
        f'[[registry]]\nprefix = "{faulty.host}/team"\nlocation = "{faulty.host}/team"\n'
        f'[[registry.mirror]]\nlocation = "{mirror.host}/copies"\n'
    )
    tree = HostsTree(tmp_path / "certs.d", RegistriesConf(path))
    source = Locations(transport, credentials, hosts=tree).source(f"{faulty.host}/team/app:v1")
    resolved = await source.resolve(Platform("linux", "amd64"))
    assert resolved.manifest.raw == sample.manifest.raw
    assert faulty.requests == []
    assert not any(request.query for request in mirror.requests)


def test_the_program_for_credentials_is_the_last_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "registries.conf"
    conf = RegistriesConf(path)
    assert conf.auth_helper() == ""
    path.write_text(
        'additional-layer-store-auth-helper = "/first"\n[[registry]]\nlocation = "a.io"'
    )
    assert conf.auth_helper() == "/first"
    drop_ins = tmp_path / "registries.conf.d"
    drop_ins.mkdir()
    (drop_ins / "1.conf").write_text('additional-layer-store-auth-helper = "/second"\n')
    (drop_ins / "2.conf").write_text('[[registry]]\nlocation = "b.io"')
    assert conf.auth_helper() == "/second"
    path.write_text("[")
    with pytest.raises(HostsError, match="not valid TOML"):
        conf.auth_helper()
