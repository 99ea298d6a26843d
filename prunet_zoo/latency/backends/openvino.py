"""OpenVINO on the CPU: LATENCY hint, one stream, one synchronous request whose input is set once."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends.base import Backend, Session, Setting, example_input
from prunet_zoo.models.export import export_onnx, openvino_core

PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CAPABILITIES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}


class OpenVino(Backend):
    """A compiled model with the inference precision asked for, or an error: OpenVINO itself would take another one
    where the processor does not have it."""

    name = "openvino"
    install = "pip install onnx openvino"
    quick_prepare = True
    dtypes = {"cpu": ("fp32", "bf16", "fp16")}  # noqa: RUF012  (ClassVar in the base)

    @property
    def version(self) -> str:
        import openvino

        return str(openvino.__version__).split("-")[0]

    def check(self, setting: Setting) -> None:
        super().check(setting)
        has = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[setting.dtype] not in has:
            can = [dtype for dtype, capability in _CAPABILITIES.items() if capability in has]
            raise LatencyError(
                f"backend {self.name!r}: this processor does not run {setting.dtype!r} in OpenVINO; "
                f"it runs {', '.join(can)} (--dtype)"
            )

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        import openvino

        core = openvino_core()
        compiled = core.compile_model(core.read_model(export_onnx(module, input_shape)), "CPU", properties(setting))
        self._check_properties(compiled, setting)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(example_input(input_shape)))

        def run() -> object:
            request.infer()
            return request

        def output() -> np.ndarray:
            run()
            return np.array(request.get_output_tensor(0).data)

        # with one thread the request runs in the caller
        return Session(run, in_thread=setting.threads == 1, spins=setting.threads > 1, output=output)

    def _check_properties(self, compiled: Any, setting: Setting) -> None:
        """Raise `LatencyError` where OpenVINO took another precision or number of threads than asked."""
        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        if (precision, threads) != (PRECISIONS[setting.dtype], setting.threads):
            raise LatencyError(
                f"OpenVINO would run {precision} on {threads} threads instead of "
                f"{PRECISIONS[setting.dtype]} on {setting.threads}; this machine cannot measure what was asked"
            )


def properties(setting: Setting) -> dict[str, Any]:
    """OpenVINO's options. Threads are not pinned: the process keeps the cores that it was given."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": setting.threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[setting.dtype],
        "ENABLE_CPU_PINNING": False,
    }
