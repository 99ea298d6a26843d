"""Logs of records: complete lines only, whatever happens; two writers; nothing that is no log is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.files import WriteError
from prunet_zoo.latency import Record, append_record, read_records, record

ROOT = Path(__file__).resolve().parents[2]


def make(name="net", ms=1.0) -> Record:
    return Record(
        median_ms=ms, ci_low_ms=ms, ci_high_ms=ms, p10_ms=ms, p90_ms=ms, n=9, rounds=3, warmup_runs=2, spec_name=name,
        spec_hash="", spec=None, input_size=(32, 32), device="ä device", accelerator="cpu", backend="torch",
        backend_version="1", dtype="fp32", batch=1, threads=1, memory_format="contiguous", disturbed=("a reason",),
        attempts=1, clock={"load": 0.5, "governor": None}, fingerprint={"flags": ["fma"]}, date="2026-01-01T00:00:00",
    )  # fmt: skip


def test_round_trip(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"
    rows = [make("one"), make("two", 2.5)]
    for row in rows:
        append_record(log, row)
    assert read_records(log) == rows
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2


def test_precision_is_half_the_interval():
    wide = make(ms=2.0).model_copy(update={"ci_low_ms": 1.9, "ci_high_ms": 2.3})
    assert wide.precision == pytest.approx(0.1)
    assert make(ms=0.0).precision == 0.0


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_a_log_cut_anywhere_loses_the_cut_line_alone(tmp_path_factory, share):
    log = tmp_path_factory.mktemp("cut") / "log.jsonl"
    rows = [make(f"net {i}") for i in range(3)]
    for row in rows:
        append_record(log, row)
    raw = log.read_bytes()
    cut = raw[: round(share * len(raw))]
    log.write_bytes(cut)
    lines = raw.splitlines()
    kept = [row for i, row in enumerate(rows) if len(cut) >= len(b"\n".join(lines[: i + 1]))]
    assert read_records(log) == kept
    append_record(log, make("after"))
    assert read_records(log) == [*kept, make("after")]


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path):
    log = tmp_path / "log.jsonl"
    for name in "ab":
        append_record(log, make(name))
    whole = log.read_bytes()
    log.write_bytes(whole.rstrip(b"\n"))  # as an editor leaves it
    assert [r.spec_name for r in read_records(log)] == ["a", "b"]
    append_record(log, make("c"))
    assert log.read_bytes().startswith(whole)
    assert [r.spec_name for r in read_records(log)] == ["a", "b", "c"]


def test_whether_a_log_can_be_written_is_found_out_beforehand(tmp_path):
    record.check_log(tmp_path / "new" / "log.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    append_record(tmp_path / "log.jsonl", make())
    before = (tmp_path / "log.jsonl").read_bytes()
    record.check_log(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_bytes() == before
    (tmp_path / "notes").write_text("words")
    with pytest.raises(LatencyError, match="is not a log"):
        record.check_log(tmp_path / "notes")
    for path in (tmp_path / "notes" / "log.jsonl", tmp_path):
        with pytest.raises(WriteError, match=r"cannot write latency log .*name another file"):
            record.check_log(path)


@pytest.mark.parametrize("when", [(Path, "exists"), (tempfile, "NamedTemporaryFile")])
def test_a_record_written_during_the_check_stays(tmp_path, monkeypatch, when):
    """Another process appends between the look and the end of the check."""
    log = tmp_path / "log.jsonl"
    real, written = getattr(*when), []

    def meanwhile(*args, **options):
        monkeypatch.undo()
        found = real(*args, **options)
        append_record(log, make("other"))
        written.append("other")
        return found

    monkeypatch.setattr(*when, meanwhile)
    record.check_log(log)
    monkeypatch.undo()
    append_record(log, make("own"))
    assert [r.spec_name for r in read_records(log)] == [*written, "own"]


def test_damage_inside_is_an_error_that_names_the_line(tmp_path):
    log = tmp_path / "log.jsonl"
    for name in "abc":
        append_record(log, make(name))
    lines = log.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1][:40]
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(LatencyError, match=r"log\.jsonl, line 2 is no record"):
        read_records(log)
    with pytest.raises(LatencyError, match=r"cannot be read .*measure ARCH --log"):
        read_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize("text", ["# Title\n", "words", '{"kind": "header"}\n', "[1]\n", "\n", "\x00\xff\n"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="latin-1")
    for act in (lambda: append_record(path, make()), lambda: read_records(path)):
        with pytest.raises(LatencyError, match=r"README\.md"):
            act()
    assert path.read_text(encoding="latin-1") == text


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    append_record(log, make("kept"))
    before = log.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"cannot append to latency log .*No space left"):
        append_record(log, make("lost"))
    assert log.read_bytes() == before
    monkeypatch.undo()
    append_record(log, make("next"))
    assert [r.spec_name for r in read_records(log)] == ["kept", "next"]


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write latency log .*name another file"):
        append_record(tmp_path / "file" / "log.jsonl", make())


def test_a_locked_log_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.1)
    log = tmp_path / "log.jsonl"
    other = FileLock(f"{log}.lock", thread_local=False, is_singleton=False)
    with other, pytest.raises(LatencyError, match=r"locked by another process for more than 0\.1 s"):
        append_record(log, make())
    append_record(log, make())
    assert len(read_records(log)) == 1


def test_two_processes_lose_nothing(tmp_path):
    log, row = tmp_path / "log.jsonl", tmp_path / "row.json"
    row.write_text(json.dumps(make().to_dict()))
    code = (
        "import json, sys\nsys.modules['mmengine'] = None\n"
        "from prunet_zoo.latency.record import Record, append_record\n"
        "row = json.load(open(sys.argv[2]))\n"
        "for i in range(6):\n"
        "    append_record(sys.argv[1], Record.from_dict({**row, 'spec_name': f'{sys.argv[3]} {i}'}))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", code, str(log), str(row), name], env=env) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert sorted(r.spec_name for r in read_records(log)) == sorted(f"{name} {i}" for name in "ab" for i in range(6))


def test_fields_are_strict():
    data = make().to_dict()
    assert Record.from_dict(data) == make()
    with pytest.raises(SpecError, match="disturbed"):
        Record.from_dict({**data, "disturbed": "yes"})
    with pytest.raises(SpecError, match="ci_low_ms"):
        Record.from_dict({k: v for k, v in data.items() if k != "ci_low_ms"})
