"""What can go wrong at an export."""

from __future__ import annotations

from prunet_zoo.errors import PrunetError


class ExportError(PrunetError, RuntimeError):
    """A network could not be exported, or the exported file computes something else."""
