"""Options that several commands share: backend, threads, batch, dtype, device, memory format."""

from __future__ import annotations

import argparse

# `list_backends()` of prunet_zoo.latency, which would load torch for --help
BACKENDS = (
    "cuda-graph", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino", "tensorrt", "torch",
    "torch-compile", "trtexec",
)  # fmt: skip


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a network is run."""
    parser.add_argument("--backend", default="onnxruntime", help=f"{', '.join(BACKENDS)} (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a run (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument(
        "--memory-format",
        default="contiguous",
        choices=("contiguous", "channels_last"),
        help="of input and weights, where the backend lets choose (default: %(default)s)",
    )
