"""ONNX, by whichever of torch's two exporters there is."""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_atomic
from prunet_zoo.models.export.errors import ExportError
from prunet_zoo.models.export.fold import fold_batchnorm

INSTALL = "pip install 'prunet_zoo[export]'"
OPSET = 17


def export_onnx(
    module: nn.Module,
    input_shape: Sequence[int],
    path: str | Path | None = None,
    opset: int = OPSET,
    fold: bool = True,
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """Export ``module`` in eval mode to ONNX with one input ``input`` of fixed shape; see `to_onnx`.

    Args:
        module: takes one tensor, returns one or several.
        input_shape: (B, C, H, W).
        path: where to write the file (whole or not at all); None writes none.
        opset: ONNX operator set, 17 by default (TensorRT 8.6 and later read it).
        fold: fold BatchNorm first (in float32).
        dtype: of the weights, the input and the outputs.

    Returns:
        The serialised model.

    Raises:
        ExportError: neither exporter could do it; both reasons are given.
    """
    ready = copy.deepcopy(module).float().cpu().eval()
    example = torch.zeros(tuple(input_shape), dtype=torch.float32)
    if fold:
        try:
            ready = fold_batchnorm(ready, example)
        except PrunetError:
            raise
        except Exception as error:  # whatever a network does with an input that it cannot take
            raise ExportError(f"{_what(module, example)} cannot be run: {_reason(error)}") from error
    data = to_onnx(ready.to(dtype), example.to(dtype), opset=opset)
    if path is not None:
        write_atomic(path, data)
    return data


def to_onnx(
    module: nn.Module,
    example: torch.Tensor,
    outputs: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    opset: int = OPSET,
) -> bytes:
    """The ONNX form of a module as it is, with the input ``input``.

    torch's TorchScript-based exporter is tried first: it takes tens of milliseconds where the torch.export-based one
    takes seconds, and a latency table exports hundreds of blocks. The latter is the fallback for releases without the
    former; its opset is 18 at least, and another one than asked for where it cannot convert (see `read_opset`).

    Args:
        module: on the CPU, in eval mode.
        example: its input; with ``dynamic_batch`` of at least two images.
        outputs: names of the outputs; None leaves them to the exporter.
        dynamic_batch: the first dimension of input and outputs is free, and called ``batch``.
        opset: ONNX operator set.

    Raises:
        ExportError: neither exporter could do it; both reasons are given.
    """
    reasons = []
    for exporter in (_export_torchscript, _export_dynamo):
        try:
            return exporter(module, example, outputs, dynamic_batch, opset)
        except Exception as error:  # an exporter may fail in any way (absent, unsupported op, missing onnxscript)
            reasons.append(f"{exporter.__name__.removeprefix('_export_')}: {_reason(error)}")
    raise ExportError(
        f"cannot export {_what(module, example)} to ONNX ({'; '.join(reasons)}). Install the extra: {INSTALL}"
    )


def to_onnx_of(
    module: nn.Module, example: torch.Tensor, outputs: Sequence[str], dynamic_batch: bool, opset: int | None
) -> tuple[bytes, int]:
    """As `to_onnx`, of exactly the operator set ``opset`` (None: whichever comes of `OPSET`).

    Returns:
        (the model, its operator set).

    Raises:
        ExportError: as `to_onnx`; or the model has another operator set, or the package onnx is missing.
    """
    data = to_onnx(module, example, outputs, dynamic_batch, OPSET if opset is None else opset)
    found = read_opset(data)
    if opset not in (None, found):
        raise ExportError(
            f"ONNX opset {opset} cannot be written: torch {torch.__version__} gives {found} instead. Give --opset "
            f"{found}, or leave it out (then it is {OPSET} where torch can)"
        )
    return data, found


def read_opset(data: bytes) -> int:
    """The operator set of an ONNX model."""
    sets = _onnx().load_from_string(data).opset_import
    (found,) = (entry.version for entry in sets if entry.domain in ("", "ai.onnx"))
    return int(found)


def add_metadata(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """The ONNX model with ``metadata`` in its metadata, each value as JSON.

    Raises:
        ExportError: the package onnx is missing.
    """
    model = _onnx().load_from_string(data)
    texts = {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in metadata.items()}
    _onnx().helper.set_model_props(model, texts)
    return bytes(model.SerializeToString())


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ExportError(f"ONNX files need a package that is missing ({error}); {INSTALL}") from None
    return onnx


def _export_torchscript(
    module: nn.Module, example: torch.Tensor, outputs: Sequence[str] | None, dynamic_batch: bool, opset: int
) -> bytes:
    options: dict[str, Any] = {"input_names": ["input"], "output_names": list(outputs or ()), "opset_version": opset}
    if dynamic_batch:
        options["dynamic_axes"] = {name: {0: "batch"} for name in ("input", *(outputs or ()))}
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # not in torch 2.4; True by default from 2.9
        options["dynamo"] = False
    buffer: Any = io.BytesIO()
    with _quiet(), torch.no_grad():
        torch.onnx.export(module, (example,), buffer, **options)
    return bytes(buffer.getvalue())


def _export_dynamo(
    module: nn.Module, example: torch.Tensor, outputs: Sequence[str] | None, dynamic_batch: bool, opset: int
) -> bytes:
    onnx: Any = torch.onnx
    with _quiet():
        if "dynamo" in inspect.signature(onnx.export).parameters:
            options = {"dynamo": True, "input_names": ["input"], "opset_version": max(opset, 18), "verbose": False}
            if outputs is not None:
                options["output_names"] = outputs
            if dynamic_batch:
                options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
            program = onnx.export(module, (example,), **options)
        elif outputs is None and not dynamic_batch:
            program = onnx.dynamo_export(module, example)  # torch 2.4
        else:
            raise ExportError("this release of torch cannot name outputs or free the batch in this way")
    return bytes(program.model_proto.SerializeToString())


def _what(module: nn.Module, example: torch.Tensor) -> str:
    return f"{type(module).__name__} for input {tuple(example.shape)}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' deprecation notes and progress: they are about torch, not about the user's network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what goes wrong is in what the caller raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
