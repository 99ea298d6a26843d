"""benchmarks/pas_cifar10.py: equal MACs for all methods, going on after a stop, and how settings are chosen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def pas(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("pas_cifar10")


def setting(work: Path, **changes: Any) -> argparse.Namespace:
    known = {
        "work": work, "first_seed": 0, "seeds": 1, "sweep_seed": 100, "images": 96, "pas_lr": 0.25,
        "epochs_pretrain": 1, "epochs": 2, "finetune": 1, "share": 0.5, "reg": 1e-3, "lr": 0.05,
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
    rows = pas.run(setting(tmp_path), noise(96), noise(40))
    assert [row["method"] for row in rows] == ["pas", "magnitude", "bn_scale"]
    assert all(0.96 < row["mmacs"] / (0.5 * row["start_mmacs"]) <= 1.0 for row in rows)
    assert len({row["start_top1"] for row in rows}) == 1
    monkeypatch.setattr(pas, "run_one", None)  # nothing is left to do
    assert pas.run(setting(tmp_path), noise(96), noise(40)) == rows
    summary = pas.summarise(rows)
    assert summary["pas_ahead"]["magnitude"]["mean"] == rows[0]["top1"] - rows[1]["top1"]


def test_a_row_is_filed_by_what_it_depends_on(pas: ModuleType, tmp_path: Path):
    def file(method: str, tests: int = 40, **changes: Any) -> Path:
        return pas.row_file(setting(tmp_path, **changes), 0, method, tests)

    assert file("bn_scale") != file("bn_scale", reg=0.1) and file("pas") == file("pas", reg=0.1)
    assert file("pas") != file("pas", pas_lr=1.0) and file("magnitude") == file("magnitude", reg=0.1, pas_lr=1.0)
    assert file("magnitude") != file("magnitude", tests=50) and file("magnitude") != file("magnitude", epochs=3)


def test_the_learning_rate_rises_and_falls(pas: ModuleType):
    rates = pas.cosine(0.1, 100)
    assert max(rates) == pytest.approx(0.1) and rates[0] < 0.03 and rates[-1] < 1e-3 and len(rates) == 100


def test_a_setting_is_chosen_on_another_seed_and_on_images_that_are_not_trained_on(
    pas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pas, "small_resnet", lambda: torch.nn.Linear(1, 1))
    monkeypatch.setattr(pas, "BATCH", 32)
    trained: list[int] = []
    monkeypatch.setattr(pas.Trainer, "run", lambda self, net, lrs: trained.append(len(self.labels)))
    asked: list[tuple[Any, ...]] = []

    def run_one(net, method, train, test, args, seed, tell):
        asked.append((method, args.reg, args.pas_lr, len(train[1]), len(test[1]), seed))
        return {"top1": 90 - abs(args.reg - 2e-3) * 1000 - abs(args.pas_lr - 0.5)}

    monkeypatch.setattr(pas, "run_one", run_one)
    images = {"train": noise(96), "held": noise(40)}
    found = pas.sweep(setting(tmp_path), "reg", images["train"], images["held"])
    assert found["best"] == 2e-3 and found["seed"] == 100 and found["held_images"] == 40
    assert found["top1"]["0.002"] == max(found["top1"].values()) and len(found["top1"]) == len(asked) == 5
    assert {(row[0], *row[3:]) for row in asked} == {("bn_scale", 96, 40, 100)}
    assert pas.sweep(setting(tmp_path), "pas_lr", images["train"], images["held"])["best"] == 0.5
    assert trained == [96]  # one start network for all
    assert pas.sweep(setting(tmp_path), "reg", images["train"], images["held"]) == found and len(asked) == 9


@pytest.mark.parametrize(
    ("option", "told"), [(["--sweep-seed", "1"], "a seed of the table"), (["--images", "49000"], "at most 48000")]
)
def test_what_would_spoil_a_choice_is_refused(pas: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys, option, told):
    monkeypatch.setattr(sys, "argv", ["pas_cifar10.py", *option])
    with pytest.raises(SystemExit):
        pas.main()
    assert told in capsys.readouterr().err


def test_the_chosen_setting_is_the_tables_and_stands_in_the_file(
    pas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[float, list[int]]] = []

    def run(args, train, test):
        seeds = list(range(args.first_seed, args.first_seed + args.seeds))
        seen.append((args.reg, seeds))
        row = {"seed": 3, "mmacs": 1.0, "start_mmacs": 2.0, "start_top1": 80.0, "seconds": 1.0}
        return [{**row, "method": m, "top1": args.reg * 1000} for m in args.methods]

    monkeypatch.setattr(pas, "run", run)
    monkeypatch.setattr(pas, "load_cifar", lambda *_: (noise(8), noise(8), noise(8)))
    out = tmp_path / "out.json"
    command = ["pas_cifar10.py", "--first-seed", "3", "--seeds", "2", "--sweep-reg", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--work", str(tmp_path)])
    pas.main()
    assert seen[-1] == (1e-2, [3, 4]) and all(seeds == [100] for _, seeds in seen[:-1])
    known = json.loads(out.read_text())
    assert known["setting"]["reg"] == known["sweeps"]["reg"]["best"] == 1e-2
    assert "--sweep-reg" in known["command"] and "--reg" not in known["command"].replace("--sweep-reg", "")
    assert "--first-seed 3 --seeds 2" in known["command"]
