"""Where a detector's time goes: one image through ``test_step``, split by the calls inside.

``preprocess``  ``data_preprocessor``: normalise and pad (decoding and resizing of an image file is not in it)
``backbone``    ``backbone``
``neck_head``   all the rest: neck, head, RoI pooling and second heads, building the results
``post``        ``predict_by_feat`` of every head: decoding of boxes, top k, NMS; of a region proposal network too

Latency does not depend on the weights, which may be random, but for one thing: how many boxes pass the score threshold
and NMS. To compare networks, post-processing is given fixed scores and boxes, the same for every network of the same
detector and input size, and so is a second stage, whose proposals follow from them. A trained detector keeps its own.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunet_zoo.errors import LatencyError

LATENCY_PARTS = {
    "preprocess": "preprocessing",
    "backbone": "backbone",
    "neck_head": "neck and head",
    "post": "post-processing",
}
_LEFT_OUT = "left out"  # what only the measurement needs
_LOGIT = -12.0  # of a score that passes no threshold: 6e-6
_PASSING = (0.1, 0.95)  # scores of the candidates


class Clock:
    """Nanoseconds spent in named calls; a timed call within another belongs to the outer one.

    On one CPU thread it is the CPU time of this thread, what the work takes when nothing else runs; else wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
        self.spent: dict[str, int] = {}
        self._inside = False

    def now(self) -> int:
        """Time in ns, when the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time_ns() if self.cpu_time else time.perf_counter_ns()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose time is added to ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, start = True, self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                self.spent[part] = self.spent.get(part, 0) + self.now() - start

        return run


class DetectorTimer:
    """A detector whose ``test_step`` on one image is timed in parts.

    Args:
        model: an mmdet detector on its device, in eval mode; its calls are replaced by timed ones.
        data: a batch of one image, as mmdet's pipelines give it (`one_image`).
        candidates: pairs of box and class whose score passes the threshold (see `fixed_maps`, `fixed_rois`); None: the
            detector's own scores and boxes.

    Raises:
        LatencyError: the detector has no head with ``predict_by_feat``.
    """

    def __init__(self, model: nn.Module, data: dict[str, Any], candidates: int | None = 1000) -> None:
        self.model: Any = model
        self.data = data
        self.clock = Clock(next(model.parameters()).device)
        self.runs: list[dict[str, float]] = []
        self._instrument(candidates)

    def _instrument(self, candidates: int | None) -> None:
        model, clock = self.model, self.clock
        heads = [module for module in model.modules() if hasattr(module, "predict_by_feat")]
        if not heads:
            raise LatencyError(f"{type(model).__name__} has no head with predict_by_feat, so its time cannot be split")
        model.data_preprocessor.forward = clock.timed("preprocess", model.data_preprocessor.forward)
        model.backbone.forward = clock.timed("backbone", model.backbone.forward)
        for head in heads:
            if candidates is None:
                head.predict_by_feat = clock.timed("post", head.predict_by_feat)
            else:
                proposals = head is getattr(model, "rpn_head", None)
                head.predict_by_feat = self._post(head.predict_by_feat, FixedOutputs(head, candidates, proposals))

    def _post(self, predict: Callable[..., Any], outputs: FixedOutputs) -> Callable[..., Any]:
        fix, post = self.clock.timed(_LEFT_OUT, outputs.put), self.clock.timed("post", predict)

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = fix(args, kwargs)
            return post(*args, **kwargs)

        return run

    def run(self) -> dict[str, float]:
        """Milliseconds of one image: each part, and ``total``."""
        # test_step writes into the samples
        data = {**self.data, "data_samples": copy.deepcopy(self.data["data_samples"])}
        self.clock.spent = {}
        with torch.no_grad():
            start = self.clock.now()
            self.model.test_step(data)
            total = self.clock.now() - start
        spent = self.clock.spent
        total -= spent.pop(_LEFT_OUT, 0)
        times = {part: spent.get(part, 0) for part in LATENCY_PARTS}
        times["neck_head"] = total - sum(spent.values())
        return {part: 1e-6 * ns for part, ns in {**times, "total": total}.items()}

    def sample(self) -> None:
        """Keep the times of one more run for `summary`."""
        self.runs.append(self.run())

    def summary(self) -> dict[str, float]:
        """Medians of the parts and the total over the third of the runs with the lowest total, which nothing disturbed;
        10th and 90th percentiles of the total over all runs; in ms."""
        quiet = sorted(self.runs, key=lambda run: run["total"])[: -(-len(self.runs) // 3)]
        totals = sorted(run["total"] for run in self.runs)
        last = len(totals) - 1
        return {
            **{f"{part}_ms": statistics.median(run[part] for run in quiet) for part in (*LATENCY_PARTS, "total")},
            "total_p10_ms": totals[round(0.1 * last)],
            "total_p90_ms": totals[round(0.9 * last)],
            "n": len(totals),
        }


def one_image(size: tuple[int, int]) -> dict[str, Any]:
    """A batch of one random image of (H, W) px, as mmdet's pipelines give it."""
    from mmdet.structures import DetDataSample

    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    about = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_id": 0}
    return {"inputs": [image], "data_samples": [DetDataSample(metainfo=about)]}


def count_macs(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-accumulates of convolutions and matrix products for one image: ``backbone`` and ``detector``."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.test_step(one_image(size))  # type: ignore[operator]
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    return {"backbone": counts[f"{type(model).__name__}.backbone"], "detector": counts["Global"]}


class FixedOutputs:
    """Puts the same scores and boxes into the arguments of a head's ``predict_by_feat`` at every call.

    Args:
        head: whose arguments they are.
        candidates: how many pass the threshold.
        proposals: the head is a region proposal network, whose threshold is a rank: all scores are random.
    """

    def __init__(self, head: nn.Module, candidates: int, proposals: bool) -> None:
        self.candidates = None if proposals else candidates
        self.distances = "Distance" in type(getattr(head, "bbox_coder", None)).__name__
        self._kept: dict[tuple[torch.Size, ...], Any] = {}

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other arguments: of a second stage the keyword ``cls_scores``, else the first two (scores, boxes)."""
        second_stage = "cls_scores" in kwargs
        given = kwargs["cls_scores"] if second_stage else args[0]
        key = tuple(scores.shape for scores in given)
        if key not in self._kept:
            self._kept[key] = self._rois(given) if second_stage else (self._maps(given), self._boxes(args[1]))
        if second_stage:
            return args, {**kwargs, "cls_scores": self._kept[key]}
        return (*self._kept[key], *args[2:]), kwargs

    def _rois(self, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(fixed_rois(scores, self.candidates or 0, seed) for seed, scores in enumerate(given))

    def _maps(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return fixed_maps(given, self.candidates, seed=0)

    def _boxes(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Boxes of ordinary size: deltas of an anchor, or distances of 1 to 4 strides (their unit, px, is kept)."""
        generator = torch.Generator().manual_seed(1)
        boxes = []
        for level, like in enumerate(given):
            stride = 8 * 2**level
            value = (
                stride * torch.empty(like.shape).uniform_(1.0, 4.0, generator=generator)
                if self.distances
                else 0.2 * torch.randn(like.shape, generator=generator)
            )
            boxes.append(value.to(like))
        return boxes


def fixed_maps(maps: Sequence[torch.Tensor], candidates: int | None, seed: int) -> list[torch.Tensor]:
    """Logits in the place of a head's score ``maps``, each (1, A·C, H, W), the same for the same shapes and seed.

    Args:
        maps: what the head gave.
        candidates: how many entries over all maps get scores between 0.1 and 0.95, at random places (drawn with
            repetition); the others' are below 1e-5. None: all are random.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [scores.numel() for scores in maps]
    if candidates is None:
        flat = torch.randn(sum(counts), generator=generator)
    else:
        flat = torch.full((sum(counts),), _LOGIT)
        chosen = torch.randint(sum(counts), (candidates,), generator=generator)
        flat[chosen] = torch.empty(candidates).uniform_(*_PASSING, generator=generator).logit()
    return [part.view(scores.shape).to(scores) for part, scores in zip(flat.split(counts), maps, strict=True)]


def fixed_rois(scores: torch.Tensor, candidates: int, seed: int) -> torch.Tensor:
    """Logits (N, C + 1), the last column background, for softmax: ``candidates`` of the N boxes (all, where there are
    fewer) get a class with a score between 0.1 and 0.95."""
    boxes, columns = scores.shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((boxes, columns), _LOGIT)
    logits[:, -1] = 0.0
    chosen = torch.randperm(boxes, generator=generator)[:candidates]
    labels = torch.randint(columns - 1, (len(chosen),), generator=generator)
    logits[chosen, labels] = torch.empty(len(chosen)).uniform_(*_PASSING, generator=generator).logit()
    return logits.to(scores)
