"""File indexes: build them, open them, read them. docs/python.md shows how."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from index.builder import IndexBuilder, build
    from index.errors import FirstByteError
    from index.file import FileIndex
    from index.layer import LayerScan, LayerScanner
    from index.resolver import resolve
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

# Name to module. Each is imported when it is asked for: all of them take as long as the rest of
# `firstbyte status`, which asks for errors alone.
_MODULES = {
    "Codec": "index.tables",
    "FileIndex": "index.file",
    "FirstByteError": "index.errors",
    "IndexBuilder": "index.builder",
    "LayerScan": "index.layer",
    "LayerScanner": "index.layer",
    "LayerTable": "index.tables",
    "build": "index.builder",
    "resolve": "index.resolver",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
