"""Parts of benchmarks/archtree_beam.py: what it holds out, equal time, rows of one setting, times over a stop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def bench(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("archtree_beam")


def test_held_out_images_are_not_trained_on(bench: ModuleType, grey_images: Path) -> None:
    data = bench.Data(grey_images, 5, seed=0)
    train, held = (part[0].float().mean((1, 2, 3)).round().tolist() for part in (data.train_part, data.held_part))
    assert len(train) == 8 and len(held) == 2 and not set(train) & set(held)
    first, again, other = (next(data.train(seed))[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def rows_of(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, seconds: Any) -> list[tuple[int, str]]:
    """B = 1 and B = 4 without networks; ``seconds``: of a tree with so many steps. Returns what is grown."""
    grown: list[tuple[int, str]] = []

    def grow(args, data, state, seed, name, **options):
        steps = options["recovery_steps"]
        grown.append((steps, name))
        bench.write_json(args.folder / name / "spec.json", {})
        total = 100.0 if options["beam"] == 4 else seconds(steps)
        return {
            "seed": seed, "name": name, "beam": options["beam"], "recovery_steps": steps, "top1": 90.0, "loss": 0.5,
            "top1_tree": 80.0, "nodes": 20, "steps": 20 * steps, "rounds": 2, "measurements": 10, "measure_s": 10.0,
            "train_s": total - 10, "total_s": total, "runs": 1, "target_ms": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(bench, "grow", grow)
    monkeypatch.setattr(bench, "create_model", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bench, "learn", lambda model, *_: model.state_dict())
    monkeypatch.setattr(bench, "save_weights", lambda *_: None)
    monkeypatch.setattr(bench, "score", lambda *_: (50.0, 1.0))
    monkeypatch.setattr(bench, "Data", lambda *_: SimpleNamespace(fixed=lambda part: [], test_part=None))
    monkeypatch.setattr(bench, "ms", lambda *_: {"median_ms": 1.4})
    monkeypatch.setattr(bench, "SpecNet", lambda *_: SimpleNamespace(groups=[0] * 10, spec=None))
    monkeypatch.setattr(bench, "time_parts", lambda *_: (0.5, 1.0))
    return grown


def arguments(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(folder=folder, data_root=None, images=5, epochs=1, steps=10, workers=1)


def test_greedy_pruning_is_given_the_time_that_the_tree_took(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    grown = rows_of(bench, monkeypatch, lambda steps: 70 + 9 * steps)
    wide, greedy = bench.run_seed(arguments(tmp_path), 0)
    assert (wide["beam"], greedy["beam"]) == (4, 1) and 0.9 <= greedy["time_ratio"] <= 1.1
    assert greedy["tries"][-1][1] == greedy["time_ratio"] and len(greedy["tries"]) == len(grown) - 1 > 1
    assert greedy["marks"] == wide["marks"] == "" and greedy["top1_start"] == 50.0
    before = len(grown)
    assert bench.run_seed(arguments(tmp_path), 0) == [wide, greedy] and len(grown) == before


def test_rows_off_in_time_or_stopped_on_their_way_are_marked(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    grown = rows_of(bench, monkeypatch, lambda steps: 170 + steps)  # too slow with one step already
    _, greedy = bench.run_seed(arguments(tmp_path), 0)
    assert greedy["time_ratio"] == 1.71 and greedy["marks"] == "1.71 of the time" and len(grown) <= 4
    assert bench.marks({"time_ratio": 1.0, "runs": 2}) == "stopped on its way"


def test_rows_of_other_settings_are_not_taken(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    grown = rows_of(bench, monkeypatch, lambda steps: 100.0)
    monkeypatch.setattr(bench, "measure_anew", lambda args, rows: None)
    monkeypatch.setattr(bench, "show", lambda rows, images: {"top1_beam4": rows[0]["top1"]})
    out = tmp_path / "out.json"

    def run(*options: str) -> dict[str, Any]:
        argv = ["archtree_beam.py", "--seeds", "1", "--work-dir", str(tmp_path), "--json", str(out), *options]
        monkeypatch.setattr(sys, "argv", argv)
        bench.main()
        return json.loads(out.read_text())

    first = run("--steps", "7")
    assert first["setting"]["steps"] == first["rows"][0]["recovery_steps"] == 7 and first["seeds"] == [0]
    assert "--steps 7" in first["command"] and first["device"] and first["date"]
    count = len(grown)
    assert run("--steps", "7")["rows"] == first["rows"] and len(grown) == count
    assert run("--steps", "8")["rows"][0]["recovery_steps"] == 8 and len(grown) > count


def test_times_of_measurements_outlive_a_stop(bench: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "ms", lambda spec, seconds: {"median_ms": seconds})
    watch = bench.Watch(SimpleNamespace(train=None), tmp_path)
    assert watch.services.measure(None)["median_ms"] > watch.services.measure(None, quick=True)["median_ms"]
    again = bench.Watch(SimpleNamespace(train=None), tmp_path)
    assert (again.count, again.runs) == (2, 2) and again.seconds == watch.seconds > 0
