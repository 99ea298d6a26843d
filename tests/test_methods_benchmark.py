"""benchmarks/methods.py: all is alike but the method, baselines meet the budget, rows are resumed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config

from prunet_zoo.cost import MacsCost, cost_range, space_cost
from prunet_zoo.errors import LatencyError
from prunet_zoo.space import load_space
from prunet_zoo.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SPACE = load_space("prunet_cpu_small")
SETTING = {"device": "here", "backend": "torch", "backend_version": "1", "threads": 1, "dtype": "fp32", "batch": 1}
# the tools, without their work; both append their arguments to calls.jsonl
TOOL = """
import json, pathlib, sys
argv = sys.argv[1:]
work = pathlib.Path(argv[argv.index("--work-dir") + 1])
work.mkdir(parents=True, exist_ok=True)
with open("calls.jsonl", "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).stem, *argv]) + "\\n")
if pathlib.Path("fail").is_file() and pathlib.Path("fail").read_text() in str(work):
    sys.exit("error: it broke")
"""
SEARCH = """
import shutil
report = {"seconds": 5.0, "search_seconds": 7.0, "status": "measured", "macs": 5, "params": 9, "peak_mb": 100.0,
          "top1_inherited": 80.0}
(work / "report.json").write_text(json.dumps(report))
shutil.copy("spec.json", work / "spec.json")
"""
TRAIN = """
top1 = 90.0 + ("--weights" in argv) + int(argv[argv.index("--seed") + 1])
(work / "metrics.json").write_text(json.dumps({"metrics": {"top1": top1}, "seconds": 3.0}))
"""


class Table(MacsCost):
    """Says of itself that it was measured here; its unit is the MMACs of a network."""

    unit = "ms"

    def describe(self) -> dict[str, Any]:
        return {**SETTING, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def methods(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("methods")


def record(spec: Any) -> dict[str, Any]:
    ms = MacsCost()(spec)
    bounds = {"median_ms": ms, "ci_low_ms": 0.999 * ms, "ci_high_ms": 1.001 * ms}
    return {**SETTING, **bounds, "disturbed": [], "spec_hash": spec.hash, "date": "2026-01-01T00:00"}


@pytest.fixture
def bench(methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose tools do nothing, a table of MACs, and measurements that are MACs."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "search.py").write_text(TOOL + SEARCH)
    (tmp_path / "tools" / "train.py").write_text(TOOL + TRAIN)
    found = SPACE.decode(SPACE.sample(random.Random(1)), "found")
    (tmp_path / "spec.json").write_text(found.to_json())
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["digit_scenes"], "ROOT", tmp_path)
    monkeypatch.setattr(methods, "make_table", lambda args, space: (Path("table.jsonl"), Table()))
    monkeypatch.setattr(methods, "measure_like", lambda spec, source: record(spec))
    monkeypatch.setattr(methods, "measure_anew", lambda specs, table: [record(load_spec(str(s))) for s in specs])
    monkeypatch.setattr(methods.torch, "set_num_threads", lambda count: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--quick", "--json", "out.json", "--target-ms", "5.0", "--work-dir", "w"]


def calls(bench: Path) -> list[list[str]]:
    return [json.loads(line) for line in (bench / "calls.jsonl").read_text().splitlines()]


def after(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def test_rows_of_all_methods_and_baselines(methods: ModuleType, bench: Path, capsys: pytest.CaptureFixture[str]):
    assert methods.main([*QUICK, "--seeds", "2"]) == 0
    out = json.loads((bench / "out.json").read_text())
    assert [(r["method"], r["seed"]) for r in out["rows"]] == [
        (method, seed) for method in (*methods.METHODS, *methods.BASELINES) for seed in (0, 1)
    ]
    for row in out["rows"]:
        assert {"method", "seed", "top1", "target_ms", "latency_ms", "search_s", "peak_mb"} <= set(row)
        if row["method"] in methods.BASELINES:  # they meet the budget, and there is nothing to inherit
            assert row["within"] and row["top1_inherited"] is None and row["peak_mb"] is None
            assert row["top1"] == 90.0 + row["seed"]
        else:
            assert (row["search_s"], row["peak_mb"], row["top1"]) == (7.0, 100.0, 91.0 + row["seed"])
    tiered = out["summary"][0]
    assert (tiered["top1"], tiered["top1_range"], tiered["seeds"]) == (91.5, [91.0, 92.0], 2)
    assert (bench / "out.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "archtree" in shown and "uniform" in shown and str(bench) not in (bench / "out.json").read_text()


def test_searches_differ_in_the_method_alone(methods: ModuleType, bench: Path):
    methods.main(QUICK)
    searches = [call for call in calls(bench) if call[0] == "search"]
    assert [after(call, "search").split("/")[-1].split("_")[0] for call in searches] == list(methods.METHODS)
    same = {tuple(w for w in call[2:] if "strategy." not in w and w != after(call, "--work-dir")) for call in searches}
    assert len(same) == 1
    trainings = {after(call, "--work-dir").split("/")[1]: call for call in calls(bench) if call[0] == "train"}
    epochs = {name: next(w for w in call if "max_epochs" in w) for name, call in trainings.items()}
    assert {epochs[f"{m}_0"] for m in methods.METHODS} == {"train_cfg.max_epochs=2"}
    assert {epochs[f"{m}_0"] for m in methods.BASELINES} == {
        "train_cfg.max_epochs=6"
    }  # as search and training together
    assert all(("--weights" in call) == (name[:-2] in methods.METHODS) for name, call in trainings.items())


def test_what_differs_from_the_configs_is_told_and_held_to(methods: ModuleType, bench: Path, monkeypatch):
    methods.main(QUICK)
    out = json.loads((bench / "out.json").read_text())
    assert out["strategy"]["archtree"] == list(methods.SMALL_TREE)
    assert set(out["epochs_are"]) == {"all", *methods.METHODS}
    monkeypatch.setitem(methods.QUICK_OPTIONS, "archtree", ("beam=3",))
    with pytest.raises(methods.RunError, match=r"strategy: .*beam=1.*beam=3.* here"):
        methods.main(QUICK)


def test_from_scratch_all_are_trained_alike(methods: ModuleType, bench: Path):
    methods.main([*QUICK, "--start", "scratch"])
    trainings = [call for call in calls(bench) if call[0] == "train"]
    assert not any("--weights" in call for call in trainings)
    assert {next(w for w in call if "max_epochs" in w) for call in trainings} == {"train_cfg.max_epochs=2"}


def test_it_goes_on_and_mixes_no_settings(methods: ModuleType, bench: Path):
    (bench / "fail").write_text("pas_0/train")
    with pytest.raises(methods.RunError, match="pas seed 0: training failed: error: it broke"):
        methods.main(QUICK)
    assert not (bench / "out.json").exists()
    (bench / "fail").unlink()
    before = len([call for call in calls(bench) if call[0] == "train"])
    assert methods.main(QUICK) == 0
    trained = [after(call, "--work-dir") for call in calls(bench) if call[0] == "train"][before:]
    assert 0 < len(trained) < 6 and "w/pas_0/train" in trained  # what was finished is not trained again
    with pytest.raises(methods.RunError, match=r"target_ms: 5\.0 there, 4\.0 here"):
        methods.main([*QUICK[:4], "4.0", "--work-dir", "w"])
    assert methods.main([*QUICK[:3], *QUICK[5:]]) == 0  # without a target: that of the folder's rows
    (bench / "w/tiered_0/search/report.json").write_text("{")
    monkey = [*QUICK, "--methods", "random"]
    assert methods.main(monkey) == 0  # others' rows are not read
    (bench / "w/random_0/train/metrics.json").write_text("{")
    with pytest.raises(methods.RunError, match="remove the folder and run again"):
        methods.main(monkey)
    with pytest.raises(methods.RunError, match="--epochs must be 1 or more"):
        methods.main([*QUICK, "--epochs", "0"])


LOW, HIGH = (end[0] for end in cost_range(MacsCost(), SPACE))


@settings(max_examples=20, deadline=None)
@given(aim=st.floats(2.5, 8.0), seed=st.integers(0, 3))
def test_random_networks_cost_what_is_asked_for(methods: ModuleType, aim: float, seed: int):
    encoding = methods.draw_random(SPACE, MacsCost(), seed, aim, 0.97)
    assert 0.97 * aim < space_cost(MacsCost(), SPACE, encoding) <= aim
    assert methods.draw_random(SPACE, MacsCost(), seed, aim, 0.97) == encoding


@settings(max_examples=30, deadline=None)
@given(aim=st.floats(1.6, HIGH))  # between 1.51 and 1.53 there is none: the next factor costs 10% more
def test_uniform_widths_are_uniform_but_for_a_step(methods: ModuleType, aim: float):
    cost = MacsCost()
    encoding = methods.scale_uniformly(SPACE, cost, aim, 0.9)
    assert 0.9 * aim < space_cost(cost, SPACE, encoding) <= aim
    grids = [la.candidate_widths(c) for la, (c, _) in zip(SPACE.layers, encoding, strict=True)]
    shares = [(grid.index(w) + 1) / len(grid) for grid, (_, w) in zip(grids, encoding, strict=True)]
    coarsest = max(1 / len(grid) for grid in grids)
    assert max(shares) - min(shares) <= 2 * coarsest
    assert [c for c, _ in encoding] == [c for c, _ in SPACE.largest()]


def test_budgets_out_of_reach_are_named(methods: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "DRAWS", 50)
    with pytest.raises(LatencyError, match="none of 50 random networks"):
        methods.draw_random(SPACE, MacsCost(), 0, LOW / 2, 0.97)
    with pytest.raises(LatencyError, match="at its least widths costs more than"):
        methods.scale_uniformly(SPACE, MacsCost(), LOW / 2, 0.97)
    with pytest.raises(LatencyError, match="no network of uniform width costs about"):
        methods.scale_uniformly(SPACE, MacsCost(), 2 * HIGH, 0.97)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_option_changes_something_that_the_config_or_strategy_has(
    methods: ModuleType, data: str, quick: bool, tmp_path: Path
):
    about = {"work": tmp_path, "data": data, "quick": quick, "epochs": 3, "train_epochs": 2, "images": 5, "batch": 8}
    args = SimpleNamespace(**about, start="inherited", target_ms=0.1, data_root=tmp_path)
    jobs = [methods.search_job(args, m, 0, tmp_path / "t") for m in methods.METHODS]
    for job in [*jobs, methods.train_job(args, "tiered", 0)]:
        cfg = Config.fromfile(ROOT / job.command[1])
        for option in job.command[job.command.index("--cfg-options") + 1 :]:
            *path, last = option.partition("=")[0].split(".")
            place: Any = cfg
            for key in path:
                place = place[int(key)] if key.isdigit() else place[key]
            if "strategy" in path:
                import inspect

                from prunet_zoo import search

                assert last in inspect.signature(getattr(search, place.type)).parameters, option
            else:
                assert last in place or last in ("max_per_class", "val_begin"), option
