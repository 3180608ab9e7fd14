"""The error of everything under `kvsink.export`: what cannot be exported or run, and what to do instead."""

from __future__ import annotations

from kvsink.errors import KvsinkError

__all__ = ["ExportError"]


class ExportError(KvsinkError):
    """A model, an option, a file or a cache that the exporter or its runner cannot take."""
