"""Do the operators on torch compute what a compiled mmcv computes, and how fast?

    python benchmarks/mmcv_ops_parity.py [--json F] [--quick] [--device cpu|cuda]

Needs an environment with a compiled mmcv (``pip install 'mmcv>=2.0.0,<2.2.0'``). Every case runs twice through the same
Python of ``mmcv.ops``: once on the compiled ``mmcv._ext``, once on `prunet_zoo.mm.ops`, with the same inputs and, where
there is a derivative, the same gradients coming in.

against   what ours is compared with. "mmcv": the compiled kernel. "formula": where mmcv has no kernel for the device,
          the published formula in float64, written here and derived by autograd. "float64": in half precision, ours
          with the same inputs in float64 (which has a row of its own, against mmcv or the formula).
differ    cases whose indices (kept boxes, groups, order) are not all the same.
max abs   greatest difference of a value or derivative; max rel: that over the greatest magnitude in its tensor.
mmcv rel  in half precision: max rel of mmcv, where it has a kernel for it, against the same.
ms        forward and backward together where there is a backward. Both are warmed up and timed in turn; the median of
          the quieter third of the rounds. On a CPU it is the time of the one thread that computes, on a GPU wall time.

Three differences of more than rounding are known. roi_align's maximum passes the gradient of a few pixels in a million
to another sample: two samples are equal but for the last bits of their coordinates. mmcv's modulated convolution floors
float64 coordinates in float32, so a point within 1e-7 px of a pixel's centre gets the slope of the other side.
softmax_focal_loss gets its softmax from mmcv's Python, in float16 with few bits for a probability below 6e-5.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import prunet_zoo  # noqa: F401  (leaves a compiled mmcv alone, stands in for a missing one)
from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_json
from prunet_zoo.latency.backends.base import cpu_name
from prunet_zoo.latency.timing import time_together
from prunet_zoo.mm import ops
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.mm.compat import SubstituteExt
from prunet_zoo.mm.training import device_name

HALF = (torch.float16, torch.bfloat16)
GROUP = ("operator", "dtype", "against")
NO_KERNEL = re.compile(r"implementation for device|not compiled with|not implemented for '(Half|BFloat16)'|scalar type")


class NoCompiledMmcvError(PrunetError, RuntimeError):
    """There is nothing to compare with."""


@dataclass
class Case:
    """A call of an operator, ``call(*inputs)``; ``formula(*inputs)`` is what it should give."""

    operator: str
    label: str
    call: Callable[..., Any]
    inputs: list[Tensor]
    formula: Callable[..., Any] | None = None
    derivatives: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def half(self) -> bool:
        return self.dtype in (torch.float16, torch.bfloat16)

    def run(self) -> list[Tensor]:
        """Outputs, and derivatives by all inputs; the gradient that comes in rises evenly from -1 to 1."""
        return self._results(self.call, [t.detach() for t in self.inputs])

    def exact(self) -> list[Tensor]:
        """The same in float64 by the formula, or where there is none by the call."""
        wide = [t.detach().double() if t.is_floating_point() else t for t in self.inputs]
        return self._results(self.formula or self.call, wide)

    def _results(self, function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
        if not self.derivatives:
            return tensors_of(function(*inputs))
        inputs = [t.requires_grad_() for t in inputs]
        output = function(*inputs)
        # the same values in every precision
        ramp = torch.linspace(-1, 1, output.numel(), dtype=torch.float32, device=output.device).to(self.dtype)
        return [output, *torch.autograd.grad(output, inputs, ramp.to(output.dtype).view_as(output))]


@dataclass
class Session:
    """A case on one of the two extensions, for `time_together`."""

    case: Case
    ext: Any
    interrupted: int = 0
    spins: bool = False
    solo: bool = False

    def sample(self, n: int) -> list[float]:
        """Milliseconds of ``n`` runs."""
        gpu = self.case.inputs[0].is_cuda
        clock = time.perf_counter if gpu else time.thread_time
        times = []
        with extension(self.ext):
            for _ in range(n):
                start = clock()
                self.case.run()
                if gpu:
                    torch.cuda.synchronize()
                times.append(1e3 * (clock() - start))
        return times


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
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype)

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

    sizes = (0, 1, 200, 1000) if quick else (0, 1, 200, 1000, 5000)
    for count, whole, offset in itertools.product(sizes, (False, True), (0, 1)):
        label = f"{count} boxes{', whole px' * whole}, offset {offset}"
        call = partial(nms, iou_threshold=0.5, offset=offset)
        yield Case("nms", label, call, [make.boxes(count, whole=whole), make.scores(count)])
    for count, classes in ((1, 80), (1000, 80), (4000, 3), (12_000, 80))[: 3 if quick else 4]:
        scored = [make.boxes(count), make.scores(count), make.integers(classes, count)]
        call = partial(batched_nms, nms_cfg={"type": "nms", "iou_threshold": 0.6})
        yield Case("batched_nms", f"{count} boxes, {classes} classes", call, scored)
    for count, method, offset in itertools.product((0, 1, 200, 1000), ("naive", "linear", "gaussian"), (0, 1)):
        call = partial(soft_nms, iou_threshold=0.3, sigma=0.5, min_score=1e-3, method=method, offset=offset)
        scored = [make.boxes(count, whole=True), make.scores(count)]
        yield Case("soft_nms", f"{count} boxes, {method}, offset {offset}", call, scored)
    for count, whole in itertools.product((0, 1, 200, 1000), (False, True)):
        dets = torch.cat((make.boxes(count, whole=whole), make.scores(count).view(-1, 1)), dim=1)
        yield Case("nms_match", f"{count} boxes{', whole px' * whole}", partial(nms_match, iou_threshold=0.5), [dets])
    for dtype in HALF:
        boxes, scores = make.boxes(200).to(dtype), make.scores(200).to(dtype)
        yield Case("nms", "200 boxes", partial(nms, iou_threshold=0.5), [boxes, scores])
        yield Case("soft_nms", "200 boxes, linear", partial(soft_nms, iou_threshold=0.3), [boxes, scores])
        yield Case(
            "nms_match", "200 boxes", partial(nms_match, iou_threshold=0.5), [torch.cat((boxes, scores[:, None]), 1)]
        )


def roi_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import roi_align, roi_pool

    scale = 1 / 16

    def align(mode: str, aligned: bool, ratio: int, bins: int, channels: int, count: int, dtype: torch.dtype) -> Case:
        rois = make.rois(count, 2, dtype)
        label = f"{channels} channels, {count} RoIs, {bins}x{bins}, ratio {ratio}, aligned {aligned}"

        def call(features: Tensor) -> Tensor:
            return roi_align(features, rois.to(features.dtype), bins, scale, ratio, mode, aligned)

        features = [make.normal(2, channels, 50, 68, dtype=dtype)]
        return Case(f"roi_align {mode}", label, call, features, derivatives=True)

    channels, count = (32, 64) if quick else (64, 256)
    for mode, aligned, ratio, bins in itertools.product(("avg", "max"), (True, False), (0, 2), (7, 14)):
        if bins == 7 or (aligned and not quick):
            yield align(mode, aligned, ratio, bins, channels, count, torch.float32)
    for mode in ("avg", "max"):
        yield align(mode, True, 0, 7, 8, count, torch.float64)
        yield align(mode, True, 2, 7, 8, 0, torch.float32)
        yield align(mode, True, 2, 7, 8, 1, torch.float32)
    for dtype, ratio in itertools.product(HALF, (0, 2)):
        yield align("avg", True, ratio, 7, 8, count, dtype)
    for number, dtype in ((count, torch.float32), (0, torch.float32), (1, torch.float32), *((count, d) for d in HALF)):
        rois = make.rois(number, 2, dtype)
        yield Case(
            "roi_pool",
            f"{channels} channels, {number} RoIs, 7x7",
            lambda features, rois=rois: roi_pool(features, rois.to(features.dtype), 7, scale),
            [make.normal(2, channels, 50, 68, dtype=dtype)],
            partial(roi_pool_formula, rois=rois, bins=7, scale=scale),
            derivatives=True,
        )


def roi_pool_formula(features: Tensor, rois: Tensor, bins: int, scale: float) -> Tensor:
    """The greatest pixel of each bin, bin by bin; a RoI's last pixel belongs to it. Edges in float32, as there."""
    values, width = features.detach(), features.size(3)
    places = torch.full((len(rois), features.size(1), bins, bins), -1, device=features.device)
    for place, (image, *corners) in zip(places, rois.float().cpu(), strict=True):
        x1, y1, x2, y2 = ((torch.stack(corners) + torch.tensor([0, 0, 1, 1])) * scale).unbind()
        columns, rows = (spans(a, b, bins, size) for a, b, size in ((x1, x2, width), (y1, y2, values.size(2))))
        for (i, (top, bottom)), (j, (left, right)) in itertools.product(enumerate(rows), enumerate(columns)):
            if bottom > top and right > left:
                best = values[int(image), :, top:bottom, left:right].flatten(1).argmax(1)
                place[:, i, j] = (top + best // (right - left)) * width + left + best % (right - left)
    taken = features.flatten(2)[rois[:, 0].long()].gather(2, places.flatten(2).clamp(min=0)).view_as(places)
    return taken * (places >= 0)


def spans(low: Tensor, high: Tensor, bins: int, size: int) -> list[tuple[int, int]]:
    """First pixel and the one behind the last of each bin along one axis."""
    step = (high - low) / bins
    edges = ((int((n * step + low).floor()), int(((n + 1) * step + low).ceil())) for n in range(bins))
    return [(min(max(first, 0), size), min(max(last, 0), size)) for first, last in edges]


def convolution_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import deform_conv2d, masked_conv2d, modulated_deform_conv2d

    full, size = (16, 24) if quick else (64, 40)
    for stride, dilation, groups, deform_groups, scale, dtype in (
        (1, 1, 1, 1, 1.0, torch.float32),
        (1, 1, 1, 1, 0.0, torch.float32),  # offsets of zero, as training begins
        (2, 1, 1, 1, 3.0, torch.float32),
        (1, 2, 4, 2, 2.0, torch.float32),
        (1, 1, 2, 4, 2.0, torch.float64),
        *((1, 1, 1, 1, 1.0, dtype) for dtype in HALF),
    ):
        out, channels = (size - 1) // stride + 1, 16 if dtype in HALF else full
        x = make.normal(2, channels, size, size, dtype=dtype)
        offset = make.normal(2, deform_groups * 18, out, out, scale=scale, dtype=dtype)
        mask = make.normal(2, deform_groups * 9, out, out, dtype=dtype).sigmoid()
        weight = make.normal(channels, channels // groups, 3, 3, scale=0.1, dtype=dtype)
        bias = make.normal(channels, dtype=dtype)
        geometry = (stride, dilation, dilation, groups, deform_groups)
        label = (
            f"2x{channels}x{size}x{size}, 3x3, stride {stride}, dilation {dilation}, groups {groups}/{deform_groups}"
        )
        label += f", offsets of {scale:g} px"
        for name, function, inputs in (
            ("deform_conv2d", deform_conv2d, [x, offset, weight]),
            ("modulated_deform_conv2d", modulated_deform_conv2d, [x, offset, mask, weight, bias]),
        ):
            call = partial(call_with, function, geometry)
            yield Case(name, label, call, inputs, derivatives=True)
    for dtype in (torch.float32, *HALF):
        tensors = [make.normal(*shape, dtype=dtype) for shape in ((1, 64, 40, 40), (64, 64, 3, 3), (64,))]
        mask = make.uniform(1, 40, 40) > 0.7
        yield Case(
            "masked_conv2d",
            "64x40x40, 3x3, a third of the positions",
            lambda x, weight, bias, mask=mask: masked_conv2d(x, mask, weight, bias, 1),
            tensors,
            lambda x, weight, bias, mask=mask: F.conv2d(x, weight, bias, padding=1) * mask,
        )


def call_with(function: Callable[..., Tensor], options: tuple[Any, ...], *inputs: Tensor) -> Tensor:
    """Inputs, then options: an autograd function takes no keywords."""
    return function(*inputs, *options)


def other_cases(make: Inputs, quick: bool) -> Iterator[Case]:
    from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    many = 2000 if quick else 20_000
    losses = (
        ("sigmoid_focal_loss", sigmoid_focal_loss, sigmoid_formula),
        ("softmax_focal_loss", softmax_focal_loss, softmax_formula),
    )
    for (name, loss, formula), dtype in itertools.product(losses, (torch.float32, *HALF)):
        count = 100 if dtype in HALF else many  # mmcv adds losses up in their precision, float16 ends at 65504
        for samples, weight in ((count, None), (count, make.uniform(80)), (1, None)):
            logits, target = make.normal(samples, 80, scale=3.0, dtype=dtype), make.integers(80, samples)
            yield Case(
                name,
                f"{samples} x 80{', weighted' if weight is not None else ''}",
                lambda x, loss=loss, target=target, w=weight: loss(
                    x, target, 2.0, 0.25, None if w is None else w.to(x.dtype), "sum"
                ),
                [logits],
                partial(formula, target=target, weight=None if weight is None else weight.to(dtype)),
                derivatives=True,
            )
    shapes = torch.tensor([[32, 32], [16, 16], [8, 8], [4, 4]], device=make.device)
    starts = torch.tensor([0, 1024, 1280, 1344], device=make.device)
    queries = 100 if quick else 900
    for dtype in (torch.float32, *HALF):
        places, weights = make.uniform(2, queries, 8, 4, 4, 2), make.uniform(2, queries, 8, 4, 4).to(dtype)
        if dtype in HALF:  # exact, and off the kinks at pixels' centres, which are multiples of 1/64
            places = ((2 * (places * 128).floor() + 1) / 256).to(dtype)
        yield Case(
            "ms_deform_attn",
            f"{queries} queries, 4 levels, 8 heads of 32",
            lambda value, *rest: MultiScaleDeformableAttnFunction.apply(value, shapes, starts, *rest, 64),
            [make.normal(2, 1360, 8, 32, dtype=dtype), places, weights],
            partial(attention_formula, shapes=shapes.tolist()),
            derivatives=True,
        )


def sigmoid_formula(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Focal loss, eq. 5 of arXiv 1708.02002 term by term, gamma 2 and alpha 0.25."""
    is_target = F.one_hot(target, logits.size(1)).bool()
    p = torch.where(is_target, logits.sigmoid(), (-logits).sigmoid())
    loss = -torch.where(is_target, 0.25, 0.75) * (1 - p) ** 2 * p.log()
    return (loss if weight is None else loss * weight[target].view(-1, 1)).sum()


def softmax_formula(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The same of the target's probability in a softmax."""
    log_p = logits.log_softmax(1).gather(1, target.view(-1, 1)).view(-1)
    loss = -0.25 * (1 - log_p.exp()) ** 2 * log_p
    return (loss if weight is None else loss * weight[target]).sum()


def attention_formula(value: Tensor, places: Tensor, weights: Tensor, shapes: list[list[int]]) -> Tensor:
    """Eq. 3 of arXiv 2010.04159: the four pixels around each point by their bilinear weights, none outside."""
    batch, _, heads, depth = value.shape
    total = value.new_zeros(batch, places.size(1), heads, depth)
    maps = value.split([height * width for height, width in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        x, y = (places[:, :, :, level, :, i] * size - 0.5 for i, size in enumerate((width, height)))
        for right, low in itertools.product((0, 1), (0, 1)):
            column, row = x.floor() + right, y.floor() + low
            part = (1 - (x - column).abs()) * (1 - (y - row).abs())
            part = part * ((column >= 0) & (column < width) & (row >= 0) & (row < height))
            pixel = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            index = pixel.permute(0, 2, 1, 3).flatten(2).unsqueeze(3).expand(-1, -1, -1, depth)
            found = maps[level].transpose(1, 2).gather(2, index).view(batch, heads, -1, pixel.size(3), depth)
            total = total + (found.transpose(1, 2) * (part * weights[:, :, :, level]).unsqueeze(4)).sum(3)
    return total.flatten(2)


def compare(case: Case, compiled: Any, seconds: float) -> dict[str, Any]:
    """One row: differences and times of a case."""
    dtype = str(case.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"operator": case.operator, "dtype": dtype, "case": case.label}
    with extension(ops):
        ours = case.run()
        exact = case.exact() if case.half else None
    sessions, theirs = [Session(case, ops)], None
    try:
        with extension(compiled):
            theirs = case.run()
    except RuntimeError as error:
        if not NO_KERNEL.search(str(error)):
            raise
        row["compiled"] = str(error).strip().splitlines()[0]
    else:
        sessions.append(Session(case, compiled))
    if theirs is not None and exact is None:
        row |= {"against": "mmcv", **differences(ours, theirs)}
    else:
        if exact is None:
            if case.formula is None:
                raise NoCompiledMmcvError(f"{case.operator} ({case.label}) has nothing to be compared with here")
            exact = case.exact()
        row |= {"against": "formula" if case.formula else "float64", **differences(ours, exact)}
        if theirs is not None:
            row["mmcv_max_rel"] = differences(theirs, exact)["max_rel"]
    timings = time_together(sessions, seconds=seconds)
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
    """One row an operator, precision and reference; its times are sums over its cases."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in GROUP)].append(row)
    summary = []
    for key, mine in groups.items():
        total: dict[str, Any] = {**dict(zip(GROUP, key, strict=True)), "cases": len(mine)}
        total["differ"] = sum(not r["same_indices"] for r in mine)
        for name in ("max_abs", "max_rel", "mmcv_max_rel"):
            known = [r[name] for r in mine if r.get(name) is not None]
            total |= {name: max(known)} if known else {}
        total["ours_ms"] = round(sum(r["ours_ms"] for r in mine), 3)
        if all("mmcv_ms" in r for r in mine):
            total["mmcv_ms"] = round(sum(r["mmcv_ms"] for r in mine), 3)
            total["ratio"] = round(total["ours_ms"] / total["mmcv_ms"], 2)
        summary.append(total)
    return summary


def print_table(summary: list[dict[str, Any]], device: str) -> None:
    table = Table(title=f"prunet_zoo.mm.ops and compiled mmcv {version_of_mmcv()} on {device}; {datetime.date.today()}")
    formats = {
        "operator": "", "dtype": "", "against": "", "cases": "d", "differ": "d", "max_abs": ".1e", "max_rel": ".1e",
        "mmcv_max_rel": ".1e", "ours_ms": ".2f", "mmcv_ms": ".2f", "ratio": ".2f",
    }  # fmt: skip
    names = {"mmcv_max_rel": "mmcv rel", "ours_ms": "ms ours", "mmcv_ms": "ms mmcv"}
    for column, spec in formats.items():
        name = names.get(column, column.replace("_", " "))
        table.add_column(name, justify="right" if spec else "left", no_wrap=True)
    for row in summary:
        table.add_row(*(format(row[column], spec) if column in row else "" for column, spec in formats.items()))
    Console(width=130).print(table)


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
    cases = itertools.chain.from_iterable(group(make, args.quick) for group in groups)
    rows = [compare(case, compiled, seconds=0.05 if args.quick else 0.2) for case in cases]
    summary = summarise(rows)
    name = device_name() if args.device == "cuda" else f"{cpu_name()}, 1 thread"
    print_table(summary, name)
    if args.json:
        versions = {"mmcv": version_of_mmcv(), **{n: version(n) for n in ("torch", "torchvision", "numpy")}}
        command = shlex.join(["python", "benchmarks/mmcv_ops_parity.py", *(sys.argv[1:] if argv is None else argv)])
        about = {"command": command, "device": name, "date": str(datetime.date.today()), "versions": versions}
        write_json(args.json, {**about, "operators": summary, "cases": rows})


if __name__ == "__main__":
    run_tool(main)
