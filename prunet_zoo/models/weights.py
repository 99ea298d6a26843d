"""Weights on disk: safetensors with the spec in the metadata, written atomically, loaded strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import write_atomic
from prunet_zoo.spec import NetSpec

# wrappers that put their attribute's name before every key: MMEngine's classifier and detectors, DDP
_PREFIXES = ("", "net.", "backbone.", "module.", "module.net.", "module.backbone.", "model.")


def save_weights(path: str | Path, state: Mapping[str, torch.Tensor], spec: NetSpec, **meta: Any) -> None:
    """Write ``state`` to a safetensors file with ``spec`` (and any further ``meta``) in its metadata."""
    header = {"format": "pt", "spec": json.dumps(spec.to_dict()), **{k: json.dumps(v) for k, v in meta.items()}}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_atomic(path, _sorted_header(safetensors_bytes(tensors, header)))


def _sorted_header(data: bytes) -> bytes:
    """Sort the keys of a safetensors header: the library writes metadata in random order, equal weights should be equal
    files. The layout is 8 bytes of header length (little-endian), the JSON header padded with blanks, the tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def load_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors`` file or of a torch checkpoint (``weights_only``, never code).

    Raises:
        CheckpointError: missing, truncated, or a pickle with anything but tensors and plain records.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(str(path), framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights file {path} is damaged or truncated: {error}") from None
    data = load_torch(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
            break
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise CheckpointError(f"weights file {path} holds no state dict")
    return dict(data)


def load_torch(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU (``weights_only``, never code).

    Raises:
        CheckpointError: missing, truncated, or a pickle with anything but tensors and plain records.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"weights file {path} is damaged or truncated: {reason}") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile file provokes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"weights file {path} is not a plain tensor checkpoint: {reason}") from None


def read_weights_spec(path: str | Path) -> NetSpec:
    """The `NetSpec` that a safetensors file carries; raises `CheckpointError` where there is none."""
    if not Path(path).is_file():
        raise CheckpointError(f"weights file {path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights file {path} is damaged or truncated: {error}") from None
    if "spec" not in meta:
        raise CheckpointError(f"weights file {path} carries no spec; give the spec's JSON as arch and this as weights")
    try:
        return NetSpec.from_dict(json.loads(meta["spec"]))
    except ValueError as error:  # JSONDecodeError and SpecError
        raise CheckpointError(f"weights file {path} carries a damaged spec: {error}") from None


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, torch.Tensor],
    prefix: str | None = None,
    skip: Iterable[str] = (),
    origin: str | Path | None = None,
) -> list[str]:
    """Copy weights into ``model``: every tensor of the model must be there with its shape.

    Args:
        model: a classifier or a backbone; a classifier's file also fits a backbone (its tail and head are left out).
        source: a file or a state dict.
        prefix: what stands before each name in ``source``; None finds it.
        skip: name beginnings in the model that are not to be loaded (a head for other classes).
        origin: where a state dict is from, for messages.

    Returns:
        Names that were loaded.

    Raises:
        CheckpointError: something is missing or of another shape; the first few are named.
    """
    state = dict(source) if isinstance(source, Mapping) else load_state(source)
    origin = origin or ("the given state dict" if isinstance(source, Mapping) else str(source))
    skip = tuple(skip)
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(skip)} if skip else model.state_dict()
    prefixes = _PREFIXES if prefix is None else (prefix,)
    found = max(prefixes, key=lambda p: sum(p + name in state for name in wanted))
    missing = [name for name in wanted if found + name not in state]
    if len(missing) == len(wanted):
        tried = " or ".join(repr(p) for p in prefixes)
        raise CheckpointError(
            f"no tensor in {origin} fits with prefix {tried}; it has {_few(state)}, wanted {_few(wanted)}"
        )
    if missing:
        raise CheckpointError(f"{origin} lacks {len(missing)} of {len(wanted)} tensors: {_few(missing)}")
    wrong = [n for n in wanted if state[found + n].shape != wanted[n].shape]
    if wrong:
        shapes = ", ".join(f"{n}: {list(state[found + n].shape)}, not {list(wanted[n].shape)}" for n in wrong[:3])
        raise CheckpointError(f"{origin} does not fit ({len(wrong)} tensors of another shape): {shapes}")
    model.load_state_dict({name: state[found + name] for name in wanted}, strict=not skip)
    return list(wanted)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")
