"""The tree of hosts.toml files: which directory counts, and changes while we run."""

from __future__ import annotations

import logging
import re
import ssl
from typing import TYPE_CHECKING

import pytest
import trustme
from cryptography.hazmat.primitives import serialization as forms

from snapshotter.registry.errors import HostsError
from snapshotter.registry.host import registry_host
from snapshotter.registry.hosts_tree import HostsTree
from snapshotter.registry.reference import Reference

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = "registry.test:5000"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "certs.d"


@pytest.fixture
def tree(root: Path) -> HostsTree:
    return HostsTree(root)


def write(root: Path, name: str, text: str) -> Path:
    path = root / name / "hosts.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def image(registry: str) -> Reference:
    """Some image of a registry."""
    return Reference(registry, "team/app", "v1", None)


async def bases(tree: HostsTree, registry: str, *, plain_http: bool | None = None) -> list[str]:
    return [
        host.endpoint.base for host in await tree.lookup(image(registry), plain_http=plain_http)
    ]


async def test_no_tree(tree: HostsTree) -> None:
    """Without a tree, every registry is what it is without configuration."""
    for registry in ("docker.io", "localhost:5000", REGISTRY):
        assert await tree.lookup(image(registry)) == (registry_host(registry),)
    assert await bases(tree, REGISTRY, plain_http=True) == ["http://registry.test:5000/v2/"]


async def test_which_directory(tree: HostsTree, root: Path) -> None:
    """`host_port_` goes before `host:port`, that before `_default`; one counts, whole."""
    own = f"https://{REGISTRY}/v2/"
    write(root, "_default", '[host."https://for-all"]')
    assert await bases(tree, REGISTRY) == ["https://for-all/v2/", own]
    write(root, REGISTRY, '[host."https://colon"]')
    assert await bases(tree, REGISTRY) == ["https://colon/v2/", own]
    (root / "registry.test_5000_").mkdir()
    assert await bases(tree, REGISTRY) == [own]
    write(root, "registry.test_5000_", '[host."https://underscore"]')
    assert await bases(tree, REGISTRY) == ["https://underscore/v2/", own]
    assert await bases(tree, "registry.test") == [
        "https://for-all/v2/",
        "https://registry.test/v2/",
    ]


async def test_mirrors_are_told_for_whom(tree: HostsTree, root: Path) -> None:
    """A host of another name is a mirror: with a namespace, and credentials of its own."""
    write(
        root,
        "docker.io",
        'server = "https://docker.io"\n[host."https://m.test:1"]\n[host."docker.io"]',
    )
    mirror, first, server = await tree.lookup(image("docker.io"))
    assert (mirror.namespace, mirror.account) == ("docker.io", "m.test:1")
    assert (first.namespace, first.account) == ("", "docker.io")
    assert (server.namespace, server.account) == ("", "docker.io")
    assert server.endpoint.base == "https://registry-1.docker.io/v2/"
    write(root, "_default", 'server = "https://registry-1.docker.io"')
    (server,) = await tree.lookup(image(REGISTRY))
    assert (server.namespace, server.account) == (REGISTRY, "docker.io")


async def test_plain_http_is_about_the_registry_itself(tree: HostsTree, root: Path) -> None:
    """It goes before the file for the registry's own server, and changes no mirror."""
    write(root, "_default", 'server = "https://registry.test"\n[host."https://mirror"]')
    assert await bases(tree, "registry.test", plain_http=True) == [
        "https://mirror/v2/",
        "http://registry.test/v2/",
    ]
    assert await bases(tree, "other.test", plain_http=True) == [
        "https://mirror/v2/",
        "https://registry.test/v2/",
    ]


async def test_certificates_mean_tls(tree: HostsTree, root: Path) -> None:
    """A loopback registry is plain HTTP by custom, but not if it has a CA of its own."""
    (root / "localhost_5000_").mkdir(parents=True)
    assert await bases(tree, "localhost:5000") == ["http://localhost:5000/v2/"]
    trustme.CA().cert_pem.write_to_path(str(root / "localhost_5000_" / "ca.crt"))
    assert await bases(tree, "localhost:5000") == ["https://localhost:5000/v2/"]


async def test_changes_count_at_once(tree: HostsTree, root: Path) -> None:
    """A file that appears, changes, breaks or goes is noticed by the next lookup."""
    own = f"https://{REGISTRY}/v2/"
    path = write(root, "_default", '[host."https://one"]')
    assert await bases(tree, REGISTRY) == ["https://one/v2/", own]
    path.write_text('[host."https://two"]')
    assert await bases(tree, REGISTRY) == ["https://two/v2/", own]
    path.write_text("nonsense")
    with pytest.raises(HostsError, match=re.escape(f"{path} is not valid TOML")):
        await tree.lookup(image(REGISTRY))
    path.unlink()
    assert await bases(tree, REGISTRY) == [own]
    path.parent.rmdir()
    assert await tree.lookup(image(REGISTRY)) == (registry_host(REGISTRY),)


async def test_what_is_read_once(
    tree: HostsTree, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that stays the same is read once, and warns once."""
    write(root, "_default", 'colour = "red"\n[host."https://mirror"]\nskip_verify = true')
    with caplog.at_level(logging.WARNING):
        first = await tree.lookup(image(REGISTRY))
        assert await tree.lookup(image(REGISTRY)) == first
    assert [record.message for record in caplog.records] == [
        f"{root}/_default/hosts.toml: colour is not known here, and ignored"
    ]


async def test_a_broken_file_is_one_registrys_problem(tree: HostsTree, root: Path) -> None:
    """Other registries do not suffer."""
    write(root, "bad.test", "[[[")
    write(root, "good.test", '[host."https://mirror"]')
    with pytest.raises(HostsError, match=re.escape("bad.test")):
        await tree.lookup(image("bad.test"))
    assert await bases(tree, "good.test") == ["https://mirror/v2/", "https://good.test/v2/"]


async def test_what_cannot_be_read(tree: HostsTree, root: Path) -> None:
    """A directory in the place of a file, or a file in that of the tree, is named."""
    (root / "_default" / "hosts.toml").mkdir(parents=True)
    with pytest.raises(HostsError, match=r"cannot read .*hosts\.toml \(Is a directory\)"):
        await tree.lookup(image(REGISTRY))
    file = root / "file"
    file.touch()
    with pytest.raises(HostsError, match=r"cannot read .*file.* \(Not a directory\)"):
        await HostsTree(file).lookup(image(REGISTRY))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('ca = "missing.pem"', r"CA certificate .*missing\.pem \(No such file"),
        ('ca = "text.pem"', r"CA certificate .*text\.pem \("),
        ('client = "missing.pem"', r"client certificate .*missing\.pem \(No such file"),
        ('client = [["cert.pem", "missing.pem"]]', r"client certificate .*missing\.pem \(No such"),
        ('client = "cert.pem"', r"client certificate .*cert\.pem \("),
        ('client = [["cert.pem", "locked.pem"]]', r"client certificate .*cert\.pem \("),
    ],
)
async def test_bad_certificates(tree: HostsTree, root: Path, field: str, said: str) -> None:
    """A certificate or key that is missing, not one, or locked by a password is named."""
    path = write(root, "_default", f'[host."https://mirror"]\n{field}')
    certificate = trustme.CA().issue_cert("client.test")
    certificate.cert_chain_pems[0].write_to_path(str(path.parent / "cert.pem"))
    (path.parent / "text.pem").write_text("not a certificate")
    (path.parent / "locked.pem").write_bytes(_locked(certificate.private_key_pem.bytes()))
    with pytest.raises(HostsError, match=said):
        await tree.lookup(image(REGISTRY))


def _locked(key: bytes) -> bytes:
    return forms.load_pem_private_key(key, None).private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.BestAvailableEncryption(b"password")
    )


async def test_tls_settings(tree: HostsTree, root: Path) -> None:
    """Contexts verify unless told not to; one with a client's certificate is for its host alone;
    a certificate that is exchanged on disk is read again."""
    ca = trustme.CA()
    path = write(
        root,
        "_default",
        '[host."https://a"]\nca = "ca.pem"\n[host."https://b"]\nskip_verify = true\n'
        '[host."https://c"]\nclient = "client.pem"\n',
    )
    ca.cert_pem.write_to_path(str(path.parent / "ca.pem"))
    client = path.parent / "client.pem"
    ca.issue_cert("client.test").private_key_and_cert_chain_pem.write_to_path(str(client))
    before = [host.tls for host in await tree.lookup(image(REGISTRY))]
    a, b, c, server = before
    assert a is not None
    assert a.own.verify_mode is ssl.CERT_REQUIRED
    assert a.own.check_hostname
    assert a.elsewhere is a.own
    assert b is not None
    assert b.own.verify_mode is ssl.CERT_NONE
    assert c is not None
    assert c.elsewhere is not c.own
    assert server is None
    assert [host.tls for host in await tree.lookup(image(REGISTRY))] == before
    ca.issue_cert("renewed.test").private_key_and_cert_chain_pem.write_to_path(str(client))
    assert [host.tls for host in await tree.lookup(image(REGISTRY))] != before
