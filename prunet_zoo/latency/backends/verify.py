"""Whether what a backend runs is the network: its output against torch's in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Session, example_input
from prunet_zoo.models.export.job import relative_error

# largest error allowed, relative to the largest output; TensorFloat-32, which GPUs use for fp32, has fp16's mantissa
TOLERANCE = {"fp32": 5e-3, "fp16": 3e-2, "bf16": 1e-1}


def check_output(session: Session, module: nn.Module, input_shape: Sequence[int], dtype: str = "fp32") -> float:
    """Compare what ``session`` gives for `example_input` with ``module`` in torch, eval mode, float32, on the CPU.

    Args:
        session: prepared from ``module``.
        module: takes one tensor, returns one (or several: the first counts).
        input_shape: (B, C, H, W).
        dtype: what the session runs in; sets the tolerance.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        LatencyError: another shape, values that are not finite, or an error above `TOLERANCE`.
    """
    reference = copy.deepcopy(module).float().cpu().eval()
    with torch.inference_mode():
        expected = first_output(reference(torch.from_numpy(example_input(input_shape)))).numpy()
    found = session.output()
    if found.shape != expected.shape:
        raise LatencyError(f"the backend's output has shape {found.shape}, torch's {expected.shape}")
    if not np.isfinite(found).all():
        raise LatencyError(
            f"the backend's output in {dtype} has values that are not finite; the network's signals leave the range of "
            f"{dtype}, or the backend is wrong: measure it in fp32"
        )
    error = relative_error(found, expected)
    if error > TOLERANCE[dtype]:
        raise LatencyError(
            f"the backend's output in {dtype} differs from torch's by {error:.1%} of the largest value; "
            f"at most {TOLERANCE[dtype]:.1%} is rounding: it does not run this network right"
        )
    return error


def first_output(output: object) -> torch.Tensor:
    """The tensor that a module returned, or the first of several."""
    while isinstance(output, list | tuple | dict):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    if not isinstance(output, torch.Tensor):
        raise LatencyError(f"a network to be measured must return a tensor, not {type(output).__name__}")
    return output
