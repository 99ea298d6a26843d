"""benchmarks/pas_cifar10.py: equal MACs for all methods, the images' augmentation, and going on after a stop."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pas_cifar10", ROOT / "benchmarks" / "pas_cifar10.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pas_cifar10"] = module
    spec.loader.exec_module(module)
    return module


def setting(**changes: Any) -> argparse.Namespace:
    known = {
        "seeds": 1, "epochs_pretrain": 1, "epochs": 2, "finetune": 1, "share": 0.5, "reg": 1e-3, "lr": 0.05,
        "lr_search": 0.02, "lr_finetune": 0.02, "methods": ["pas", "magnitude", "bn_scale"],
    }  # fmt: skip
    return argparse.Namespace(**{**known, **changes})


def noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, 10, (count,), generator=draw)


def test_all_methods_end_at_half_of_the_macs_and_a_second_run_reads_them(
    pas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pas, "BATCH", 32)
    rows = pas.run(setting(), tmp_path, noise(96), noise(40))
    assert [row["method"] for row in rows] == ["pas", "magnitude", "bn_scale"]
    assert all(0.96 < row["mmacs"] / (0.5 * row["start_mmacs"]) <= 1.0 for row in rows)
    assert len({row["start_top1"] for row in rows}) == 1
    monkeypatch.setattr(pas, "run_one", None)  # nothing is left to do
    assert pas.run(setting(), tmp_path, noise(96), noise(40)) == rows
    summary = pas.summarise(rows)
    assert summary["pas_ahead"]["magnitude"]["mean"] == rows[0]["top1"] - rows[1]["top1"]


def test_augmented_images_are_crops_of_the_padded_ones_half_of_them_mirrored(pas: ModuleType):
    images = noise(200)[0]
    made = pas.augmented(images, torch.Generator().manual_seed(1))
    padded, mirrored = torch.nn.functional.pad(images, (4, 4, 4, 4)), 0
    for image, frame in zip(made, padded, strict=True):
        crops = frame.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        plain, flipped = ((crops == x[:, None, None]).all(-1).all(-1).all(0).any() for x in (image, image.flip(-1)))
        assert plain or flipped
        mirrored += bool(flipped)
    assert 70 < mirrored < 130


def test_the_learning_rate_rises_and_falls(pas: ModuleType):
    rates = pas.cosine(0.1, 100)
    assert max(rates) == pytest.approx(0.1) and rates[0] < 0.03 and rates[-1] < 1e-3 and len(rates) == 100
