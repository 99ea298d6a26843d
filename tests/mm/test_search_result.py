"""The end of a search: what is measured, kept and said, with measurements that the test makes up."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from prunet_zoo import load_space
from prunet_zoo.errors import LatencyError, TrainingError, UnknownNameError
from prunet_zoo.latency import Record
from prunet_zoo.latency.predictor import Predictor
from prunet_zoo.mm import latency_cost, search, search_choice
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.latency_cost import START_FILE, make_cost
from prunet_zoo.mm.search import _finished, set_target
from prunet_zoo.mm.search_choice import Chosen, choose, why_not_measured
from prunet_zoo.mm.search_loop import check_cost_config
from prunet_zoo.search import MacsCost, cost_range
from prunet_zoo.search.adjust import LOWEST, adjust_widths
from prunet_zoo.search.strategy import MeasuredChoice
from prunet_zoo.search.target import summary

SPACE = load_space("prunet_cpu_small")
TARGET = 5.0
REPORT: dict[str, Any] = {
    "name": "net",
    "status": "predicted",
    "reason": "",
    "verify": 6,
    "unit": "ms",
    "target": TARGET,
    "predicted": 4.9,
    "measured": None,
    "params": 1000,
    "macs": 2000,
}


def searching(latency: dict[str, Any]) -> Config:
    """The config of a search, as far as it is looked at before data and model are."""
    loop = dict(type="SearchLoop", max_epochs=4, strategy=dict(type="TieredPruning"), latency=latency)
    return Config(dict(runner_type="SuperNetRunner", model=dict(type="SuperNetClassifier"), train_cfg=loop))


RECORD = Record(
    median_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, p10_ms=1.0, p90_ms=1.0, n=9, rounds=3, warmup_runs=2,
    spec_name="net", spec_hash="", spec=None, input_size=(32, 32), device="here", accelerator="cpu", backend="torch",
    backend_version="1", dtype="fp32", batch=1, threads=1, memory_format="contiguous", disturbed=(), attempts=1,
    clock={}, fingerprint={}, date="2026-01-01T00:00:00",
).to_dict()  # fmt: skip


class Table(MacsCost):
    """Says of itself that it was measured on this machine."""

    unit = "ms"

    def describe(self) -> dict[str, Any]:
        return {"backend": "torch", "device": "here", "threads": 1, "batch": 1, "dtype": "fp32", "accelerator": "cpu"}


class Strategy:
    """Adjusts a fixed architecture, as the end of a search does."""

    lowest = LOWEST

    def __init__(self) -> None:
        self.found = SPACE.sample(random.Random(3))

    def status(self) -> dict[str, float]:
        return {"target": TARGET}

    def measured_choice(self) -> None:
        return None

    def missed(self) -> str | None:
        return None

    def finish(self, target: float | None = None, share: float = LOWEST):
        return adjust_widths(SPACE, MacsCost(), self.found, target or TARGET, 0.1, share=share)


def loop(verify: int, cost: MacsCost | None = None) -> SimpleNamespace:
    searched = SimpleNamespace(space=SPACE)
    return SimpleNamespace(strategy=Strategy(), cost=cost or Table(), verify=verify, searched=searched)


def fake_measure(monkeypatch: pytest.MonkeyPatch, factor) -> list[float]:
    """The device is ``factor(measurements made)`` off; returns the list of measurements made."""
    made: list[float] = []

    def measure_like(spec, source):
        made.append(MacsCost()(spec) * factor(len(made)))
        low, high = made[-1] * 0.999, made[-1] * 1.001
        return {**RECORD, "median_ms": made[-1], "ci_low_ms": low, "ci_high_ms": high, "disturbed": []}

    monkeypatch.setattr(search_choice, "measure_like", measure_like)
    monkeypatch.setattr(search_choice, "why_not_measured", lambda source: None)
    return made


def told(chosen: search_choice.Chosen, **more: Any) -> str:
    report = {"name": "net", "unit": "ms", "target": TARGET, "predicted": 4.9, "params": 1, "macs": 1, **more}
    report |= {"measured": chosen.measured, "status": chosen.status, "reason": chosen.reason}
    return summary({**report, "tries": chosen.tries})


@pytest.mark.parametrize("off", [0.8, 0.95, 1.06, 1.3])
def test_a_biased_table_is_corrected_until_the_target_is_met(monkeypatch, tmp_path: Path, off: float):
    fake_measure(monkeypatch, lambda n: off)
    chosen = choose(loop(4), tmp_path / "trials.json")
    measured = off * MacsCost()(SPACE.decode(chosen.encoding))
    assert chosen.status == "measured" and chosen.reason is None
    assert 0.97 * TARGET < measured <= TARGET and chosen.measured["median_ms"] == measured
    assert chosen.correction == pytest.approx(off, rel=1e-6) and len(chosen.trials) == 2
    assert chosen.trials[-1]["measured"] == pytest.approx(chosen.correction * chosen.trials[-1]["predicted"])
    line = told(chosen)
    assert f"measured {measured:.4g} ms (95% interval" in line and "2 networks tried)" in line and "missed" not in line


def test_without_verify_the_tables_word_is_taken_and_the_miss_is_told(monkeypatch, tmp_path: Path):
    fake_measure(monkeypatch, lambda n: 2.0)
    chosen = choose(loop(0), tmp_path / "trials.json")
    assert chosen.encoding == Strategy().finish() and not chosen.trials and chosen.correction == 1.0
    assert chosen.status.startswith("missed: the table's word was taken (--verify 0)")
    assert not (tmp_path / "trials.json").exists() and chosen.status in told(chosen)
    fake_measure(monkeypatch, lambda n: 0.999)
    assert choose(loop(0), tmp_path / "trials.json").status == "measured"


def test_a_run_stopped_here_goes_on_with_the_same_figures(monkeypatch, tmp_path: Path):
    path = tmp_path / "trials.json"
    fake_measure(monkeypatch, lambda n: 1.2)
    whole = choose(loop(3), tmp_path / "whole.json")

    def killed(n: int) -> float:
        if n == 3:
            raise KeyboardInterrupt
        return 1.2

    fake_measure(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        choose(loop(3), path)
    kept = json.loads(path.read_text())
    assert len(kept) == 3
    made = fake_measure(monkeypatch, lambda n: 1.2)
    assert choose(loop(3), path) == whole
    assert len(made) == 1 and json.loads(path.read_text())[:3] == kept  # what was measured is not measured again
    made = fake_measure(monkeypatch, lambda n: 9.9)
    assert choose(loop(3), path) == whole and not made


def test_more_tries_go_on_where_the_first_ended(monkeypatch, tmp_path: Path):
    path = tmp_path / "trials.json"
    fake_measure(monkeypatch, lambda n: 1.3)
    first = choose(loop(1), path)
    assert first.status.startswith("missed: 1 network was measured (--verify 1), the nearest is")
    count = len(json.loads(path.read_text()))
    fake_measure(monkeypatch, lambda n: 1.3)
    second = choose(loop(4), path)
    assert second.status == "measured" and second.trials[0] == first.trials[0]
    assert len(json.loads(path.read_text())) > count


def test_a_damaged_trials_file_is_told_and_one_of_another_search_is_not_used(monkeypatch, tmp_path: Path):
    path = tmp_path / "trials.json"
    made = fake_measure(monkeypatch, lambda n: 1.0)
    row = {"spec_hash": "another", "record": RECORD}
    for text, what in (
        ("[{", "line 1"),
        ("{}", "no JSON list"),
        ("[1]", "row 1 has no spec_hash"),
        ('[{"record": {}}]', "row 1 has no spec_hash"),
        (json.dumps([row, {"spec_hash": "a"}]), "latency record"),
        (json.dumps([row, {**row, "record": {}}]), "median_ms"),
        (json.dumps([{**row, "record": {**RECORD, "disturbed": None}}]), "disturbed"),
        (json.dumps([{**row, "record": {**RECORD, "ci_low_ms": "1"}}]), "ci_low_ms"),
        (json.dumps([{**row, "record": {**RECORD, "median_ms": 0.0}}]), "latency of 0"),
    ):
        path.write_text(text)
        with pytest.raises(TrainingError, match=rf"(?s)trials\.json is damaged .*{what}.* remove it"):
            choose(loop(3), path)
    path.write_text(json.dumps([row]))
    assert choose(loop(3), path).status == "measured" and len(made) == 2


def test_a_target_out_of_reach_is_told(monkeypatch, tmp_path: Path):
    (low, _), _ = cost_range(MacsCost(), SPACE)
    assert low < TARGET / 10
    fake_measure(monkeypatch, lambda n: 100.0)
    chosen = choose(loop(3), tmp_path / "trials.json")
    assert "out of reach" in chosen.status and chosen.status in told(chosen)


def test_disturbed_measurements_that_agree_are_taken_and_told(monkeypatch, tmp_path: Path):
    fake_measure(monkeypatch, lambda n: 1.0)
    clean = search_choice.measure_like
    disturb = lambda spec, source: {**clean(spec, source), "disturbed": ["steal"]}  # noqa: E731
    monkeypatch.setattr(search_choice, "measure_like", disturb)
    chosen = choose(loop(3), tmp_path / "trials.json")
    assert chosen.status == "measured" and chosen.reason == "although disturbed, its repeats agree: steal"
    assert chosen.reason in told(chosen)


@pytest.mark.parametrize(("off", "status"), [(0.999, "measured"), (1.2, "missed")])
def test_without_verify_a_disturbed_measurement_is_told(monkeypatch, tmp_path: Path, off: float, status: str):
    fake_measure(monkeypatch, lambda n: off)
    clean = search_choice.measure_like
    monkeypatch.setattr(search_choice, "measure_like", lambda *a: {**clean(*a), "disturbed": ["steal"]})
    chosen = choose(loop(0), tmp_path / "trials.json")
    assert chosen.status.startswith(status) and "the measurement was disturbed: steal" in chosen.reason
    assert chosen.reason in told(chosen)


@pytest.mark.parametrize(
    ("predictor", "driver", "is_it"),
    [
        ("v100-tensorrt-fp16", "Tesla V100-SXM2-16GB", True),
        ("v100-pytorch-fp16", "Tesla V100-PCIE-32GB", True),
        ("a100-tensorrt-fp16", "NVIDIA A100-SXM4-80GB", True),
        ("a100-pytorch-fp16", "A100-SXM4-40GB", True),
        ("v100-tensorrt-fp16", "NVIDIA A100-SXM4-40GB", False),
        ("a100-tensorrt-fp16", "NVIDIA H200", False),
    ],
)
def test_a_predictors_device_is_known_by_the_name_that_its_driver_gives(monkeypatch, predictor, driver, is_it):
    stand_in = SimpleNamespace(check=lambda setting: None, device_name=lambda accelerator: driver)
    monkeypatch.setattr(search_choice, "get_backend", lambda name: stand_in)
    why = why_not_measured(Predictor.load(predictor).describe())
    assert (why is None) is is_it, why


@pytest.mark.parametrize("latency", [dict(type="macs"), dict(type="predictor", device="v100-tensorrt-fp16")])
def test_a_table_is_refused_where_no_measured_latencies_are_searched_for(tmp_path: Path, latency: dict):
    table = tmp_path / "table.jsonl"
    cfg = searching(latency)
    with pytest.raises(LatencyError, match=r"table SPACE --out .*table\.jsonl$"):
        set_target(cfg, None, table)
    table.touch()
    with pytest.raises(ConfigError, match=f"--table gives measured latencies, but .*type='{latency['type']}'"):
        set_target(cfg, None, table)
    for field in ("table", "device"):
        with pytest.raises(ConfigError, match=f"type='macs' has no use for {field}"):
            check_cost_config({"type": "macs", field: "x"})


def test_macs_and_other_devices_are_predicted(tmp_path: Path):
    macs = choose(loop(6, MacsCost()), tmp_path / "trials.json")
    assert macs.status == "predicted" and macs.measured is None and macs.encoding == Strategy().finish()
    assert "not measured" not in told(macs, unit="MMACs") and "not measured" in told(macs)
    why = why_not_measured(Table().describe())  # another machine's
    assert why is not None and why.startswith("the latencies are of here with torch, which this machine lacks: it has ")
    assert why_not_measured({**Table().describe(), "device": why.rpartition("it has ")[2]}) is None
    why = why_not_measured(Predictor.load("v100-tensorrt-fp16").describe())
    assert why is not None and "V100" in why
    assert choose(loop(6), tmp_path / "trials.json").status == "predicted"
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_missed_by_the_costs_word_is_told(tmp_path: Path):
    run = loop(6, MacsCost())
    run.strategy.missed = lambda: "the width grid is too coarse here"
    chosen = choose(run, tmp_path / "trials.json")
    assert chosen.status == "missed: the width grid is too coarse here" and chosen.measured is None
    assert chosen.status in told(chosen, unit="MMACs")
    assert "not measured: what was searched for is no latency; missed: the width grid" in told(chosen)


def test_without_verify_the_methods_own_range_counts(monkeypatch, tmp_path: Path):
    run = loop(0)
    off = 0.96 * TARGET / MacsCost()(SPACE.decode(run.strategy.finish()))
    fake_measure(monkeypatch, lambda n: off)
    assert choose(run, tmp_path / "trials.json").status.startswith("missed: the table's word was taken")
    run.strategy.lowest = 0.95
    assert choose(run, tmp_path / "trials.json").status == "measured"


def test_unknown_cost_type_is_named():
    with pytest.raises(LatencyError, match="'watts'"):
        make_cost(SPACE, "unused", type="watts")


def test_a_predictor_takes_the_place_of_a_table(tmp_path: Path):
    latency = dict(type="latency", backend="onnxruntime", threads=1)
    cfg = searching(latency)
    with pytest.raises(ConfigError, match="exclude each other"):
        set_target(cfg, None, tmp_path / "table.jsonl", device="v100-tensorrt-fp16")
    set_target(cfg, 0.6, None, device="v100-tensorrt-fp16")
    assert cfg.train_cfg.latency == dict(type="predictor", device="v100-tensorrt-fp16")
    assert cfg.train_cfg.strategy.target == 0.6
    cost = make_cost(SPACE, str(tmp_path), **check_cost_config(cfg.train_cfg.latency))
    assert isinstance(cost, Predictor) and cost.describe()["predictor"] == "v100-tensorrt-fp16"
    with pytest.raises(ConfigError, match=r"type='predictor' .* does not take threads; it takes type, device"):
        check_cost_config(dict(cfg.train_cfg.latency, threads=1))
    with pytest.raises(LatencyError, match=r"needs latency\.device \(--device\): one of .*v100-tensorrt-fp16"):
        make_cost(SPACE, str(tmp_path), type="predictor")
    with pytest.raises(UnknownNameError, match="did you mean 'v100-tensorrt-fp16'"):
        make_cost(SPACE, str(tmp_path), type="predictor", device="v100-tensorrt-fp61")


def test_a_method_that_has_measured_its_network_is_not_measured_again(monkeypatch, tmp_path: Path):
    made = fake_measure(monkeypatch, lambda n: 1.0)
    run, encoding = loop(6), Strategy().finish()
    own = MeasuredChoice(encoding, {"median_ms": 4.9}, ({"measured": 4.9},), None, "at the edge", networks=7)
    run.strategy.measured_choice = lambda: own
    chosen = choose(run, tmp_path / "trials.json")
    assert (chosen.encoding, chosen.status, chosen.reason) == (encoding, "measured", "at the edge") and not made
    assert chosen.measured == {"median_ms": 4.9} and chosen.trials == [{"measured": 4.9}] and chosen.tries == 7
    assert Chosen.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    run.strategy.measured_choice = lambda: MeasuredChoice(encoding, {"median_ms": 5.2}, (), "too coarse")
    assert choose(run, tmp_path / "trials.json").status == "missed: too coarse"


def start_record(ms: float) -> dict[str, Any]:
    return {**Table().describe(), "backend_version": "1", "memory_format": "contiguous", "date": "", "median_ms": ms}


@pytest.mark.parametrize("name", ["prunet_cpu_small", "rep_vgg_small"])
def test_where_there_is_no_table_one_network_is_measured_and_the_rest_scaled(monkeypatch, tmp_path: Path, name: str):
    space, made = load_space(name), []

    def measure(spec, **setting):
        made.append(spec.hash)
        return SimpleNamespace(to_dict=lambda: start_record(2.0))

    monkeypatch.setattr(latency_cost, "measure", measure)
    given = dict(type="scaled" if space.additive else "latency", backend="torch")
    cost = make_cost(space, str(tmp_path), **given)
    whole, part = (space.decode(e) for e in (space.largest(), space.sample(random.Random(0))))
    assert cost.unit == "ms" and cost(whole) == pytest.approx(2.0)
    assert cost(part) == pytest.approx(2.0 * part.macs() / whole.macs())
    if space.additive:
        assert cost.fixed(space) / cost(whole) == pytest.approx(MacsCost().fixed(space) / MacsCost()(whole))
    again = make_cost(space, str(tmp_path), **given)
    assert again.hash == cost.hash and made == [whole.hash]  # once for a work directory
    assert again.describe()["device"] == "here" and again.describe()["start_ms"] == 2.0
    make_cost(space, str(tmp_path), **{**given, "batch": 1, "threads": 2})
    assert len(made) == 2  # what was measured with one thread says nothing of two
    with pytest.raises(LatencyError, match=r"there is no latency table for .* leave --table out"):
        make_cost(space, str(tmp_path), table="x.jsonl", **given)
    (tmp_path / START_FILE).write_text("{")
    with pytest.raises(TrainingError, match=rf"{START_FILE} is damaged"):
        make_cost(space, str(tmp_path), **given)


def test_a_network_that_was_trained_on_after_the_decision_stays(tmp_path: Path):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(verify=6)))
    assert _finished(cfg) == {}
    for name in ("spec.json", "weights.safetensors", "report.html"):
        (tmp_path / name).touch()
    for verify, decided, done in ((6, 4, True), (0, 4, False), (0, 2, True)):
        report = {**REPORT, "verify": verify, "epochs": 4, "decided_epoch": decided}
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert _finished(cfg) == (report if done else {})


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b'{"status": "pred',
        b"\xff\xfe",
        b"[]",
        b"5",
        b'"text"',
        *(json.dumps({k: v for k, v in REPORT.items() if k != key}).encode() for key in REPORT),
        *(json.dumps({**REPORT, key: [None]}).encode() for key in ("verify", "target", "status", "params")),
    ],
)
def test_a_damaged_report_is_written_anew(tmp_path: Path, damaged: bytes, monkeypatch):
    cfg, said = Config(dict(work_dir=str(tmp_path), train_cfg=dict(verify=6))), []
    monkeypatch.setattr(search, "print_log", lambda line, *more: said.append(line))
    for name in ("spec.json", "weights.safetensors", "report.html"):
        (tmp_path / name).touch()
    (tmp_path / "report.json").write_bytes(json.dumps(REPORT).encode())
    assert _finished(cfg) == REPORT and not said
    (tmp_path / "report.json").write_bytes(damaged)
    assert _finished(cfg) == {}
    assert len(said) == 1 and "report.json is damaged" in said[0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "x", "model must be a dict, got 'x'; write model=dict(type=…) in the config, or --cfg-options"),
        ("train_cfg.strategy", "dict(type='DDPNAS')", "train_cfg.strategy must be a dict"),
        ("train_cfg.latency", "macs", "train_cfg.latency must be a dict, got 'macs'; .*train_cfg.latency.type=…$"),
        ("train_cfg", 3, "is not a search config"),
        ("train_cfg.verify", "many", "train_cfg.verify must be a whole number, 0 or more, got 'many'"),
        ("train_cfg.verify", -1, "got -1"),
        ("train_cfg.max_epochs", 0, "train_cfg.max_epochs must be a whole number, 1 or more, got 0"),
        ("train_cfg.max_epochs", True, "got True"),
        ("train_cfg.recalibration_batches", 2.5, "train_cfg.recalibration_batches must be a whole number"),
    ],
)
def test_a_part_of_another_kind_is_told_before_it_is_used(field: str, value: Any, words: str):
    cfg = searching(dict(type="macs"))
    set_target(cfg, 1.0, None)
    cfg.merge_from_dict({field: value})
    for check in (lambda: set_target(cfg, 1.0, None), lambda: search.search(cfg)):
        with pytest.raises(ConfigError, match=re.escape(words) if ".*" not in words else words):
            check()
