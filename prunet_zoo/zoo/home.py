"""Where weights lie: ``$PRUNET_HOME``, else ``checkpoints/`` of the repository, else the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]  # the repository, where the package is imported from a checkout


def repository() -> Path | None:
    """The repository that the package is imported from; None for an installed wheel."""
    return _ROOT if (_ROOT / "setup.py").is_file() and (_ROOT / "checkpoints").is_dir() else None


def weights_home() -> Path:
    """The folder that downloads go to; it need not exist yet."""
    if os.environ.get("PRUNET_HOME"):
        return Path(os.environ["PRUNET_HOME"]).expanduser()
    root = repository()
    if root is not None:
        return root / "checkpoints"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "prunet_zoo"


def shared_folder(name: str) -> Path:
    """A folder of the repository (``configs``, ``checkpoints``) as it comes with the package, in a checkout or a wheel.

    The wheel keeps them in ``prunet_zoo/.mim/``, where OpenMMLab's tools look.
    """
    root = repository()
    return root / name if root is not None else _ROOT / "prunet_zoo" / ".mim" / name
