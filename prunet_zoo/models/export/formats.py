"""The formats: how a file is written, and how it is run to be checked. Libraries are imported when they are needed."""

from __future__ import annotations

import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunet_zoo.models.export.errors import ExportError
from prunet_zoo.models.export.onnx import INSTALL, OPSET, add_metadata, to_onnx, to_onnx_of
from prunet_zoo.models.export.openvino_core import openvino_core

Array = NDArray[np.float32]
RunFile = Callable[[Array], list[Array]]  # (B, C, H, W) → each output


@dataclass(frozen=True)
class Plan:
    """What a file is to be.

    ``example``: an input of the graph, with a free batch of at least two images. ``outputs``: their names. ``dtype``:
    "fp32" or "fp16" (see each format). ``opset``: of ONNX, exactly; None: the format's choice. ``metadata``:
    JSON values that the file tells.
    """

    example: torch.Tensor
    outputs: tuple[str, ...]
    dynamic_batch: bool
    dtype: str
    opset: int | None
    metadata: Mapping[str, Any]


class Format(ABC):
    """A kind of file."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    install: ClassVar[str]  # the command that installs what writes or runs it
    dynamic: ClassVar[bool] = True  # whether the batch can be free
    has_opset: ClassVar[bool] = False  # whether it is, or is made from, ONNX of a chosen operator set
    needed: ClassVar[bool] = False  # whether the runtime is needed to write, not only to check

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Name and version of what runs the file; raises `ImportError` where it is missing."""

    @property
    def half_graph(self) -> bool:
        """Whether for fp16 the graph is given in float16 inside; else the format makes it so itself."""
        return False

    @abstractmethod
    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        """Write ``graph`` to ``path``, and to files beside it that have its stem or name before another suffix.

        Returns:
            What the file tells besides ``plan.metadata``: what is known only once it is made.
        """

    @abstractmethod
    def open(self, path: Path) -> RunFile:
        """Load a file to run it on the CPU (an engine: on its GPU)."""


class Onnx(Format):
    """fp16: weights and arithmetic in float16, input and outputs float32."""

    name, suffix, install, half_graph, has_opset = "onnx", ".onnx", INSTALL, True, True

    @property
    def runtime(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        data, opset = to_onnx_of(graph, plan.example, plan.outputs, plan.dynamic_batch, plan.opset)
        path.write_bytes(add_metadata(data, {**plan.metadata, "opset": opset}))
        return {"opset": opset}

    def open(self, path: Path) -> RunFile:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"input": x})


class TorchScript(Format):
    """fp16: as ONNX. What it tells of itself lies in the extra file ``prunet_zoo.json``."""

    name, suffix, install, half_graph = "torchscript", ".torchscript.pt", "pip install torch", True
    about: ClassVar[str] = "prunet_zoo.json"

    @property
    def runtime(self) -> str:
        return f"torch {torch.__version__}"

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        buffer = io.BytesIO()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer: the file is compared with the network below
            traced = torch.jit.freeze(torch.jit.trace(graph, plan.example))
            torch.jit.save(traced, buffer, _extra_files={self.about: json.dumps(plan.metadata, sort_keys=True)})
        path.write_bytes(buffer.getvalue())
        return {}

    def open(self, path: Path) -> RunFile:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu")

        def run(x: Array) -> list[Array]:
            with torch.no_grad(), torch.jit.optimized_execution(False):
                outs = module(torch.from_numpy(x))
            return [out.numpy() for out in (outs if isinstance(outs, tuple) else (outs,))]

        return run


class OpenVino(Format):
    """An ``.xml`` and a ``.bin`` beside it. fp16: weights are stored in float16, the device chooses the arithmetic."""

    name, suffix, install, needed = "openvino", ".xml", "pip install openvino", True

    @property
    def runtime(self) -> str:
        import openvino

        return f"openvino {openvino.__version__.partition('-')[0]}"

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        import openvino

        model = openvino_core().read_model(to_onnx(graph, plan.example, plan.outputs, plan.dynamic_batch, OPSET))
        for key, value in plan.metadata.items():
            model.set_rt_info(json.dumps(value, ensure_ascii=False, sort_keys=True), ["model_info", key])
        openvino.save_model(model, str(path), compress_to_fp16=plan.dtype == "fp16")
        openvino_core().read_model(str(path))  # it does not say so itself when the disk is full
        return {}

    def open(self, path: Path) -> RunFile:
        # newer CPUs would compute in bfloat16
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino_core().compile_model(str(path), "CPU", options)
        return lambda x: [np.array(compiled(x)[i]) for i in range(len(compiled.outputs))]


FORMATS: dict[str, Format] = {form.name: form for form in (Onnx(), TorchScript(), OpenVino())}


def check_path(form: Format, path: Path) -> None:
    """Raise `ExportError` where a file of the format cannot be, or must not be called so."""
    suffix = "." + form.suffix.rpartition(".")[2]
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the file: {path / f'NAME{form.suffix}'}")
    if path.suffix != suffix:
        raise ExportError(f"the format {form.name!r} makes files FILE{suffix}; got the name {path.name}")


def need(form: Format) -> str:
    """The format's runtime with its version.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return form.runtime
    except ImportError as error:
        raise ExportError(
            f"format {form.name!r} needs a library that is not installed ({error}); run: {form.install}"
        ) from None
