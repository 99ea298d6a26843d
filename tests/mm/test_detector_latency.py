"""How a detector's latency is split, and the fixed scores that make its post-processing comparable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope

from prunet_zoo.errors import LatencyError
from prunet_zoo.mm.cli import load_config
from prunet_zoo.mm.detector_latency import (
    LATENCY_PARTS,
    Clock,
    DetectorTimer,
    count_macs,
    fixed_maps,
    fixed_rois,
    one_image,
)
from prunet_zoo.mm.training import network_macs

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detection"
SIZE = (96, 128)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def detector(name: str) -> Any:
    from mmdet.registry import MODELS

    from prunet_zoo.mm.network import register_mmdet

    register_mmdet()
    cfg = load_config(CONFIGS / f"{name}_digit-scenes.py")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg.model).eval()


@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), n=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_no_more_than_the_candidates_pass(shapes: list[tuple[int, int]], n: int) -> None:
    maps = [torch.randn(1, 6, *shape) for shape in shapes]
    fixed = fixed_maps(maps, n, seed=0)
    assert [m.shape for m in fixed] == [m.shape for m in maps]
    scores = torch.cat([m.sigmoid().flatten() for m in fixed])
    passing = int((scores > 0.05).sum())
    assert passing <= n and (passing > 0) == (n > 0) and bool((scores[scores <= 0.05] < 1e-4).all())
    again = fixed_maps([torch.zeros_like(m) for m in maps], n, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(fixed, again, strict=True))


@given(boxes=st.integers(1, 30), classes=st.integers(1, 9), n=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_candidates_of_a_second_stage(boxes: int, classes: int, n: int) -> None:
    scores = fixed_rois(torch.randn(boxes, classes + 1), n, seed=0).softmax(-1)[:, :-1]
    assert int((scores > 0.05).sum()) == min(n, boxes)


@pytest.mark.parametrize(
    "name", ["retinanet_prunet-cpu-small_fpn", "rtmdet_prunet-cpu-small", "faster-rcnn_prunet-cpu-small_fpn"]
)
def test_the_parts_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts its own readings: each part is there, nothing is counted twice, the rest is the neck."""
    timer = DetectorTimer(detector(name), one_image(SIZE), candidates=50)
    ticks = iter(range(0, 10**12, 10**6))  # 1 ms from one reading to the next
    monkeypatch.setattr(timer.clock, "now", lambda: next(ticks))
    run = timer.run()
    heads = 2 if name.startswith("faster") else 1
    assert run["preprocess"] == run["backbone"] == pytest.approx(1.0) and run["post"] == pytest.approx(heads)
    assert sum(run[part] for part in LATENCY_PARTS) == pytest.approx(run["total"])
    timer.sample()
    assert timer.summary()["total_ms"] == pytest.approx(run["total"]) and timer.summary()["n"] == 1


def test_other_weights_give_the_same_number_of_boxes() -> None:
    found, proposals = [], []
    for seed in (0, 1):
        model = detector("faster-rcnn_prunet-cpu-small_fpn")
        torch.manual_seed(seed)
        model.rpn_head.init_weights()
        for parameter in model.rpn_head.parameters():
            torch.nn.init.normal_(parameter, std=seed + 0.1)
        timer = DetectorTimer(model, one_image(SIZE), candidates=20)
        roi_head = model.roi_head.predict

        def predict(x: Any, results: Any, *args: Any, roi_head: Any = roi_head, **kwargs: Any) -> Any:
            proposals.append(results[0].bboxes)
            return roi_head(x, results, *args, **kwargs)

        model.roi_head.predict = predict
        with torch.no_grad():
            found.append(len(model.test_step({**timer.data})[0].pred_instances))
    assert torch.equal(*proposals) and len(proposals[0]) > 20
    assert 0 < found[0] <= 20


def test_the_quieter_third_counts() -> None:
    timer = DetectorTimer(detector("retinanet_prunet-cpu-small_fpn"), one_image(SIZE))
    timer.runs = [
        {**dict.fromkeys(LATENCY_PARTS, float(t)), "total": 4.0 * t} for t in (1, 2, 3, 50, 60, 70, 80, 90, 100)
    ]
    summary = timer.summary()
    assert (summary["total_ms"], summary["backbone_ms"]) == (8.0, 2.0)
    assert summary["total_p90_ms"] == 360.0


def test_a_clock_restores_itself_after_an_error() -> None:
    clock = Clock(torch.device("cpu"))

    def fail() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        clock.timed("a", fail)()
    clock.timed("b", lambda: None)()
    assert set(clock.spent) == {"a", "b"}


def test_macs_of_the_backbone_are_the_specs() -> None:
    model = detector("retinanet_prunet-cpu-small_fpn")
    counted = count_macs(model, (64, 64))
    assert counted["backbone"] == network_macs(model.backbone, 64) < counted["detector"]


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(LatencyError, match="no head with predict_by_feat"):
        DetectorTimer(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), one_image(SIZE))
