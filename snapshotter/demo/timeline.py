"""What the demo has measured, for people and for scripts."""

from __future__ import annotations

import msgspec


class Lazy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The lazy start. Times are seconds since `firstbyte mount` was called (`mounted_seconds` is
    there), `firstbyte podman add` was (`added_seconds`), or since containerd was asked to pull
    (`pulled_seconds`). `fetched_bytes` and
    `requests` are all that the registry sent until the workload was ready; `needed_bytes` is the
    part that the workload waited for, the rest came in the background meanwhile."""

    mounted_seconds: float | None = None
    added_seconds: float | None = None
    pulled_seconds: float | None = None
    ready_seconds: float
    needed_bytes: int
    fetched_bytes: int
    requests: int
    local_seconds: float


class FullPull(msgspec.Struct, frozen=True, kw_only=True):
    """The start after a full pull. Times are seconds since the pull began."""

    pulled_seconds: float
    ready_seconds: float


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Both starts of one image, by the same `runtime` and over the same link. `image_bytes` is the
    size of its layers as they travel."""

    image: str
    runtime: str
    link_mbit: float
    layers: int
    image_bytes: int
    lazy: Lazy
    full_pull: FullPull

    @property
    def ratio(self) -> float:
        """How many times sooner the lazy start was ready."""
        return self.full_pull.ready_seconds / self.lazy.ready_seconds

    def _share(self, amount: int) -> str:
        return f"{_mb(amount)} ({100 * amount / self.image_bytes:.0f} % of the image)"

    def as_json(self) -> str:
        """One JSON object."""
        return msgspec.json.encode({**msgspec.structs.asdict(self), "ratio": self.ratio}).decode()

    def as_text(self) -> str:
        """A few lines."""
        lazy, full = self.lazy, self.full_pull
        provided = [
            ("lazy", what, seconds, "")
            for what, seconds in (
                ("mounted", lazy.mounted_seconds),
                ("added", lazy.added_seconds),
                ("pulled", lazy.pulled_seconds),
            )
            if seconds is not None
        ]
        rows: list[tuple[str, str, float | None, str]] = [
            *provided,
            (
                "",
                "ready",
                lazy.ready_seconds,
                f"{self._share(lazy.needed_bytes)} were waited for",
            ),
            (
                "",
                "",
                None,
                f"{self._share(lazy.fetched_bytes)} fetched, in {lazy.requests} requests",
            ),
            ("", "fully local", lazy.local_seconds, ""),
            ("full pull", "pulled", full.pulled_seconds, ""),
            ("", "ready", full.ready_seconds, ""),
        ]
        table = (
            f"  {way:<10} {what:<12} {_after(seconds)}   {remark}".rstrip()
            for way, what, seconds, remark in rows
        )
        return "\n".join(
            [
                f"{self.image}: {self.layers} layers, {_mb(self.image_bytes)} compressed, "
                f"over {self.link_mbit:g} Mbit/s, started by {self.runtime}",
                "",
                *table,
                "",
                f"The workload was ready {self.ratio:.1f} times sooner.",
            ]
        )


def _after(seconds: float | None) -> str:
    return f"after {seconds:6.2f} s" if seconds is not None else " " * len("after 123.45 s")


def _mb(amount: int) -> str:
    return f"{amount / 1e6:.1f} MB"
