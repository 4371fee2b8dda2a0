"""What is wrong with containerd's configuration, for every version, and the lines that mend it."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter.doctor.findings import State
from tests.doctor.documented import V1, V2_0, V2_1, snippets
from tests.doctor.nodes import MAIN, NEWER, OLD, SPLIT, TRANSFER, Account, examined

if TYPE_CHECKING:
    from snapshotter.doctor.versions import Version

ALL = [(V1, OLD), (V1, NEWER), (V2_0, SPLIT), (V2_1, TRANSFER)]
LABELS = '  enable_remote_snapshot_annotations = "true"   # a string\n'
IMAGES = "[plugins.'io.containerd.cri.v1.images']\n"


def without(snippet: str, *lines: str) -> str:
    """A snippet without the lines that begin so."""
    kept = [
        line for line in snippets()[snippet].splitlines(True) if not line.strip().startswith(lines)
    ]
    assert len(kept) < len(snippets()[snippet].splitlines())
    return "".join(kept)


def with_cri(snippet: str, *lines: str) -> str:
    """A snippet of version 3 with more lines in CRI's table about images."""
    text = snippets()[snippet]
    assert IMAGES in text
    return text.replace(IMAGES, IMAGES + "\n".join(lines) + "\n")


@pytest.mark.parametrize(("snippet", "version"), ALL)
def test_no_proxy_plugin(snippet: str, version: Version) -> None:
    text = re.sub(r"\[proxy_plugins\.firstbyte\].*?\n\n", "", snippets()[snippet], flags=re.DOTALL)
    finding = examined(text, version)["proxy-plugin"]
    assert finding.state is State.PROBLEM
    head, _, lines = finding.mend.partition(":\n")
    assert "restart containerd" in head
    assert examined(f"{text}\n{lines}", version)["proxy-plugin"].state is State.OK


@pytest.mark.parametrize(("snippet", "version"), ALL)
def test_another_address(snippet: str, version: Version) -> None:
    text = snippets()[snippet].replace("firstbyte.sock", "other.sock")
    finding = examined(text, version)["proxy-plugin"]
    assert finding.state is State.PROBLEM
    assert "/run/firstbyte/other.sock" in finding.found


def test_a_proxy_plugin_of_another_type() -> None:
    text = snippets()[V2_1].replace('"snapshot"', '"content"')
    assert "'content'" in examined(text, TRANSFER)["proxy-plugin"].found


def test_an_address_with_a_scheme_and_another_name() -> None:
    text = snippets()[V2_1].replace("/run/firstbyte/", "unix:///run/firstbyte/")
    text = text.replace("plugins.firstbyte", "plugins.lazy").replace(
        'r = "firstbyte"', 'r = "lazy"'
    )
    findings = examined(text, TRANSFER)
    assert findings["proxy-plugin"].found.startswith("lazy at ")
    assert findings["snapshotter"].state is State.OK
    assert findings["labels"].state is State.OK


@pytest.mark.parametrize(("snippet", "version"), ALL)
def test_cri_uses_another_snapshotter(snippet: str, version: Version) -> None:
    text = without(snippet, "snapshotter =")
    finding = examined(text, version)["snapshotter"]
    assert finding.state is State.PROBLEM
    assert "'overlayfs'" in finding.found
    table = "containerd]" if version < SPLIT else "images']"
    assert f'{table}\n  snapshotter = "firstbyte"' in finding.mend


@pytest.mark.parametrize(("snippet", "version"), ALL[:3])
@pytest.mark.parametrize("value", ["true", None])
def test_cri_sends_no_labels(snippet: str, version: Version, value: str | None) -> None:
    text = without(snippet, "disable_snapshot_annotations")
    if value is not None:
        text = snippets()[snippet].replace("tations = false", f"tations = {value}")
    finding = examined(text, version)["labels"]
    assert finding.state is State.PROBLEM
    assert "disable_snapshot_annotations = false" in finding.mend


def test_the_transfer_service_does_not_know_the_snapshotter() -> None:
    text = snippets()[V2_1].partition("[[")[0]
    finding = examined(text, TRANSFER)["labels"]
    assert finding.state is State.PROBLEM
    _, _, lines = finding.mend.partition(":\n")
    mended = examined(f"{text}\n{lines}", TRANSFER)["labels"]
    assert mended.state is State.WARNING  # then overlayfs is missing
    _, _, more = mended.mend.partition(":\n")
    assert examined(f"{text}\n{lines}\n{more}", TRANSFER)["labels"].state is State.OK


@pytest.mark.parametrize("value", ["", 'enable_remote_snapshot_annotations = "yes"\n'])
def test_the_transfer_service_sends_no_labels(value: str) -> None:
    finding = examined(snippets()[V2_1].replace(LABELS, value), TRANSFER)["labels"]
    assert finding.state is State.PROBLEM
    assert 'enable_remote_snapshot_annotations = "true"' in finding.mend


def test_an_export_that_containerd_refuses() -> None:
    text = snippets()[V2_1].replace(LABELS, LABELS.replace('"true"', "true"))
    finding = examined(text, TRANSFER)["proxy-plugin"]
    assert finding.state is State.PROBLEM
    assert "no string" in finding.found


# As containerd 2.1.9 says when it starts: "Found ... in CRI config which is incompatible".
LOCAL_PULL = [
    ["use_local_image_pull = true"],
    ["discard_unpacked_layers = true"],
    ["image_pull_with_sync_fs = true"],
    ["max_concurrent_downloads = 5"],
    ["registry.mirrors.'docker.io'.endpoint = ['https://mirror.example']"],
    ["registry.configs.'docker.io'.auth.username = 'alice'"],
    ["registry.auths.'https://docker.io'.username = 'alice'"],
]


@pytest.mark.parametrize("lines", LOCAL_PULL)
def test_cri_pulls_without_the_transfer_service(lines: list[str]) -> None:
    text = with_cri(V2_1, *lines).replace(
        "[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path", "  registry.config_path"
    )
    finding = examined(text, TRANSFER)["labels"]
    assert finding.state is State.PROBLEM
    assert "disable_snapshot_annotations = false" in finding.mend
    labelled = text.replace(IMAGES, IMAGES + "disable_snapshot_annotations = false\n")
    finding = examined(labelled, TRANSFER)["labels"]
    assert finding.state is State.OK
    assert "without the transfer service" in finding.found


def test_the_configuration_for_2_0_serves_2_1() -> None:
    assert examined(snippets()[V2_0], TRANSFER)["labels"].state is State.OK


def test_containerd_2_loses_the_snapshotter_of_version_2_without_runtimes() -> None:
    assert examined(snippets()[V1], TRANSFER)["configuration"].state is State.OK
    assert examined(snippets()[V1], TRANSFER)["snapshotter"].state is State.OK
    text = without(V1, '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes', "runtime_type")
    assert examined(text, NEWER)["snapshotter"].state is State.OK
    findings = examined(text, TRANSFER)
    assert findings["configuration"].state is State.PROBLEM
    assert findings["snapshotter"].state is State.PROBLEM
    assert findings["registry-hosts"].state is State.OK
    _, _, lines = findings["configuration"].mend.partition(":\n")
    assert examined(f"{text}\n{lines}", TRANSFER)["snapshotter"].state is State.OK


def test_imports_merge_in_containerd_2() -> None:
    text = snippets()[V2_1].replace("version = 3", 'version = 3\nimports = ["conf.d/*.toml"]')
    more = {"/etc/containerd/conf.d/a.toml": f"version = 3\n{IMAGES}stats_collect_period = 5\n"}
    findings = examined(text, TRANSFER, more)
    assert "conf.d/a.toml" in findings["configuration"].found
    assert findings["snapshotter"].state is State.OK
    other = {"/etc/containerd/conf.d/a.toml": f'version = 3\n{IMAGES}snapshotter = "overlayfs"\n'}
    assert examined(text, TRANSFER, other)["snapshotter"].state is State.PROBLEM


def test_files_that_import_each_other() -> None:
    text = snippets()[V1].replace("version = 2", 'version = 2\nimports = ["../containerd/*.toml"]')
    assert examined(text, OLD)["configuration"].state is State.OK


def test_an_import_that_is_missing_or_too_new() -> None:
    text = snippets()[V1].replace("version = 2", 'version = 2\nimports = ["other.toml"]')
    assert "/etc/containerd/other.toml" in examined(text, OLD)["configuration"].found
    newer = {"/etc/containerd/other.toml": "version = 3"}
    assert "has version 3" in examined(text, OLD, newer)["configuration"].found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no version"),
        ("version = 1", "version 1"),
        ('disabled_plugins = ["cri"]', "no version"),  # as docker's packages have it
        ("version = 3", "knows 2 at most"),
        ("version = ", "is not TOML"),
        (b"version = 2 # \xff", "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
        ('version = 2\n{{ template "base" . }}\n', "is a template"),
        (
            '{{- if .IsRunningInUserNS }}\nversion = 2\n{{end}}\nroot = {{ printf "%q" .Root }}',
            "tem",
        ),
    ],
)
def test_files_that_cannot_be_used(text: str | bytes, says: str) -> None:
    findings = examined(text, NEWER)
    assert findings["configuration"].state is State.PROBLEM
    assert says in findings["configuration"].found
    assert findings["configuration"].mend
    assert findings["labels"].state is State.SKIPPED


def test_a_file_made_from_a_template_of_k3s() -> None:
    text = textwrap.dedent("""\
        # File generated by k3s. DO NOT EDIT. Use config.toml.tmpl instead.
        version = 3
        imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
        root = "/var/lib/rancher/k3s/agent/containerd"
        [plugins.'io.containerd.cri.v1.images']
          snapshotter = "overlayfs"
          disable_snapshot_annotations = true
          use_local_image_pull = true
        [plugins.'io.containerd.cri.v1.images'.registry]
          config_path = "/var/lib/rancher/k3s/agent/etc/containerd/certs.d"
        """)
    findings = examined(text, TRANSFER)
    states = {name: one.state for name, one in findings.items()}
    assert states["configuration"] is State.OK
    assert states["proxy-plugin"] is states["snapshotter"] is states["labels"] is State.PROBLEM
    assert "use_local_image_pull" in findings["labels"].found
    assert "/etc/containerd/certs.d" in findings["registry-hosts"].mend


def test_no_file() -> None:
    findings = examined("", None, {})
    assert findings["configuration"].state is State.PROBLEM


@pytest.mark.parametrize(("snippet", "version"), ALL)
def test_registries_are_configured_elsewhere(snippet: str, version: Version) -> None:
    other = examined(snippets()[snippet].replace("certs.d", "hosts.d"), version)["registry-hosts"]
    assert other.state is State.WARNING
    assert "hosts.d" in other.found
    several = snippets()[snippet].replace("certs.d", "certs.d:/etc/docker/certs.d")
    assert examined(several, version)["registry-hosts"].state is State.OK
    none = examined(without(snippet, "config_path"), version)["registry-hosts"]
    assert none.state is State.WARNING
    assert 'config_path = "/etc/containerd/certs.d"' in none.mend


def test_registries_in_containerd_s_own_file() -> None:
    line = "registry.mirrors.'docker.io'.endpoint = ['https://mirror.example']"
    text = with_cri(V2_0, line).partition("[plugins.'io.containerd.cri.v1.images'.registry]")[0]
    finding = examined(text, SPLIT)["registry-hosts"]
    assert finding.state is State.WARNING
    assert "mirrors" in finding.found


def test_the_root_that_the_kubelet_watches() -> None:
    text = snippets()[V1].replace('"/var/lib/firstbyte"', '"/mnt/firstbyte"')
    assert examined(text, OLD)["proxy-plugin"].state is State.OK  # which does not read it
    finding = examined(text, NEWER)["proxy-plugin"]
    assert finding.state is State.WARNING
    assert "/mnt/firstbyte" in finding.found


def test_cri_is_disabled() -> None:
    text = f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n{snippets()[V1]}'
    assert examined(text, OLD)["snapshotter"].state is State.WARNING


def test_pods_with_user_namespaces() -> None:
    def of(text: str, version: Version, account: object = Account()) -> State:
        return examined(text, version, served=account)["user-namespaces"].state

    assert of(snippets()[V1], OLD) is State.SKIPPED
    assert of(snippets()[V2_1], TRANSFER) is State.OK
    assert of(without(V2_1, "capabilities"), TRANSFER) is State.WARNING
    assert of(snippets()[V2_1], TRANSFER, Account(idmapped="needs Linux 6.12")) is State.WARNING
    assert of(snippets()[V2_1], TRANSFER, "no daemon runs") is State.SKIPPED


KEYS = st.sampled_from(
    ["version", "imports", "plugins", "proxy_plugins", "firstbyte", "type", "address", "exports",
     "capabilities", "containerd", "registry", "runtimes", "snapshotter", "unpack_config",
     "disabled_plugins", "mirrors", "config_path", "max_concurrent_downloads", "root",
     "disable_snapshot_annotations", '"io.containerd.grpc.v1.cri"', "'io.containerd.cri.v1.images'",
     "'io.containerd.transfer.v1.local'", '"\\u0000\\n\\u001b[2J"']
)  # fmt: skip
SCALARS = st.sampled_from(
    ["1", "2", "3", "4", "true", "false", "nan", "1e400", "-9223372036854775808", "2026-01-01",
     '"snapshot"', '"firstbyte"', '"/run/firstbyte/firstbyte.sock"', '"*"', '"\\u0000"', '""',
     '"/etc/containerd/config.toml"', '"[*"', "[]", "{}", "9" * 5000]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]")
        | st.dictionaries(KEYS, inner, max_size=4).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.dictionaries(KEYS, VALUES, max_size=6).map(
    lambda table: "".join(f"{key} = {value}\n" for key, value in table.items())
)


@settings(max_examples=400)
@given(text=FILES, more=FILES, version=st.sampled_from([OLD, NEWER, SPLIT, TRANSFER, None]))
@example(text='version = 3\nplugins = 5\nproxy_plugins = "x"', more="", version=TRANSFER)
@example(text='version = 2\nimports = ["*"]', more="version = 2\nplugins = []", version=TRANSFER)
def test_any_toml_gives_findings(text: str, more: str, version: Version | None) -> None:
    findings = examined(f"{text}", version, {"/etc/containerd/x.toml": more})
    assert {"configuration", "proxy-plugin", "labels"} <= set(findings)
    assert all(one.found.isprintable() for one in findings.values())


@given(st.binary(max_size=300), st.sampled_from([OLD, TRANSFER, None]))
def test_any_bytes_give_findings(data: bytes, version: Version | None) -> None:
    assert examined(data, version)["configuration"].state is not None


def test_what_is_ok_needs_no_mending() -> None:
    for one in examined(snippets()[V2_1], TRANSFER).values():
        assert bool(one.mend) == (one.state in (State.PROBLEM, State.WARNING))
    assert str(MAIN) in examined(snippets()[V2_1], TRANSFER)["configuration"].found
