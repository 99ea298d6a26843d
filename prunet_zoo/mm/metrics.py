"""TopKAccuracy: the share of images whose label is among the k best scores, in percent. NoDetectionsHook: mAP 0."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from prunet_zoo.errors import DataError
from prunet_zoo.registry import HOOKS, METRICS, register


@register(METRICS)
class TopKAccuracy(BaseMetric):
    """Accuracy in percent, under the keys ``top1``, ``top5``, …

    Args:
        topk: which k; one greater than the number of classes is left out of the result.
        collect_device, prefix: MMEngine's.
    """

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Note for every image how many classes score higher than its label, and the number of classes."""
        for sample in data_samples:
            scores, label = sample["pred_scores"], sample["gt_label"]
            if label is None:
                raise DataError("accuracy needs labels, but the batch has none")
            # a class that ties with the label counts as better: equal scores everywhere are no knowledge
            better = int((scores >= scores[label]).sum()) - 1 if bool(torch.isfinite(scores).all()) else len(scores)
            self.results.append((better, len(scores)))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Percent of images for each k."""
        classes = results[0][1]
        return {
            f"top{k}": 100.0 * sum(better < k for better, _ in results) / len(results)
            for k in self.topk
            if k <= classes
        }


@register(HOOKS)
class NoDetectionsHook(Hook):
    """Where a detector finds nothing in any image, mmdet's `CocoMetric` gives no figures: this puts 0 in their place.

    The tools add it to every run. It changes the metrics before any other hook sees them: they are logged,
    ``save_best`` has its key, and ``metrics.json`` says 0.
    """

    priority = "HIGHEST"  # before RuntimeInfoHook notes them for the log

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._fill(runner.val_loop, metrics)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._fill(runner.test_loop, metrics)

    @staticmethod
    def _fill(loop: Any, metrics: dict[str, float] | None) -> None:
        evaluator = getattr(loop, "evaluator", None)
        if metrics is None or evaluator is None:
            return
        missing = [key for metric in evaluator.metrics for key in coco_keys(metric) if key not in metrics]
        if missing:
            metrics.update(dict.fromkeys(missing, 0.0))
            print_log("no box scored above score_thr: mAP 0", "current", logging.WARNING)


def coco_keys(metric: BaseMetric) -> Iterator[str]:
    """What mmdet's `CocoMetric` gives where there are detections; nothing of other metrics, or with ``format_only``."""
    mmdets = sys.modules.get("mmdet.evaluation.metrics.coco_metric")  # not loaded: it is another metric
    if mmdets is None or type(metric).compute_metrics is not mmdets.CocoMetric.compute_metrics or metric.format_only:
        return
    for kind in metric.metrics:
        if kind == "proposal_fast":  # counts by itself, also nothing
            continue
        if kind == "proposal":
            names = metric.metric_items or ["AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000"]
        else:
            items = metric.metric_items or ["mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"]
            classes = metric.dataset_meta["classes"] if metric.classwise else ()
            names = [*(f"{name}_precision" for name in classes), *(f"{kind}_{item}" for item in items)]
        yield from (f"{metric.prefix}/{name}" if metric.prefix else name for name in names)
