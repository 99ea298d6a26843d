"""Comparing: intervals that cover the truth, only what is comparable, files against files, backends side by side."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency import compare_now
from prunet_zoo.latency.commands import compare as command
from prunet_zoo.latency.compare import combine_intervals, compare_files, paired_interval
from prunet_zoo.latency.record import Record, Timing, append_record, read_records
from prunet_zoo.spec import NetSpec


def make_record(ms: float = 10.0, name: str = "a", half: float = 0.01, **changes: Any) -> Record:
    data: dict[str, Any] = {
        "median_ms": ms, "ci_low_ms": ms * (1 - half), "ci_high_ms": ms * (1 + half), "p10_ms": ms, "p90_ms": ms,
        "n": 9, "rounds": 9, "warmup_runs": 1, "spec_name": name, "spec_hash": f"hash-{name}", "spec": None,
        "input_size": (224, 224), "device": "cpu one", "accelerator": "cpu", "backend": "onnxruntime",
        "backend_version": "1", "dtype": "fp32", "batch": 1, "threads": 1, "memory_format": "contiguous",
        "disturbed": (), "attempts": 1, "clock": {}, "fingerprint": {}, "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Record(**{**data, **changes})


def write(path: Path, *records: Record) -> Path:
    for record in records:
        append_record(path, record)
    return path


def test_the_paired_interval_covers_the_true_ratio_and_not_much_more():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for i in range(100):
        slow = 1 + rng.exponential(0.3, 60)  # what slows a round slows both
        base, other = (slow * ms * (1 + rng.normal(0, 0.01, 60)) for ms in (10.0, 12.0))
        ratio = float(np.median(np.sort(other)[:20]) / np.median(np.sort(base)[:20]))
        low, high = paired_interval(base, other, seed=i)
        assert low <= 1 <= high
        covered += low * ratio <= 1.2 <= high * ratio
        widths.append(high - low)
    assert covered >= 88
    assert np.median(widths) < 0.03  # unpaired, the interval would be ten times as wide


def test_the_same_rounds_for_both_leave_no_doubt():
    rounds = np.random.default_rng(1).uniform(5, 50, 40)
    low, high = paired_interval(rounds, 2 * rounds)
    assert low == pytest.approx(1) and high == pytest.approx(1)


latency = st.builds(
    lambda ms, below, above: Timing(
        median_ms=ms, ci_low_ms=ms * (1 - below), ci_high_ms=ms * (1 + above), p10_ms=ms, p90_ms=ms, n=1, rounds=1,
        warmup_runs=0,
    ),
    st.floats(1e-3, 1e3), st.floats(0, 0.9), st.floats(0, 2),
)  # fmt: skip


@given(latency, latency)
def test_the_interval_of_two_records_holds_the_ratio_and_turns_round_with_it(a, b):
    ratio, low, high = combine_intervals(a, b)
    assert low <= ratio * (1 + 1e-9) and ratio <= high * (1 + 1e-9)
    back, back_low, back_high = combine_intervals(b, a)
    assert (back, back_low, back_high) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_an_interval_down_to_zero_says_nothing():
    ratio, low, high = combine_intervals(make_record(10, half=1.0), make_record(20))
    assert ratio == pytest.approx(2) and low < 2 and high > 1e100


def test_files_are_compared_by_network_and_the_last_record_counts(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record(99), make_record(10), make_record(20, "b"), make_record(5, "c"))
    b = write(
        tmp_path / "b.jsonl",
        make_record(20, device="cpu two"),
        make_record(10, "b", device="cpu two"),
        make_record(5.01, "c", device="cpu two", disturbed=("load",)),
    )
    (summary,) = compare_files([a, b])
    assert [round(r.ratio, 3) for r in summary.ratios] == [2.0, 0.5, 1.002]
    assert [r.differs for r in summary.ratios] == [True, True, False]
    assert [r.disturbed for r in summary.ratios] == [False, False, True]
    assert summary.geometric_mean == pytest.approx(1.002 ** (1 / 3))
    assert summary.tau == pytest.approx(1 / 3)
    assert summary.changed == {"device": ("cpu one", "cpu two")}
    assert summary.left_out == ()


def test_other_input_sizes_and_batches_are_named_not_compared(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record(), make_record(1, "b"), make_record(1, "only"))
    b = write(tmp_path / "b.jsonl", make_record(), make_record(1, "b", batch=8), make_record(1, "new"))
    (summary,) = compare_files([a, b])
    assert [r.base for r in summary.ratios] == ["a"]
    assert summary.left_out == (
        "b, 224×224 px, batch 1 is not comparable with 224×224 px, batch 8",
        "only, 224×224 px, batch 1: only in the first",
        "new, 224×224 px, batch 1: only in the second",
    )


def test_files_without_a_common_network_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record())
    b = write(tmp_path / "b.jsonl", make_record(input_size=(320, 320)))
    with pytest.raises(LatencyError, match=r"no network in common.*224×224 px, batch 1 is not comparable with 320×320"):
        compare_files([a, b])


def test_a_file_of_several_settings_is_refused_with_the_field(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record(), make_record(1, "b", backend="torch"))
    with pytest.raises(LatencyError, match=r"several settings \(backend onnxruntime, torch\).*grep"):
        compare_files([a, a])


@pytest.mark.skipif(shutil.which("grep") is None, reason="no grep")
@pytest.mark.parametrize("changes", [{"threads": 4}, {"backend": "torch"}, {"device": "a [1] 'b'"}])
def test_the_advice_for_a_file_of_several_settings_works(tmp_path, changes):
    mixed = write(tmp_path / "a b.jsonl", make_record(1, "x", **changes), make_record(), make_record(2, "b"))
    with pytest.raises(LatencyError) as caught:
        compare_files([mixed, mixed])
    advice = str(caught.value).partition("keep one in a file: ")[2]
    subprocess.run(advice, shell=True, check=True, cwd=tmp_path)
    assert [record.spec_name for record in read_records(tmp_path / "NEW.jsonl")] == ["x"]


def test_one_file_and_an_empty_one_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record())
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(LatencyError, match="two files or more"):
        compare_files([a])
    with pytest.raises(LatencyError, match="holds no records"):
        compare_files([a, tmp_path / "empty.jsonl"])


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(["compare", *argv])


def test_the_command_prints_a_line_a_network_and_json_alone(tmp_path):
    a = write(tmp_path / "a.jsonl", make_record(10, "net"))
    b = write(tmp_path / "b.jsonl", make_record(5, "net", threads=2))
    text = command.run(parse(str(a), str(b)))
    assert "threads: 1 → 2" in text and "geometric mean of the ratios 0.500" in text
    (line,) = [line for line in text.splitlines() if line.startswith("net ")]
    assert line.split() == ["net", "10", "5", "0.500", "0.493", "–", "0.507", "faster"]
    (data,) = json.loads(command.run(parse(str(a), str(b), "--json")))
    assert data["ratios"][0]["differs"] is True and data["larger_than_interval"] == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["a.jsonl", "prunet_p0"], "not both"),
        (["a.jsonl", "b.jsonl", "--backends", "torch", "onnxruntime"], "not for files"),
        (["prunet_p0"], "two or more"),
        (["prunet_p0", "--backends", "torch"], "two different ones"),
        (["prunet_p0", "--backends", "torch", "torch"], "two different ones"),
        (["prunet_p0", "prunet_p1", "--seconds", "nan"], "--seconds"),
        (["prunet_p0", "prunet_p1", "--input-size", "1", "2", "3"], "3 numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused(argv, message):
    with pytest.raises(LatencyError, match=message):
        command.run(parse(*argv))


@pytest.fixture
def networks(space, monkeypatch) -> list[NetSpec]:
    monkeypatch.setattr(compare_now, "MIN_ROUNDS", 5)
    small = space.decode(tuple(None if la.skip else (0, la.candidate_widths(0)[0]) for la in space.layers))
    return [small.replace(name="small"), space.decode(space.largest()).replace(name="large")]


def test_networks_are_compared_with_the_first(networks, make_backend):
    (ratio,) = compare_now.compare_networks(networks, make_backend(), seconds=0.0)
    assert (ratio.base, ratio.other) == ("small", "large")
    assert ratio.ratio == pytest.approx(ratio.other_ms / ratio.base_ms) and ratio.ratio > 1
    assert ratio.differs and ratio.low == pytest.approx(ratio.high)  # the backend has no noise


def test_backends_are_compared_network_by_network(networks, make_backend):
    one, two = make_backend(), make_backend(version="2")
    two.name = "fake-two"
    (summary,) = compare_now.compare_backends(networks, [one, two], seconds=0.0)
    assert (summary.base, summary.other) == ("fake", "fake-two")
    assert [r.base for r in summary.ratios] == ["small", "large"]
    assert summary.geometric_mean == pytest.approx(1) and not any(r.differs for r in summary.ratios)
    assert summary.changed["backend_version"] == ("1", "2") and math.isclose(summary.tau, 1)


def test_a_session_of_its_own_has_an_interval_of_its_own(networks, make_backend, monkeypatch):
    backend = make_backend()
    plain = type(backend).prepare

    def prepare(self, *args):
        session = plain(self, *args)
        session.solo = len(self.prepared) == 1
        return session

    monkeypatch.setattr(type(backend), "prepare", prepare)
    (ratio,) = compare_now.compare_networks(networks, backend, seconds=0.0)
    assert ratio.low == pytest.approx(ratio.ratio) and ratio.high == pytest.approx(ratio.ratio)
