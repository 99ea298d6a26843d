"""Do the operators on torch compute what a compiled mmcv computes, and how fast?

    python benchmarks/mmcv_ops_parity.py [--json F] [--quick] [--device cpu|cuda]

Needs an environment with a compiled mmcv (``pip install 'mmcv>=2.0.0,<2.2.0'``). Every case runs twice through the same
Python of ``mmcv.ops``: once on the compiled ``mmcv._ext``, once on `prunet_zoo.mm.ops`, with the same inputs and, where
there is a derivative, the same gradients coming in.

differ    cases whose indices (kept boxes, groups, order) are not all the same.
max abs   greatest difference of a value or derivative; max rel: that over the greatest magnitude in its tensor.
ms        median, forward and backward together where there is a backward, both timed in turn; one thread on a CPU.

Where the compiled mmcv has no kernel for the device, the row says so and ours alone is timed.

Two differences of more than rounding are known. roi_align's maximum passes the gradient of a few pixels in a million to
another sample: two samples are equal but for the last bits of their coordinates. mmcv's modulated convolution floors
float64 coordinates in float32, so a point within 1e-7 px of a pixel's centre gets the slope of the other side.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prunet_zoo  # noqa: F401  (leaves a compiled mmcv alone, stands in for a missing one)
from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_json
from prunet_zoo.latency.measure import time_together
from prunet_zoo.mm import ops
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.mm.compat import SubstituteExt


class NoCompiledMmcvError(PrunetError, RuntimeError):
    """There is nothing to compare with."""


@dataclass
class Case:
    """One call of an operator: ``call()`` gives its outputs, ``inputs`` get derivatives."""

    operator: str
    label: str
    call: Callable[[], Any]
    inputs: list[Tensor] = field(default_factory=list)

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and derivatives; the gradient that comes in rises evenly from -1 to 1."""
        outputs = tensors_of(self.call())
        if not self.inputs:
            return outputs, []
        ramp = torch.linspace(-1, 1, outputs[0].numel(), dtype=outputs[0].dtype, device=outputs[0].device)
        return outputs, list(torch.autograd.grad(outputs[0], self.inputs, ramp.view_as(outputs[0])))


@dataclass
class Session:
    """A case on one of the two extensions, for `time_together`."""

    case: Case
    ext: Any
    interrupted: int = 0
    spins: bool = False

    def sample(self, n: int) -> list[float]:
        """Milliseconds of ``n`` runs."""
        times = []
        with extension(self.ext):
            for _ in range(n):
                self._wait()
                start = time.perf_counter()
                self.case.run()
                self._wait()
                times.append(1e3 * (time.perf_counter() - start))
        return times

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of an operator's result, lists of groups in one."""
    if isinstance(value, Tensor):
        return [value]
    return list(itertools.chain.from_iterable(tensors_of(part) for part in value))


@contextmanager
def extension(ext: Any) -> Iterator[None]:
    """All of mmcv.ops calls ``ext``."""
    modules = [m for n, m in list(sys.modules.items()) if n.startswith("mmcv.ops.") and hasattr(m, "ext_module")]
    before = [module.ext_module for module in modules]
    for module in modules:
        module.ext_module = ext
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.ext_module = old


def compiled_mmcv() -> Any:
    """The compiled ``mmcv._ext``."""
    try:
        import mmcv._ext as ext
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        raise NoCompiledMmcvError(f"mmcv cannot be imported ({error}); install a compiled one: see --help.") from error
    if isinstance(ext, SubstituteExt):
        raise NoCompiledMmcvError(
            "this environment has mmcv-lite, so there is no compiled mmcv to compare with. Run this in one made with: "
            "pip uninstall mmcv-lite && pip install 'mmcv>=2.0.0,<2.2.0' (needs a compiler, takes some minutes)"
        )
    return ext


class Inputs:
    """Random inputs on a device, the same ones in every run."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Leaf tensor that takes a derivative."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype).requires_grad_()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def scores(self, count: int) -> Tensor:
        """(N,) distinct scores: mmcv leaves open which of equal ones comes first."""
        return ((torch.randperm(count, generator=self.generator) + 0.5) / count).to(self.device)

    def boxes(self, count: int, size: float = 800.0, whole: bool = False) -> Tensor:
        """(N, 4) boxes of 8-160 px; on whole pixels many touch, coincide or lie exactly on a threshold."""
        corner, side = self.uniform(count, 2) * (size - 160), 8 + self.uniform(count, 2) ** 2 * 152
        if whole:
            corner, side = (corner / 16).round() * 8, (side / 8).round() * 8
        return torch.cat((corner, corner + side), dim=1)

    def rois(self, count: int, images: int, dtype: torch.dtype) -> Tensor:
        boxes = self.boxes(count)
        return torch.cat((self.integers(images, count, 1).float(), boxes - 20), dim=1).to(dtype)


def box_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import batched_nms, nms, nms_match, soft_nms

    for count, whole, offset in itertools.product((1, 200, 1000) if quick else (1, 200, 1000, 5000), (0, 1), (0, 1)):
        label = f"{count} boxes{', whole px' if whole else ''}, offset {offset}"
        boxes = make.boxes(count, whole=bool(whole))
        yield Case("nms", label, partial(nms, boxes, make.scores(count), 0.5, offset))
    for count, classes in ((1000, 80), (4000, 3)) if quick else ((1000, 80), (4000, 3), (12_000, 80)):
        scored = (make.boxes(count), make.scores(count), make.integers(classes, count))
        call = partial(batched_nms, *scored, {"type": "nms", "iou_threshold": 0.6})
        yield Case("batched_nms", f"{count} boxes, {classes} classes", call)
    for count, method, offset in itertools.product((200, 1000), ("naive", "linear", "gaussian"), (0, 1)):
        scored = (make.boxes(count, whole=True), make.scores(count))
        call = partial(soft_nms, *scored, 0.3, 0.5, 1e-3, method, offset)
        yield Case("soft_nms", f"{count} boxes, {method}, offset {offset}", call)
    for count, whole in itertools.product((200, 1000), (False, True)):
        dets = torch.cat((make.boxes(count, whole=whole), make.scores(count).view(-1, 1)), dim=1)
        yield Case("nms_match", f"{count} boxes{', whole px' if whole else ''}", partial(nms_match, dets, 0.5))


def roi_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import roi_align, roi_pool

    channels, count, scale = (32, 64, 1 / 16) if quick else (256, 256, 1 / 16)
    for mode, aligned, ratio, bins in itertools.product(("avg", "max"), (True, False), (0, 2), (7, 14)):
        if bins == 14 and (quick or not aligned):
            continue
        features, rois = make.normal(2, channels, 50, 68), make.rois(count, 2, torch.float32)
        label = f"{channels} channels, {count} RoIs, {bins}x{bins}, ratio {ratio}, aligned {aligned}"
        call = partial(roi_align, features, rois, bins, scale, ratio, mode, aligned)
        yield Case(f"roi_align {mode}", label, call, [features])
    for mode in ("avg", "max"):
        features, rois = make.normal(2, 8, 50, 68, dtype=torch.float64), make.rois(count, 2, torch.float64)
        call = partial(roi_align, features, rois, 7, scale, 0, mode, True)
        yield Case(
            f"roi_align {mode}", f"8 channels, {count} RoIs, 7x7, ratio 0, aligned True, float64", call, [features]
        )
    features, rois = make.normal(2, channels, 50, 68), make.rois(count, 2, torch.float32)
    yield Case(
        "roi_pool", f"{channels} channels, {count} RoIs, 7x7", partial(roi_pool, features, rois, 7, scale), [features]
    )


def convolution_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import deform_conv2d, masked_conv2d, modulated_deform_conv2d

    channels, size = (16, 24) if quick else (64, 40)
    for stride, dilation, groups, deform_groups, scale, dtype in (
        (1, 1, 1, 1, 1.0, torch.float32),
        (1, 1, 1, 1, 0.0, torch.float32),  # offsets of zero, as training begins
        (2, 1, 1, 1, 3.0, torch.float32),
        (1, 2, 4, 2, 2.0, torch.float32),
        (1, 1, 2, 4, 2.0, torch.float64),
    ):
        out = (size - 1) // stride + 1
        x = make.normal(2, channels, size, size, dtype=dtype)
        offset = make.normal(2, deform_groups * 18, out, out, scale=scale, dtype=dtype)
        mask = make.normal(2, deform_groups * 9, out, out, dtype=dtype).sigmoid().detach().requires_grad_()
        weight = make.normal(channels, channels // groups, 3, 3, scale=0.1, dtype=dtype)
        bias = make.normal(channels, dtype=dtype)
        geometry = (stride, dilation, dilation, groups, deform_groups)
        label = (
            f"2x{channels}x{size}x{size}, 3x3, stride {stride}, dilation {dilation}, groups {groups}/{deform_groups}"
        )
        label += f", offsets of {scale:g} px, {str(dtype).removeprefix('torch.')}"
        plain, modulated = [x, offset, weight], [x, offset, mask, weight, bias]
        yield Case("deform_conv2d", label, partial(deform_conv2d, *plain, *geometry), plain)
        yield Case("modulated_deform_conv2d", label, partial(modulated_deform_conv2d, *modulated, *geometry), modulated)
    x, weight, bias = (t.detach() for t in (make.normal(1, 64, 40, 40), make.normal(64, 64, 3, 3), make.normal(64)))
    call = partial(masked_conv2d, x, make.uniform(1, 40, 40) > 0.7, weight, bias, 1)
    yield Case("masked_conv2d", "64x40x40, 3x3, a third of the positions", call)


def other_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    samples = 2000 if quick else 20_000
    for name, loss in (("sigmoid_focal_loss", sigmoid_focal_loss), ("softmax_focal_loss", softmax_focal_loss)):
        for weight in (None, make.uniform(80)):
            logits, target = make.normal(samples, 80, scale=3.0), make.integers(80, samples)
            label = f"{samples} x 80{', weighted' if weight is not None else ''}"
            yield Case(name, label, partial(loss, logits, target, 2.0, 0.25, weight, "sum"), [logits])
    shapes = torch.tensor([[32, 32], [16, 16], [8, 8], [4, 4]], device=make.device)
    starts = torch.tensor([0, 1024, 1280, 1344], device=make.device)
    queries = 100 if quick else 900
    value = make.normal(2, 1360, 8, 32)
    places = make.uniform(2, queries, 8, 4, 4, 2).requires_grad_()
    weights = make.uniform(2, queries, 8, 4, 4).requires_grad_()
    call = partial(MultiScaleDeformableAttnFunction.apply, value, shapes, starts, places, weights, 64)
    yield Case("ms_deform_attn", f"{queries} queries, 4 levels, 8 heads of 32", call, [value, places, weights])


def compare(case: Case, compiled: Any, seconds: float) -> dict[str, Any]:
    """One row: differences and times of a case."""
    row: dict[str, Any] = {"operator": case.operator, "case": case.label}
    with extension(ops):
        ours = case.run()
    sessions = [Session(case, ops)]
    try:
        with extension(compiled):
            theirs = case.run()
    except RuntimeError as error:
        if "implementation for device" not in str(error) and "not compiled with" not in str(error):
            raise
        row["compiled"] = str(error).strip().splitlines()[0]
    else:
        row |= differences([*ours[0], *ours[1]], [*theirs[0], *theirs[1]])
        sessions.append(Session(case, compiled))
    timings = time_together(sessions, seconds=seconds, min_rounds=3)
    row |= {f"{name}_ms": round(t.median_ms, 4) for name, t in zip(("ours", "mmcv"), timings, strict=False)}
    return row


def differences(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    """Whether all indices are equal, and the greatest difference of the other tensors."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return {"same_indices": False, "max_abs": None, "max_rel": None}
    pairs = list(zip(ours, theirs, strict=True))
    same = all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point())
    values = [(a.detach().double(), b.detach().double()) for a, b in pairs if a.is_floating_point() and a.numel()]
    gaps = [float((a - b).abs().max()) for a, b in values]
    scales = [float(b.abs().max()) for _, b in values]
    return {
        "same_indices": same,
        "max_abs": max(gaps, default=0.0),
        "max_rel": max((gap / scale if scale else gap for gap, scale in zip(gaps, scales, strict=True)), default=0.0),
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an operator; its times are sums over its cases."""
    by_operator: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_operator[row["operator"]].append(row)
    summary = []
    for operator, mine in by_operator.items():
        total: dict[str, Any] = {"operator": operator, "cases": len(mine)}
        total["ours_ms"] = round(sum(r["ours_ms"] for r in mine), 3)
        if all("mmcv_ms" in r for r in mine):
            total["differ"] = sum(not r["same_indices"] for r in mine)
            total |= {key: max(r[key] or 0.0 for r in mine) for key in ("max_abs", "max_rel")}
            total["mmcv_ms"] = round(sum(r["mmcv_ms"] for r in mine), 3)
            total["ratio"] = round(total["ours_ms"] / total["mmcv_ms"], 2)
        summary.append(total)
    return summary


def print_table(summary: list[dict[str, Any]], device: str) -> None:
    table = Table(title=f"prunet_zoo.mm.ops and compiled mmcv {version_of_mmcv()} on {device}; {datetime.date.today()}")
    columns = ("operator", "cases", "differ", "max abs", "max rel", "ms ours", "ms mmcv", "ratio")
    for column in columns:
        table.add_column(column, justify="left" if column == "operator" else "right")
    for r in summary:
        if "ratio" not in r:
            table.add_row(
                r["operator"], str(r["cases"]), "", "mmcv has no", "kernel here", f"{r['ours_ms']:.1f}", "", ""
            )
            continue
        shown = [str(r["differ"]), f"{r['max_abs']:.1e}", f"{r['max_rel']:.1e}", f"{r['ours_ms']:.1f}"]
        table.add_row(r["operator"], str(r["cases"]), *shown, f"{r['mmcv_ms']:.1f}", f"{r['ratio']:.2f}")
    Console(width=110).print(table)


def version_of_mmcv() -> str:
    import mmcv

    return str(mmcv.__version__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all cases and the summary to this file")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and fewer runs (about a minute)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compare")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NoCompiledMmcvError("--device cuda was given, but torch finds no GPU here; leave it out for the CPU.")
    compiled = compiled_mmcv()
    if args.device == "cpu":
        torch.set_num_threads(1)
    make = Inputs(args.device)
    groups = (box_cases, roi_cases, convolution_cases, other_cases)
    rows = []
    for case in itertools.chain.from_iterable(group(make, args.quick) for group in groups):
        rows.append(compare(case, compiled, seconds=0.05 if args.quick else 0.2))
    summary = summarise(rows)
    gpu = args.device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, 1 thread"
    print_table(summary, name)
    if args.json:
        versions = {"mmcv": version_of_mmcv(), **{n: version(n) for n in ("torch", "torchvision", "numpy")}}
        command = shlex.join(["python", "benchmarks/mmcv_ops_parity.py", *(sys.argv[1:] if argv is None else argv)])
        about = {"command": command, "device": name, "date": str(datetime.date.today()), "versions": versions}
        write_json(args.json, {**about, "operators": summary, "cases": rows})


if __name__ == "__main__":
    run_tool(main)
