"""Judges containerd's configuration: does it use the snapshotter, and tell it what it needs?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snapshotter.doctor import recommended
from snapshotter.doctor.configuration import CRI, CRI_IMAGES, TRANSFER, Configuration, table
from snapshotter.doctor.findings import Finding, ok, problem, skipped, warning
from snapshotter.doctor.recommended import LABELS_EXPORT, REMAP_IDS
from snapshotter.doctor.versions import CONTAINERD_EXPORTS, CONTAINERD_TRANSFER

if TYPE_CHECKING:
    from snapshotter.doctor.recommended import Expected
    from snapshotter.doctor.versions import Version

_DEFAULT_DOWNLOADS = 3  # CRI's max_concurrent_downloads; any other makes it pull by itself


def judge_configuration(
    found: Configuration, expected: Expected, containerd: Version | None, idmap_failure: str | None
) -> list[Finding]:
    """What the settings mean for images. An unknown containerd counts as the newest of its form.

    `idmap_failure` says why ids cannot be mapped on FUSE here; it is empty if they can, and None if
    nobody has tried.
    """
    name = proxy_name(found, expected)
    transfer = found.split and (containerd is None or containerd >= CONTAINERD_TRANSFER)
    return [
        _judge_files(found),
        _judge_proxy(found, expected, name, containerd),
        _judge_snapshotter(found, name or recommended.NAME),
        _judge_labels(found, expected, name or recommended.NAME, transfer=transfer),
        _judge_registry(found, expected),
        _judge_ids(found, name or recommended.NAME, idmap_failure),
    ]


def proxy_name(found: Configuration, expected: Expected) -> str | None:
    """What containerd calls the snapshotter at our address."""
    for name, proxy in found.proxies.items():
        if proxy.get("type") == "snapshot" and _path(proxy) == str(expected.address):
            return name
    return None


def _path(proxy: dict[str, Any]) -> str:
    return str(proxy.get("address", "")).removeprefix("unix://")


def _judge_files(found: Configuration) -> Finding:
    check = "configuration"
    files = ", ".join(map(str, found.files))
    if found.lost_settings:
        lost = ", ".join(map(str, found.lost_settings))
        return problem(
            check,
            f"{lost} is of version 2 and has no table of runtimes: containerd 2 then ignores its "
            "snapshotter",
            f"convert it (containerd config migrate), or add:\n{recommended.runtimes()}",
        )
    return ok(check, f"{files} (version {found.version})")


def _judge_proxy(
    found: Configuration, expected: Expected, name: str | None, containerd: Version | None
) -> Finding:
    check = "proxy-plugin"
    lines = recommended.proxy(expected, name or recommended.NAME, split=found.split)
    if name is None:
        there = found.proxies.get(recommended.NAME)
        if there is None:
            said = f"no proxy plugin has the address {expected.address}"
        elif there.get("type") != "snapshot":
            said = f"the proxy plugin {recommended.NAME} is of type {there.get('type')!r}"
        else:
            said = (
                f"the proxy plugin {recommended.NAME} has the address {there.get('address')!r}, "
                f"the daemon {str(expected.address)!r}"
            )
        return problem(check, said, f"have these lines, then restart containerd:\n{lines}")
    exports = table(found.proxies[name], "exports")
    if not all(isinstance(value, str) for value in exports.values()):
        return problem(
            check,
            f"an export of the proxy plugin {name} is no string, and containerd refuses its file",
            f"put values in quotes:\n{recommended.exports(expected, name, split=found.split)}",
        )
    root = exports.get("root")
    heeded = containerd is None or containerd >= CONTAINERD_EXPORTS
    if heeded and root != str(expected.root):
        return warning(
            check,
            f"{name} exports {'root ' + repr(root) if root else 'no root'}: the kubelet watches "
            f"another disk than that of {expected.root}",
            f"have:\n{recommended.exports(expected, name, split=found.split)}",
        )
    return ok(check, f"{name} at {expected.address}")


def _judge_snapshotter(found: Configuration, name: str) -> Finding:
    check = "snapshotter"
    disabled = found.settings.get("disabled_plugins")
    off = [one for one in (CRI, CRI_IMAGES) if isinstance(disabled, list) and one in disabled]
    if off:
        return warning(
            check,
            f"{off[0]} is disabled: Kubernetes cannot use this containerd, ctr and nerdctl can",
            "for Kubernetes, take it out of disabled_plugins",
        )
    used = found.pulling.get("snapshotter", "overlayfs")
    if used == name:
        return ok(check, f"CRI uses {name}")
    return problem(
        check,
        f"CRI uses {used!r}",
        "have these lines, before the node pulls its first image:\n"
        + recommended.snapshotter(name, split=found.split),
    )


def _judge_labels(
    found: Configuration, expected: Expected, name: str, *, transfer: bool
) -> Finding:
    labelled = found.pulling.get("disable_snapshot_annotations", True) is False
    if not transfer:
        check = "labels"
        if labelled:
            return ok(check, "CRI tells the snapshotter which image a snapshot is of")
        return problem(
            check,
            "CRI does not tell the snapshotter which image a snapshot is of: "
            "disable_snapshot_annotations is not false",
            f"have:\n{recommended.labels(split=found.split)}",
        )
    if reasons := _reasons_for_local_pull(found):
        return _judge_local_pull(found, reasons, labelled=labelled)
    return _judge_transfer(found, expected, name)


def _reasons_for_local_pull(found: Configuration) -> list[str]:
    """Settings with which CRI of containerd 2.1 does not use the transfer service."""
    conf, registry = found.pulling, found.registry
    reasons = [
        f"{key} = true"
        for key in ("use_local_image_pull", "discard_unpacked_layers", "image_pull_with_sync_fs")
        if conf.get(key) is True
    ]
    if conf.get("disable_snapshot_annotations") is False:
        reasons.append("disable_snapshot_annotations = false")
    downloads = conf.get("max_concurrent_downloads", _DEFAULT_DOWNLOADS)
    if downloads != _DEFAULT_DOWNLOADS:
        reasons.append(f"max_concurrent_downloads = {downloads!r}")
    reasons += [f"registry.{key}" for key in ("mirrors", "configs", "auths") if registry.get(key)]
    return reasons


def _judge_local_pull(found: Configuration, reasons: list[str], *, labelled: bool) -> Finding:
    check = "labels"
    because = ", ".join(reasons)
    if labelled:
        return ok(check, f"CRI pulls without the transfer service ({because}), and with labels")
    return problem(
        check,
        f"CRI pulls without the transfer service ({because}), and does not tell the snapshotter "
        "which image a snapshot is of",
        f"take {because} out, or have:\n{recommended.labels(split=True)}",
    )


def _judge_transfer(found: Configuration, expected: Expected, name: str) -> Finding:
    check = "labels"
    configs = found.plugin(TRANSFER).get("unpack_config")
    entries = configs if isinstance(configs, list) else []
    names = [one.get("snapshotter") for one in entries if isinstance(one, dict)]
    if name not in names:
        return problem(
            check,
            f"the transfer service does not know the snapshotter {name}: pulls fail",
            f"have these lines:\n{recommended.unpack(name)}",
        )
    exported = table(found.proxies.get(name, {}), "exports").get(LABELS_EXPORT)
    if exported != "true":
        return problem(
            check,
            "the transfer service does not tell the snapshotter which image a snapshot is of: "
            f'{LABELS_EXPORT} is not "true"',
            f"have:\n{recommended.exports(expected, name, split=True)}",
        )
    if len(set(map(str, names))) == 1:
        return warning(
            check,
            "CRI pulls through the transfer service, with labels; pulls into overlayfs fail: a "
            "list of unpack_config replaces the default",
            f"if somebody needs them, add:\n{recommended.unpack('overlayfs')}",
        )
    return ok(check, "CRI pulls through the transfer service, with labels")


def _judge_registry(found: Configuration, expected: Expected) -> Finding:
    check = "registry-hosts"
    inline = [key for key in ("mirrors", "configs", "auths") if found.registry.get(key)]
    wanted = expected.registry_config_path
    lines = recommended.registry(wanted, split=found.split)
    if inline:
        return warning(
            check,
            f"containerd has {', '.join(inline)} of registries in its own file, which FirstByte "
            "does not read",
            f"move them to {wanted}/HOST/hosts.toml, and have:\n{lines}",
        )
    configured = found.registry.get("config_path")
    if not configured:
        return warning(
            check,
            f"containerd reads no hosts.toml, FirstByte those below {wanted}",
            f"have:\n{lines}",
        )
    # containerd takes several, with colons between them, and uses the first that has the host
    if str(wanted) in str(configured).split(":"):
        return ok(check, f"both read {wanted}")
    return warning(
        check,
        f"containerd reads {configured!r}, FirstByte {str(wanted)!r}",
        f"have:\n{lines}\nor, in /etc/firstbyte/config.toml, config_path below [registry]",
    )


def _judge_ids(found: Configuration, name: str, idmap_failure: str | None) -> Finding:
    check = "user-namespaces"
    if not found.split:
        return skipped(check, "ids are mapped by the kernel from containerd 2.0 on")
    capabilities = found.proxies.get(name, {}).get("capabilities")
    if not isinstance(capabilities, list) or REMAP_IDS not in capabilities:
        return warning(
            check,
            "for pods with user namespaces containerd copies, and so fetches, all of an image",
            f'have, below [proxy_plugins.{name}]:\n  capabilities = ["{REMAP_IDS}"]',
        )
    if idmap_failure is None:
        return skipped(check, "the daemon has not tried whether the kernel can map ids here")
    if idmap_failure:
        return warning(
            check,
            f"pods with user namespaces do not start: {idmap_failure}",
            "if there are such pods, list their images below [images] never in "
            "/etc/firstbyte/config.toml",
        )
    return ok(check, "the kernel maps the ids of pods with user namespaces")
