"""What runs: versions, sockets, plugins, and what the daemon has served."""

from __future__ import annotations

import stat

import pytest

from snapshotter.doctor.findings import State
from snapshotter.doctor.recommended import LABELS_EXPORT
from snapshotter.doctor.running import SNAPSHOTTER_TYPE, Plugin, Socket
from snapshotter.doctor.versions import Version
from tests.doctor.documented import V1, V2_1, snippets
from tests.doctor.nodes import OLD, TRANSFER, Account, Fallen, examined

WITHOUT_EXPORTS = [Plugin(SNAPSHOTTER_TYPE, "firstbyte")]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1", Version(1, 6, 20)),
        ("containerd github.com/containerd/containerd/v2 2.1.9+unknown ", Version(2, 1, 9)),
        ("containerd github.com/containerd/containerd/v2 v2.0.0-rc.1 b2", Version(2, 0, 0)),
        (
            "containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da",
            Version(1, 7, 27),
        ),
        ("v2.1.4-k3s1", Version(2, 1, 4)),
        ("6.18.44-fc-v595", Version(6, 18, 44)),
        ("6.12-custom", Version(6, 12)),
        ("unknown", None),
    ],
)
def test_versions(text: str, version: Version | None) -> None:
    assert Version.find(text) == version


def test_an_old_containerd() -> None:
    findings = examined(snippets()[V1], Version(1, 5, 9))
    assert findings["containerd"].state is State.PROBLEM


@pytest.mark.parametrize(
    ("socket", "state", "says"),
    [
        (None, State.PROBLEM, "does not exist"),
        (Socket(stat.S_IFREG | 0o600, 0), State.PROBLEM, "is no socket"),
        (Socket(stat.S_IFSOCK | 0o600, 1000), State.PROBLEM, "user 1000"),
        (Socket(stat.S_IFSOCK | 0o666, 0), State.WARNING, "0666"),
        (Socket(stat.S_IFSOCK | 0o600, 0), State.OK, "root alone"),
    ],
)
def test_the_daemon_s_socket(socket: Socket | None, state: State, says: str) -> None:
    finding = examined(snippets()[V2_1], TRANSFER, socket=socket)["socket"]
    assert finding.state is state
    assert says in finding.found


def test_a_daemon_that_does_not_answer() -> None:
    findings = examined(snippets()[V2_1], TRANSFER, answer_failure="nothing listens")
    assert findings["daemon"].state is State.PROBLEM
    findings = examined(snippets()[V2_1], TRANSFER, answer_failure="no", socket=None)
    assert findings["daemon"].state is State.SKIPPED


def test_containerd_has_not_loaded_the_plugin() -> None:
    def of(plugins: list[Plugin] | str) -> tuple[State, str]:
        finding = examined(snippets()[V2_1], TRANSFER, plugins=plugins)["plugin-loaded"]
        return finding.state, finding.found

    assert of("nothing listens")[0] is State.SKIPPED
    assert of([Plugin(SNAPSHOTTER_TYPE, "overlayfs")]) == (
        State.PROBLEM,
        "containerd has no snapshotter firstbyte",
    )
    broken = Plugin(SNAPSHOTTER_TYPE, "firstbyte", error="no such address")
    assert of([broken])[0] is State.PROBLEM
    cri = Plugin("io.containerd.grpc.v1", "cri", error='failed to find snapshotter "firstbyte"')
    loaded = Plugin(SNAPSHOTTER_TYPE, "firstbyte", exports={LABELS_EXPORT: "true"})
    state, said = of([loaded, cri])
    assert state is State.PROBLEM
    assert "io.containerd.grpc.v1.cri did not load (failed to find" in said
    # plugins that have nothing to do with us fail on most nodes
    other = Plugin(SNAPSHOTTER_TYPE, "zfs", error="path is not on zfs")
    old = examined(snippets()[V1], OLD, plugins=[*WITHOUT_EXPORTS, other])["plugin-loaded"]
    assert old.state is State.OK


def test_containerd_was_not_restarted() -> None:
    finding = examined(snippets()[V2_1], TRANSFER, plugins=WITHOUT_EXPORTS)["plugin-loaded"]
    assert finding.state is State.PROBLEM
    assert "restart" in finding.mend


@pytest.mark.parametrize(
    ("account", "state", "says"),
    [
        ("no daemon runs in /run/firstbyte", State.SKIPPED, "no daemon runs"),
        (Account(lazy_layers=0), State.SKIPPED, "no image has been pulled yet"),
        (Account(), State.OK, "5 layers lazy, 0 ordinary"),
        (Account(ordinary_layers=9), State.OK, "9 ordinary"),
        (Account(without_labels=3), State.WARNING, "3 came without"),
        (Account(lazy_layers=0, without_labels=3), State.PROBLEM, "without the labels"),
    ],
)
def test_what_has_been_served(account: Account | str, state: State, says: str) -> None:
    finding = examined(snippets()[V2_1], TRANSFER, served=account)["images"]
    assert finding.state is state
    assert says in finding.found


def test_nothing_pulled_yet_names_a_command_to_try() -> None:
    finding = examined(snippets()[V2_1], TRANSFER, served=Account(lazy_layers=0))["images"]
    assert "crictl pull" in finding.mend


def test_images_that_were_not_lazy_are_named() -> None:
    fallen = Fallen("registry.example/app:1", "registry", "access denied")
    unnamed = Fallen("", "no-labels", "containerd sends no image labels")
    account = Account(fallbacks=(unnamed, fallen))
    finding = examined(snippets()[V2_1], TRANSFER, served=account)["fallback"]
    assert finding.state is State.WARNING
    assert "registry.example/app:1" in finding.found
    assert "access denied" in finding.found


def test_the_node() -> None:
    findings = examined(
        snippets()[V2_1],
        TRANSFER,
        fuse=False,
        overlay_failure="Invalid argument",
        kernel=Version(5, 15),
    )
    assert findings["fuse"].state is State.PROBLEM
    assert findings["overlayfs"].state is State.PROBLEM
    assert "Invalid argument" in findings["overlayfs"].found
    assert "6.12" in findings["kernel"].found
    assert examined("", None, kernel=None)["kernel"].state is State.SKIPPED
    assert examined("", None, overlay_tried=False)["overlayfs"].state is State.SKIPPED
