"""Synthetic checkpoints of exactly the published names and shapes: random weights, random BatchNorm statistics.

    state = synthetic_state("prunet_p0")                      # published names
    write_zip("prunet_p0", state, folder / "any.zip")         # as published: a zip with one checkpoint in it

They are no networks that know anything; signals neither die nor explode, and every detail (eps, padding, activation,
SE) shows in the logits.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from reference import State, published


def synthetic_state(name: str, seed: int = 0) -> State:
    """Random tensors by published name."""
    shapes = {key: tuple(shape) for key, (_, shape) in published(name)["state_dict"].items()}
    return random_state(shapes, seed)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random tensors of given names (published or ours) and shapes.

    Variances are log-uniform from 1e-3 to 1, so that an eps of 1e-3 or 1e-5 makes a difference; scales go with their
    roots, so that signals keep their size.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for key, shape in shapes.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked":
            state[key] = torch.tensor(1000 + len(state))
        elif leaf == "running_var":
            state[key] = 10 ** (torch.rand(shape, generator=generator) * 3 - 3)
        elif leaf == "running_mean" or leaf == "bias":
            state[key] = torch.randn(shape, generator=generator) * 0.3
        elif f"{module}.running_var" in shapes:
            state[key] = torch.rand(shape, generator=generator) + 0.5
        else:  # of a convolution or the classifier
            fan_in = max(1, torch.Size(shape[1:]).numel())
            state[key] = torch.randn(shape, generator=generator) * (1.5 / fan_in) ** 0.5
    for key in state:
        if key.endswith(".running_var"):
            state[key.replace("running_var", "weight")] *= state[key].sqrt() * 0.9
    return state


def training_checkpoint(state: State, **extra: Any) -> dict[str, Any]:
    """What timm's training script saves, with ``state`` as the averaged weights of a network under DDP."""
    some = next(iter(state.values()))
    return {
        "epoch": 449,
        "arch": "gpunet",
        "version": 2,
        "args": argparse.Namespace(lr=0.1, model="gpunet", mean=None, opt_betas=[0.9, 0.99], amp=True),
        "metric": 78.9,
        "optimizer": {"state": {0: {"step": 5, "square_avg": torch.zeros_like(some)}}, "param_groups": [{"lr": 0.1}]},
        "amp_scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "state_dict": {f"module.{key}": torch.zeros(()).expand(value.shape) for key, value in state.items()},
        "state_dict_ema": {f"module.{key}": value for key, value in state.items()},
        **extra,
    }


def checkpoint_of(name: str, state: State) -> Any:
    """``state`` as published: P0 and P1 are plain state dicts, the others training checkpoints."""
    return state if "plain" in published(name)["weights"]["format"] else training_checkpoint(state)


def saved(data: Any, legacy: bool = False) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(data, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def write_zip(name: str, state: State, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the zip that is published for a network, with ``state`` in it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(published(name)["weights"]["archive_member"], saved(checkpoint_of(name, state)))
    return path
