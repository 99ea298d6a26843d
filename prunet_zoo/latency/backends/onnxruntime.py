"""ONNX Runtime on the CPU: sequential execution, all graph optimisations, input and output bound once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from prunet_zoo.latency.backends.base import Backend, Session, Setting, example_input
from prunet_zoo.models.export import export_onnx


class OnnxRuntime(Backend):
    """``InferenceSession`` with the CPU provider, intra-op threads as asked and one inter-op thread."""

    name = "onnxruntime"
    install = "pip install onnx onnxruntime"
    quick_prepare = True
    dtypes = {"cpu": ("fp32",)}  # noqa: RUF012  (ClassVar in the base)

    @property
    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        import onnxruntime

        session = onnxruntime.InferenceSession(
            export_onnx(module, input_shape), session_options(setting.threads), providers=["CPUExecutionProvider"]
        )
        binding = bind(session, example_input(input_shape), "cpu")

        def run() -> object:
            session.run_with_iobinding(binding)
            return binding

        def output() -> np.ndarray:
            run()
            return np.asarray(binding.copy_outputs_to_cpu()[0])

        return Session(run, in_thread=setting.threads == 1, spins=setting.threads > 1, output=output)


def session_options(threads: int) -> Any:
    """``SessionOptions``: sequential, all optimisations, warnings hidden."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


def bind(session: Any, x: np.ndarray, device: str) -> Any:
    """An ``IOBinding`` with ``x`` copied to the device once and the outputs left there."""
    import onnxruntime

    binding = session.io_binding()
    inputs: Sequence[Any] = session.get_inputs()
    binding.bind_ortvalue_input(inputs[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    return binding
