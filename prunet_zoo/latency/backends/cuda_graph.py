"""PyTorch with the whole network captured in one CUDA graph: no launch gaps, otherwise as eager."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prunet_zoo.latency.backends.base import Session, Setting
from prunet_zoo.latency.backends.cuda import CudaSession
from prunet_zoo.latency.backends.torch_eager import TorchEager, place
from prunet_zoo.latency.backends.verify import first_output

WARMUP_RUNS = 3  # lazy initialisation and the choice of convolution algorithms must not be captured


class CudaGraph(TorchEager):
    """Captured after warm-up on a side stream, as torch's documentation asks for; a run is a replay."""

    name = "cuda-graph"
    quick_prepare = False
    install = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
    dtypes = {"cuda": ("fp32", "fp16", "bf16")}  # noqa: RUF012  (ClassVar in the base)

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        ready, x = place(module, input_shape, setting)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.inference_mode():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_RUNS):
                    ready(x)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                y = first_output(ready(x))
        kept = (ready, x)  # the graph reads their memory

        def run() -> object:
            graph.replay()
            return kept

        def output() -> np.ndarray:
            run()
            torch.cuda.synchronize()
            return y.float().cpu().numpy()

        return CudaSession(run, output=output)
