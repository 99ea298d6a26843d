"""The state dict of a checkpoint file from elsewhere: a zip around it, torch's two formats, safetensors; never code."""

from __future__ import annotations

import argparse
import re
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import sha256_of
from prunet_zoo.zoo.archive import MAX_BYTES, check_torch_zip, find_member, is_torch_zip, open_zip, unpack
from prunet_zoo.zoo.pickles import check_pickles

_LOADING = threading.Lock()
KEYS = ("state_dict_ema", "state_dict", "model")  # of a training checkpoint, averaged weights first
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before its zip format
_TEXT = re.compile(rb"^\s*(<!doctype|<html|<\?xml|\{|version https://git-lfs)", re.IGNORECASE)


def read_checkpoint(source: str | Path, member: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a zip with one checkpoint in it, a torch checkpoint (both formats) or safetensors.

    Args:
        source: the file; its kind is told by its content, not by its name.
        member: name of the checkpoint inside a zip; where it is not there, the only checkpoint is taken.

    Returns:
        Copies in memory, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, too large, holds code or no state dict.
        WriteError: there is no space for the unpacked file.
    """
    path = Path(source)
    begin = _first_bytes(path)
    if begin[:4] not in _ZIP:
        return _read_plain(path, begin)
    with open_zip(path) as archive:
        if is_torch_zip(archive):
            check_torch_zip(path, archive)
            return _load_torch(path, mapped=True)
        with _unpacked(path, archive, member) as (inner, name):
            try:
                return _read_member(inner)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(inner), f"{path}: entry {name!r}")) from None


def checkpoint_sha256(source: str | Path, member: str | None = None) -> str:
    """sha256 of the checkpoint itself: of what is in the zip, which says the same however it was packed.

    Raises:
        CheckpointError, WriteError: as `read_checkpoint`, as far as the file is not what it seems.
    """
    path = Path(source)
    if _first_bytes(path)[:4] not in _ZIP:
        return sha256_of(path)
    with open_zip(path) as archive:
        if is_torch_zip(archive):
            return sha256_of(path)
        with _unpacked(path, archive, member) as (inner, _):
            return sha256_of(inner)


@contextmanager
def _unpacked(path: Path, archive: zipfile.ZipFile, member: str | None) -> Iterator[tuple[Path, str]]:
    """The checkpoint in a zip as a temporary file, and the name of its entry."""
    entry = find_member(path, archive, member)
    with tempfile.TemporaryDirectory(prefix="prunet_zoo_") as folder:
        inner = Path(folder) / "checkpoint"
        unpack(path, archive, entry, inner)
        yield inner, entry.filename


def _read_member(path: Path) -> dict[str, torch.Tensor]:
    """What lies in the zip: a torch checkpoint or safetensors, but no zip of another kind."""
    begin = _first_bytes(path)
    if begin[:4] not in _ZIP:
        return _read_plain(path, begin)
    with open_zip(path) as archive:
        if not is_torch_zip(archive):
            raise CheckpointError(f"{path} is a zip inside a zip and no torch checkpoint; unpack the outer one")
        check_torch_zip(path, archive)
    return _load_torch(path, mapped=True)


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not a file")
    try:
        with open(path, "rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    if not begin:
        raise CheckpointError(f"checkpoint {path} is empty; get it again")
    return begin


def _read_plain(path: Path, begin: bytes) -> dict[str, torch.Tensor]:
    """A file that is no zip, by its first bytes."""
    if begin.startswith(_LEGACY):
        if tarfile.is_tarfile(path):  # torch before 2.6 would run code from such a file
            raise CheckpointError(f"{path} is a tar archive that looks like a torch checkpoint; it is refused")
        return _load_torch(path, mapped=False)
    if begin[8:9] == b"{":
        return _load_safetensors(path)
    if _TEXT.match(begin):
        kind = "a text, such as the error page of a server,"
    elif begin[:1] == b"\x80":
        kind = "a pickle that torch.save did not write: it can hold code and is not opened; it"
    else:
        kind = "of an unknown kind; it"
    raise CheckpointError(
        f"{path} is {kind} and no checkpoint; it begins with {begin[:24]!r}. Expected: a zip with a checkpoint in it, "
        "a file of torch.save, or safetensors"
    )


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return _copied(path, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is safetensors, but damaged or truncated: {error}") from None


def _load_torch(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    """Load a file of torch.save without running code, and without taking more memory than a few times its size.

    ``mapped``: in the zip format torch believes the sizes that the pickle declares, beyond the data that is there.
    Mapped into memory, a tensor cannot reach beyond the file. The older format reads each tensor's bytes.
    """
    _check_pickles(path, in_zip=mapped)
    try:
        with _allowed_classes():
            data = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a hostile or damaged file provokes
        raise CheckpointError(f"{path} {_reason(error)}") from None
    return _copied(path, pick_state(data, str(path)))


def _check_pickles(path: Path, in_zip: bool) -> None:
    """Look at the pickles of a file of torch.save before torch does."""
    if not in_zip:
        with open(path, "rb") as file:  # magic number, version, system, data, keys of the storages that follow
            check_pickles(file, str(path), count=5)
        return
    with open_zip(path) as archive:
        for name in archive.namelist():
            if name.lower().endswith("/data.pkl"):  # torch does not tell capitals apart
                with archive.open(name) as entry:
                    check_pickles(entry, str(path))


def pick_state(data: Any, where: str) -> dict[str, torch.Tensor]:
    """The state dict of a loaded checkpoint: under the first of `KEYS` that is there, else the data itself.

    Raises:
        CheckpointError: there are no tensors by name, or something else among them.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where} holds a {type(data).__name__}, not a state dict (tensors by name)")
    key = next((k for k in KEYS if data.get(k) is not None and not isinstance(data[k], torch.Tensor)), None)
    state = data if key is None else data[key]
    place = where if key is None else f"{where}, key {key!r},"
    if not isinstance(state, Mapping) or not state:
        what = "nothing" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise CheckpointError(f"{place} holds {what}, not a state dict (tensors by name)")
    odd = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if odd:
        kinds = f"{odd[0]!r:.60} is a {type(state[odd[0]]).__name__}"
        raise CheckpointError(f"{place} is no state dict: {len(odd)} of {len(state)} values are not tensors ({kinds})")
    return dict(state)


def _copied(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that do not depend on the file; sizes are checked before any memory is taken."""
    total = 0
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} is sparse, quantized or without data")
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > tensor.untyped_storage().nbytes() or total > MAX_BYTES:
            raise CheckpointError(
                f"{path}: tensor {name!r} of {list(tensor.shape)} is larger than the data in the file"
            )
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _reason(error: Exception) -> str:
    """Why torch did not load a file, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Weights only load failed", "Please file"))] or lines
    detail = lines[0][:200] if lines else "no reason given"
    return f"is damaged, truncated or no plain checkpoint ({type(error).__name__}: {detail})"


@contextmanager
def _allowed_classes() -> Iterator[None]:
    """Let torch's ``weights_only`` loader accept, in this scope, what training checkpoints hold besides tensors: the
    arguments of timm's training script (`argparse.Namespace`, plain attributes) and numpy's numbers; nothing else.

    torch keeps one list for the process: threads take turns, and a foreign `torch.load` meanwhile sees the short list.
    """
    serialization: Any = torch.serialization
    with _LOADING:
        before = list(serialization.get_safe_globals())
        # not torch's own context manager: torch 2.4 has none; with it, what others allowed (MMEngine's classes) would
        # be allowed here too, and what both of us allow would be forbidden afterwards
        serialization.clear_safe_globals()
        serialization.add_safe_globals([argparse.Namespace, *_numpy_numbers()])
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


def _numpy_numbers() -> list[Any]:
    """What a pickled numpy number refers to: its type and ``scalar``, under the names of numpy 1 and 2."""

    def number(dtype: Any, raw: bytes) -> Any:
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(raw, bytes):
            raise ValueError(f"a checkpoint may hold numpy's numbers, not {dtype!r}")
        return np.frombuffer(raw, dtype, count=1)[0]

    kinds = [type(np.dtype(kind)) for kind in ("?", "u1", "i4", "i8", "f2", "f4", "f8")]
    return [np.dtype, *kinds, *(_named(number, f"{package}.multiarray") for package in ("numpy._core", "numpy.core"))]


def _named(function: Callable[[Any, bytes], Any], module: str) -> Callable[[Any, bytes], Any]:
    """``function`` under the name ``scalar`` of ``module``, by which a pickle refers to it."""

    def scalar(dtype: Any, raw: bytes) -> Any:
        return function(dtype, raw)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar
