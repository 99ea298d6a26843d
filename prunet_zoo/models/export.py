"""Export: BatchNorm folded into the convolution before it, and ONNX."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_atomic
from prunet_zoo.models.layers import ConvNormAct


class ExportError(PrunetError, RuntimeError):
    """A network could not be exported."""


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode whose `ConvNormAct` layers have their BatchNorm folded into the convolution.

    The copy computes the same up to rounding. Other norms (GroupNorm) stay.
    """
    folded = copy.deepcopy(module).eval()
    for layer in folded.modules():
        if isinstance(layer, ConvNormAct) and isinstance(layer.norm, _BatchNorm):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
            layer.norm = nn.Identity()
    return folded


def export_onnx(
    module: nn.Module, input_shape: Sequence[int], path: str | Path | None = None, opset: int = 17, fold: bool = True
) -> bytes:
    """Export ``module`` in eval mode to ONNX with one float32 input ``input`` of fixed shape.

    torch's TorchScript-based exporter is tried first: it takes tens of milliseconds where the torch.export-based one
    takes seconds, and a latency table exports hundreds of blocks. The latter is the fallback for releases without the
    former.

    Args:
        module: takes one tensor, returns one or several.
        input_shape: (B, C, H, W).
        path: where to write the file (whole or not at all); None writes none.
        opset: ONNX operator set, 17 by default (TensorRT 8.6 and later read it).
        fold: fold BatchNorm first.

    Returns:
        The serialised model.

    Raises:
        ExportError: neither exporter could do it; both reasons are given.
    """
    ready = fold_batchnorm(module) if fold else copy.deepcopy(module).eval()
    ready = ready.float().cpu()
    example = torch.zeros(tuple(input_shape), dtype=torch.float32)
    reasons = []
    for exporter in (_export_torchscript, _export_dynamo):
        try:
            data = exporter(ready, example, opset)
        except Exception as error:  # an exporter may fail in any way (absent, unsupported op, missing onnxscript)
            reasons.append(
                f"{exporter.__name__.removeprefix('_export_')}: {type(error).__name__}: {error}".splitlines()[0]
            )
            continue
        if path is not None:
            write_atomic(path, data)
        return data
    raise ExportError(
        f"cannot export {type(module).__name__} for input {tuple(input_shape)} to ONNX ({'; '.join(reasons)}). "
        "Install the extra: pip install 'prunet_zoo[export]'"
    )


def _export_torchscript(module: nn.Module, example: torch.Tensor, opset: int) -> bytes:
    options: dict[str, Any] = {"input_names": ["input"], "opset_version": opset}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # not in torch 2.4; True by default from 2.9
        options["dynamo"] = False
    buffer: Any = io.BytesIO()
    with _quiet(), torch.no_grad():
        torch.onnx.export(module, (example,), buffer, **options)
    return bytes(buffer.getvalue())


def _export_dynamo(module: nn.Module, example: torch.Tensor, opset: int) -> bytes:
    onnx: Any = torch.onnx
    with _quiet():
        if "dynamo" in inspect.signature(onnx.export).parameters:
            options = {"dynamo": True, "input_names": ["input"], "opset_version": max(opset, 18), "verbose": False}
            program = onnx.export(module, (example,), **options)
        else:
            program = onnx.dynamo_export(module, example)  # torch 2.4
    return bytes(program.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' deprecation notes and progress: they are about torch, not about the user's network."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
