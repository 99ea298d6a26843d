"""The benchmarks' own parts: what they measure is what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prunet_zoo.latency.measure import time_together

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prunode_cost", FOLDER / "prunode_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prunode_cost"] = module
    spec.loader.exec_module(module)
    return module


def test_memory_of_a_prunode_does_not_depend_on_the_number_of_widths(cost: ModuleType):
    x = torch.randn(2, cost.CHANNELS, 7, 7)

    def peak(method: str, count: int) -> float:
        widths = tuple(cost.D_MAX * i // count for i in range(1, count + 1))
        return cost.Step(cost.METHODS[method](widths), x).peak_mb()

    assert peak("prunode", 2) == peak("prunode", 16) > 0
    assert peak("paths", 8) > 2 * peak("paths", 2)
    assert peak("prunode", 8) < peak("masks", 8)


def test_a_step_can_be_timed(cost: ModuleType):
    step = cost.Step(cost.Prunode((256, 512)), torch.randn(1, cost.CHANNELS, 4, 4))
    (timing,) = time_together([step], seconds=0.02, min_rounds=2)
    assert timing.median_ms > 0 and timing.n >= 2


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_every_benchmark_says_how_it_is_called(name: str):
    text = (FOLDER / name).read_text()
    assert f"python benchmarks/{name}" in text and "--json" in text and "--quick" in text
