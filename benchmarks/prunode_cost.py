"""What a training step of a width-searching block costs, by the number of widths it chooses from.

    python benchmarks/prunode_cost.py [--json F] [--quick] [--device cpu|cuda]

One inverted residual block, its greatest hidden width always the same, searched over 2 … 64 widths:

prunode   one execution at d_L, the channels d_S…d_L weighted (ours). The window stands at the top of the grid,
          d_L = d_max: the dearest place it can be in.
paths     one path per width, each with its own weights (as in DARTS, arXiv 1806.09055).
masks     one execution at d_max and one mask per width (as in FBNetV2, arXiv 2004.05565).

``step_ms`` is forward + backward, all methods and widths timed in turn in one run. ``peak_mb`` is the greatest amount
of memory that the step holds at once beyond the weights, from the allocator's own events (on CUDA:
``torch.cuda.max_memory_allocated``), so it does not depend on what else runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from prunet_zoo.files import write_json
from prunet_zoo.latency import Session
from prunet_zoo.latency.timing import time_together
from prunet_zoo.models.blocks import build_block
from prunet_zoo.spec import BlockSpec
from prunet_zoo.supernet import PrunodeBlock, WidthWindow

WIDTHS = (2, 4, 8, 16, 32, 64)
CHANNELS, D_MAX, EPS = 64, 512, 1e-3


class TopWindow(WidthWindow):
    """A window held at the top of its grid, with the lower width always at half."""

    small = property(lambda self: D_MAX // 2)  # type: ignore[assignment]
    large = property(lambda self: D_MAX)  # type: ignore[assignment]


class Paths(nn.Module):
    """One block per width, mixed by Gumbel-softmax."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(build_block(_irb(w), CHANNELS, EPS) for w in widths)
        self.logits = nn.Parameter(torch.zeros(len(widths)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = nn.functional.gumbel_softmax(self.logits)
        return sum(p[i] * path(x) for i, path in enumerate(self.paths))  # type: ignore[return-value]


class Masks(nn.Module):
    """One block at full width whose hidden channels are multiplied by the mixture of the widths' masks."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.block = build_block(_irb(D_MAX), CHANNELS, EPS)
        self.logits = nn.Parameter(torch.zeros(len(widths)))
        self.register_buffer("masks", torch.stack([(torch.arange(D_MAX) < w).float() for w in widths]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (nn.functional.gumbel_softmax(self.logits) @ self.masks).view(1, -1, 1, 1)
        hidden = self.block.depthwise(self.block.expand(x))
        return x + self.block.project(hidden * mask)


class Prunode(nn.Module):
    """The project's block."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.block = PrunodeBlock(_irb(D_MAX), CHANNELS, widths, EPS, TopWindow(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, p_large=self.block.p_large(1.0, torch.zeros(2, device=x.device)))


def _irb(hidden: int) -> BlockSpec:
    return BlockSpec(type="irb", out_channels=CHANNELS, hidden=hidden)


class Step(Session):
    """A training step that `time_together` can time."""

    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        super().__init__(self.step)
        self.module, self.x, self.cuda = module.to(x.device).train(), x, x.is_cuda

    def step(self) -> None:
        """Forward and backward; gradients are set to None so that each step allocates its own."""
        self.module.zero_grad(set_to_none=True)
        self.module(self.x).square().mean().backward()

    def sample(self, n: int) -> list[float]:
        """Milliseconds of ``n`` steps."""
        times = []
        for _ in range(n):
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            self.step()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def peak_mb(self) -> float:
        """Greatest memory held at once by the step beyond the weights, in MB (2^20 bytes)."""
        self.run()
        self.module.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            self.step()
        held = peak = 0
        events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak / 2**20


METHODS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {"prunode": Prunode, "paths": Paths, "masks": Masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="less time a figure (about 20 s in all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    x = torch.randn(16, CHANNELS, 14, 14, device=args.device)
    steps = {
        (name, n): Step(make(tuple(D_MAX * i // n for i in range(1, n + 1))), x)
        for name, make in METHODS.items()
        for n in WIDTHS
    }
    timed = [key for key in steps if key[0] != "paths" or key[1] <= 16 or not args.quick]
    short = [key for key in timed if key[0] != "paths"]
    seconds = 0.6 if args.quick else 4.0
    figures = dict(zip(short, time_together([steps[k] for k in short], seconds=seconds, min_rounds=60), strict=True))
    slow = [key for key in timed if key[0] == "paths"]
    figures |= dict(zip(slow, time_together([steps[k] for k in slow], seconds=seconds / 2, min_rounds=3), strict=True))
    rows = [
        {
            "method": m,
            "widths": n,
            "step_ms": round(figures[m, n].median_ms, 4),
            "peak_mb": round(steps[m, n].peak_mb(), 3),
        }
        for m, n in timed
    ]
    _print(rows, args.device)
    if args.json:
        write_json(args.json, rows)


def _print(rows: list[dict[str, object]], device: str) -> None:
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, 1 thread"
    )
    table = Table(
        title=f"IRB {CHANNELS}→{CHANNELS}, d_max {D_MAX}, batch 16, 14×14 px; {name}; {datetime.date.today()}"
    )
    for column in ("method", "widths", "step_ms", "× of 2 widths", "peak_mb", "× of 2 widths"):
        table.add_column(column, justify="right" if column != "method" else "left")
    base = {r["method"]: r for r in rows if r["widths"] == 2}
    for r in rows:
        ratios = [f"{float(str(r[k])) / float(str(base[r['method']][k])):.3f}" for k in ("step_ms", "peak_mb")]
        table.add_row(
            str(r["method"]), str(r["widths"]), f"{r['step_ms']:.2f}", ratios[0], f"{r['peak_mb']:.2f}", ratios[1]
        )
    Console(width=100).print(table)
    flat = [r for r in rows if r["method"] == "prunode"]
    spread = {
        k: max(float(str(r[k])) for r in flat) / min(float(str(r[k])) for r in flat) - 1 for k in ("step_ms", "peak_mb")
    }
    print(json.dumps({"prunode_spread": {k: round(v, 4) for k, v in spread.items()}}))


if __name__ == "__main__":
    main()
