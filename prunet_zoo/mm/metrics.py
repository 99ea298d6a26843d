"""TopKAccuracy: the share of images whose label is among the k best scores, in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from prunet_zoo.errors import DataError
from prunet_zoo.registry import METRICS, register


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
