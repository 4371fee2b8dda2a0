"""From the layers of an image to its file index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from index import format as fbx
from index.erofs import writer
from index.file import FileIndex
from index.layer import LayerScanner
from index.merge import Merger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from index.entry import Entry
    from index.layer import LayerScan


class IndexBuilder:
    """Merges scanned layers, lowest first, into one file index.

    The result depends on the layers' blobs alone: the same image gives the same bytes in every
    section, on any machine.
    """

    def __init__(self) -> None:
        self._merger = Merger()
        self._scans: list[LayerScan] = []

    def add(self, scan: LayerScan, entries: Iterable[Entry]) -> None:
        """Put the next layer on top. Raises TarError if its entries cannot be applied."""
        self._merger.apply(len(self._scans), entries)
        self._scans.append(scan)

    def finish(self) -> FileIndex:
        """Raise UnsupportedError if the tree holds what an EROFS image cannot."""
        tables = [scan.table for scan in self._scans]
        tree = writer.write(self._merger.finish(), [table.raw_size for table in tables])
        content = fbx.lay_out(tree, tables, [scan.windows for scan in self._scans])
        return FileIndex(fbx.write_expanded(content))


def build(blobs: Iterable[Iterable[bytes]]) -> FileIndex:
    """Build the file index of an image from its layers' blobs, lowest first, each in pieces."""
    builder = IndexBuilder()
    for blob in blobs:
        scanner = LayerScanner()
        entries: list[Entry] = []
        for piece in blob:
            entries += scanner.feed(piece)
        scan = scanner.finish()
        builder.add(scan, entries)
    return builder.finish()
