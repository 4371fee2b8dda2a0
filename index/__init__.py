"""File indexes: build them, open them, read them. docs/python.md shows how."""

from index.build import IndexBuilder, build
from index.errors import FirstByteError
from index.file import FileIndex
from index.layer import LayerScan, LayerScanner
from index.resolve import resolve
from index.tables import Codec, LayerTable

__all__ = [
    "Codec",
    "FileIndex",
    "FirstByteError",
    "IndexBuilder",
    "LayerScan",
    "LayerScanner",
    "LayerTable",
    "build",
    "resolve",
]
