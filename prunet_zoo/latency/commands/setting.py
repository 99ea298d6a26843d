"""Options that several commands share: backend, threads, batch, dtype, device."""

from __future__ import annotations

import argparse


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a network is run."""
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime or torch (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images a run (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
