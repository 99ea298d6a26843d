"""Where weights lie: ``$PRUNET_HOME``, else ``checkpoints/`` of the repository, else the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from prunet_zoo.errors import PrunetError

_ROOT = Path(__file__).resolve().parents[2]  # the repository, where the package is imported from a checkout


def repository() -> Path | None:
    """The repository that the package is imported from; None for an installed wheel."""
    return _ROOT if (_ROOT / "setup.py").is_file() and (_ROOT / "checkpoints").is_dir() else None


class FolderError(PrunetError, OSError):
    """A folder that was named cannot be used, whatever is in it."""


def weights_home() -> Path:
    """The folder that downloads go to; it need not exist yet.

    Raises:
        FolderError: it cannot exist, is no folder, or is another user's; the message names the variable.
    """
    given = os.environ.get("PRUNET_HOME")
    if given:
        return _checked(expand_user(given, "$PRUNET_HOME"), f"$PRUNET_HOME is {given!r}, which")
    root = repository()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = root / "checkpoints" if root is not None else expand_user(cache, "the cache folder") / "prunet_zoo"
    return _checked(home, f"the folder for weights, {home},")


def expand_user(path: str, what: str) -> Path:
    """``path`` with the home folder of a user for a ``~`` at its beginning.

    Raises:
        FolderError: there is no such user; ``what`` is named as what has the path.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FolderError(
            f"{what} is {path!r}, but the home folder of that user is not known; write the whole path"
        ) from None


def _checked(folder: Path, what: str) -> Path:
    try:
        os.stat(os.path.join(folder, "."))  # with the dot, what lies in it must be reachable too
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise FolderError(
            f"{what} cannot be used: {error.strerror or error}; name another folder by $PRUNET_HOME"
        ) from None
    return folder


def shared_folder(name: str) -> Path:
    """A folder of the repository (``configs``, ``checkpoints``) as it comes with the package, in a checkout or a wheel.

    The wheel keeps them in ``prunet_zoo/.mim/``, where OpenMMLab's tools look.
    """
    root = repository()
    return root / name if root is not None else _ROOT / "prunet_zoo" / ".mim" / name
