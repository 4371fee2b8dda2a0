"""What the demo has measured, for people and for scripts."""

from __future__ import annotations

import msgspec


class Lazy(msgspec.Struct, frozen=True, kw_only=True):
    """The lazy start. Times are seconds since `firstbyte mount` was called; what the registry sent
    until the workload was ready, for it and in the background, is in bytes and in requests."""

    mounted_seconds: float
    ready_seconds: float
    fetched_bytes: int
    requests: int
    local_seconds: float


class FullPull(msgspec.Struct, frozen=True, kw_only=True):
    """The start after a full pull. Times are seconds since the pull began."""

    pulled_seconds: float
    ready_seconds: float


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Both starts of one image, over the same link. `image_bytes` is the size of its layers as they
    travel."""

    image: str
    link_mbit: float
    layers: int
    image_bytes: int
    lazy: Lazy
    full_pull: FullPull

    @property
    def ratio(self) -> float:
        """How many times sooner the lazy start was ready."""
        return self.full_pull.ready_seconds / self.lazy.ready_seconds

    def as_json(self) -> str:
        """One JSON object."""
        return msgspec.json.encode({**msgspec.structs.asdict(self), "ratio": self.ratio}).decode()

    def as_text(self) -> str:
        """A few lines."""
        lazy, full = self.lazy, self.full_pull
        share = 100 * lazy.fetched_bytes / self.image_bytes
        rows = [
            ("lazy", "mounted", lazy.mounted_seconds, ""),
            (
                "",
                "ready",
                lazy.ready_seconds,
                f"{_mb(lazy.fetched_bytes)} fetched by then: {share:.0f} % of the image, "
                f"in {lazy.requests} requests",
            ),
            ("", "fully local", lazy.local_seconds, ""),
            ("full pull", "pulled", full.pulled_seconds, ""),
            ("", "ready", full.ready_seconds, ""),
        ]
        table = (
            f"  {way:<10} {what:<12} after {seconds:6.2f} s   {remark}".rstrip()
            for way, what, seconds, remark in rows
        )
        return "\n".join(
            [
                f"{self.image}: {self.layers} layers, {_mb(self.image_bytes)} compressed, "
                f"over {self.link_mbit:g} Mbit/s",
                "",
                *table,
                "",
                f"The workload was ready {self.ratio:.1f} times sooner.",
            ]
        )


def _mb(amount: int) -> str:
    return f"{amount / 1e6:.1f} MB"
