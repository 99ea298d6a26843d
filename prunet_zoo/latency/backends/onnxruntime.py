"""ONNX Runtime on the CPU: sequential execution, all graph optimisations, input and output bound once."""

from __future__ import annotations

import numpy as np
from torch import nn

from prunet_zoo.latency.backends.base import Backend, Session, Setting
from prunet_zoo.models.export import export_onnx


class OnnxRuntime(Backend):
    """``InferenceSession`` with the CPU provider, intra-op threads as asked and one inter-op thread."""

    name = "onnxruntime"
    install = "pip install onnx onnxruntime"
    dtypes = {"cpu": ("fp32",)}  # noqa: RUF012  (ClassVar in the base)

    @property
    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            export_onnx(module, input_shape), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        x = np.random.default_rng(0).standard_normal(input_shape, dtype=np.float32)
        binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")

        def run() -> object:
            session.run_with_iobinding(binding)
            return binding

        return Session(run, in_thread=setting.threads == 1, spins=setting.threads > 1)
