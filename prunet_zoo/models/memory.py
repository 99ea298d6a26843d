"""Whether a network fits into memory: told before a run that would swap, or that the system would end."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not Linux
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator raised: numpy's and torch's on a GPU are told by type, the others by their message."""
    # torch on the CPU, and for sizes that no number holds; ONNX Runtime; numpy
    named = (
        "DefaultCPUAllocator", "Storage size calculation overflowed", "integer multiplication overflow",
        "Failed to allocate memory", "array is too big", "Maximum allowed dimension exceeded",
    )  # fmt: skip
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(name in str(error) for name in named)


def widest_layer(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Elements of the maps around the layer of ``module`` that has most of them, for an input (B, C, H, W).

    Found by a run without data, of one image. Of a network that cannot be run so, the input alone.
    """
    images, *image = input_shape
    largest = math.prod(image)

    def look(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal largest
        tensors = [leaf for leaf in tree_leaves((inputs, outputs)) if isinstance(leaf, torch.Tensor)]
        largest = max(largest, sum(tensor.numel() for tensor in tensors))

    state = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    hooks = [m.register_forward_hook(look) for m in module.modules() if not any(True for _ in m.children())]
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            functional_call(module, state, (torch.zeros(1, *image, device="meta"),))
    except Exception:  # a network may look at its data, or at sizes that cannot be: the run proper says so
        pass
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return images * largest


def shortage(name: str, elements: int, dtype: str) -> str | None:
    """What to tell where the ``elements`` around a network's layer, in ``dtype`` ("fp32" or a half type), exceed the
    free memory; None: they do not."""
    need, free = elements * (4 if dtype == "fp32" else 2), free_memory()
    if free is None or need <= free:
        return None
    return f"at least {need / 2**30:,.1f} GiB for one layer of {name!r}, {free / 2**30:,.1f} GiB of memory are free"
