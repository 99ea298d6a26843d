"""benchmarks/latency_repeat.py: every pass in a process of its own, and what its figures say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "latency_repeat.py"


@pytest.fixture(scope="module")
def repeat(load_benchmark):
    return load_benchmark("latency_repeat")


def record(ms, *reasons):
    return SimpleNamespace(
        median_ms=ms, disturbed=reasons, backend="torch", precision=0.01, attempts=2, device="a CPU",
        fingerprint={"usable_cores": 2.0},
    )  # fmt: skip


def test_two_processes_and_the_command_that_was_run(repeat, monkeypatch, tmp_path):
    started, logs = [], {"first": [record(1.0), record(2.0)], "second": [record(1.01), record(3.0, "a reason")]}
    monkeypatch.setattr(subprocess, "run", lambda command: started.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(repeat, "read_records", lambda path: logs[path.stem])
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--pairs", "2", "--seconds", "0.25", "--json", str(out)])
    repeat.main()
    assert len(started) == 2
    for command in started:
        assert command[:6] == [sys.executable, str(FILE), "--pairs", "2", "--seconds", "0.25"]
    found = json.loads(out.read_text())
    assert found["command"] == "python benchmarks/latency_repeat.py --pairs 2 --seconds 0.25"
    assert str(tmp_path) not in out.read_text()
    assert (found["unmarked"], found["unmarked_within2"], found["marked"], found["within2"]) == (1, 1.0, 0.5, 0.5)
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match="the first pass failed with status 3"):
        repeat.main()


def test_a_pass_measures_all_into_its_log(repeat, monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(repeat, "measure", lambda spec, backend, side, seconds: (spec.name, backend, side, seconds))
    monkeypatch.setattr(repeat, "append_record", lambda path, row: kept.append((path, row)))
    log = tmp_path / "first.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--seconds", "0", "--one-pass", str(log)])
    repeat.main()
    assert [path for path, _ in kept] == [log] * 4
    assert [row[1] for _, row in kept] == ["onnxruntime", "onnxruntime", "torch", "torch"]
