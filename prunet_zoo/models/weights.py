"""Weights on disk: safetensors with the spec in the metadata, written atomically, loaded strictly."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from prunet_zoo.errors import CheckpointError, few
from prunet_zoo.files import write_atomic
from prunet_zoo.metadata import read_metadata
from prunet_zoo.models.rep import RepBlock, misfit_of_form
from prunet_zoo.spec import Frozen, NetSpec

_CONVERT = "python tools/convert.py SRC --arch NAME --out OUT"
# wrappers that put their attribute's name before every key: MMEngine's classifier and detectors, DDP
_PREFIXES = ("", "net.", "backbone.", "module.", "module.net.", "module.backbone.", "model.")


def save_weights(path: str | Path, state: Mapping[str, torch.Tensor], spec: Frozen, **meta: Any) -> None:
    """Write ``state`` to a safetensors file with ``spec``, a `NetSpec` or `PrunedSpec`, and any further ``meta`` in its
    metadata."""
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
        advice = f"; a published zip is converted by {_CONVERT}" if zipfile.is_zipfile(path) else ""
        raise CheckpointError(f"weights file {path} is damaged or truncated: {reason}{advice}") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile file provokes
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {named[1]}" if named else (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"weights file {path} is not a plain tensor checkpoint: {reason}; a published or timm's training "
            f"checkpoint is converted by {_CONVERT}"
        ) from None


def read_weights_spec(path: str | Path) -> NetSpec:
    """The `NetSpec` that a safetensors file carries; raises `CheckpointError` where there is none."""
    meta = read_metadata(path)
    if "spec" not in meta:
        raise CheckpointError(f"weights file {path} carries no spec; give the spec's JSON as arch and this as weights")
    try:
        data = json.loads(meta["spec"])
        other = NetSpec.of_another_kind(data) if isinstance(data, dict) else None
        if other is not None:
            raise CheckpointError(f"the spec in weights file {path} {other}")
        return NetSpec.from_dict(data)
    except CheckpointError:
        raise
    except ValueError as error:  # JSONDecodeError and SpecError
        raise CheckpointError(f"weights file {path} carries a damaged spec: {error}") from None


class Misfit(NamedTuple):
    """How tensors differ from those that are wanted, by name; ``any(misfit)`` tells whether they do."""

    missing: list[str]
    left_over: list[str]
    wrong: list[str]  # there, but of another shape


def compare(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> Misfit:
    """Compare the shapes that are wanted with those that are there, each by name."""
    return Misfit(
        missing=[name for name in wanted if name not in found],
        left_over=[name for name in found if name not in wanted],
        wrong=[name for name, shape in wanted.items() if name in found and tuple(found[name]) != tuple(shape)],
    )


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def is_published(names: Iterable[str]) -> bool:
    """Whether tensors bear the names of the published checkpoints: ``network.…``, also with ``module.`` before it."""
    return any(name.removeprefix("module.").startswith("network.") for name in names)


def advise_published(names: Iterable[str]) -> str:
    """What a message about a checkpoint that does not fit adds where it is a published one; else nothing."""
    return f"; these are a published checkpoint's names: convert it by {_CONVERT}" if is_published(names) else ""


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
    there = {name: state[found + name] for name in wanted if found + name in state}
    if len(there) < len(wanted):
        check_form(model, state, prefixes, origin)
    if not there:
        tried = " or ".join(repr(p) for p in prefixes)
        advice = advise_published(state)
        if prefix is not None and any(p + name in state for p in _PREFIXES for name in wanted):
            advice = "; leave prefix out, so that it is found"
        raise CheckpointError(
            f"no tensor in {origin} fits with prefix {tried}; it has {few(state)}, wanted {few(wanted)}{advice}"
        )
    missing, _, wrong = compare(shapes(wanted), shapes(there))
    if missing:
        raise CheckpointError(f"{origin} lacks {len(missing)} of {len(wanted)} tensors: {few(missing)}")
    if wrong:
        shown = ", ".join(f"{n}: {list(there[n].shape)}, not {list(wanted[n].shape)}" for n in wrong[:3])
        raise CheckpointError(f"{origin} does not fit ({len(wrong)} tensors of another shape): {shown}")
    model.load_state_dict(there, strict=not skip)
    return list(wanted)


def check_form(
    model: nn.Module, names: Iterable[str], prefixes: Iterable[str] = _PREFIXES, origin: str | Path = "the checkpoint"
) -> None:
    """Raise `CheckpointError` where rep blocks are deployed in the network and not in the weights, or the reverse.

    Args:
        model: the network.
        names: of the tensors that are to be loaded.
        prefixes: what may stand before the network's own names.
        origin: where the tensors are from.
    """
    names = set(names)
    for name, module in model.named_modules():
        if isinstance(module, RepBlock):
            for prefix in prefixes:
                reason = misfit_of_form(module, names, f"{prefix}{name}.")
                if reason is not None:
                    raise CheckpointError(f"{origin} does not fit: {reason}")
