"""Building tables: what is measured again, what survives an interruption, what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import WriteError
from prunet_zoo.latency import LatencyTable, build, build_table
from prunet_zoo.latency.references import References
from prunet_zoo.latency.tablefile import append

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, space, specs, make_backend, effort):
    path = tmp_path_factory.mktemp("finished") / "table.jsonl"
    table = build_table(space, path, make_backend(), effort=effort)
    return path.read_bytes(), [table(s) for s in specs]


def test_measured_again_nothing_is_prepared(space, make_backend, effort, table_file):
    first = make_backend()
    build_table(space, table_file, first, effort=effort)
    before = table_file.read_bytes()
    second = make_backend()
    seen = []
    build_table(space, table_file, second, effort=effort, progress=lambda done, total, what: seen.append((done, total)))
    assert first.prepared
    assert second.prepared == []
    assert table_file.read_bytes() == before
    assert seen == [(1, 1)]


def test_resume_measures_only_what_is_missing(space, specs, make_backend, effort, table_file, monkeypatch):
    monkeypatch.setattr(build, "MAX_BLOCKS", 4)  # blocks that an interruption may lose
    whole = make_backend()
    expected = build_table(space, table_file.with_name("whole.jsonl"), whole, effort=effort)
    cut = make_backend(fail_after=len(whole.prepared) // 2)
    with pytest.raises(KeyboardInterrupt):
        build_table(space, table_file, cut, effort=effort)
    kept = table_file.read_bytes()
    assert kept.count(b"\n") > 2
    rest = make_backend()
    table = build_table(space, table_file, rest, effort=effort)
    assert table_file.read_bytes().startswith(kept)
    assert 0 < len(rest.prepared) < len(whole.prepared)
    assert [table(s) for s in specs] == [expected(s) for s in specs]
    rows = [r for r in map(json.loads, table_file.read_text().splitlines()) if r["kind"] in ("block", "fixed")]
    keys = [json.dumps([r.get("block"), r.get("in_channels"), r.get("in_size"), r.get("part")]) for r in rows]
    assert len(set(keys)) == len(keys)  # no block measured twice


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_a_file_cut_anywhere_is_gone_on_with(tmp_path_factory, finished, space, specs, make_backend, effort, share):
    raw, samples = finished
    header = raw.index(b"\n") + 1
    cut = header + round(share * (len(raw) - header))
    path = tmp_path_factory.mktemp("cut") / "table.jsonl"
    path.write_bytes(raw[:cut])
    table = build_table(space, path, make_backend(), effort=effort)
    assert [table(s) for s in specs] == samples
    whole_lines = raw[: raw.rfind(b"\n", 0, cut) + 1]
    assert path.read_bytes().startswith(whole_lines)
    assert LatencyTable.load(path).hash == table.hash


@pytest.mark.parametrize(
    ("change", "sides"),
    [
        ({"device": "another device"}, ("fake device", "another device")),
        ({"version": "2"}, ("'1'", "'2'")),
        ({"threads": 2}, ("threads 1", "threads 2")),
        ({"batch": 4}, ("batch 1", "batch 4")),
        ({"dtype": "fp16"}, ("fp32", "fp16")),
        (
            {"classes": 7},
            (
                "its space 'tiny' differs from the 'tiny' asked for: ",
                "num_classes 5, not 7;",
                "table tiny --num-classes 7 --out FILE",
            ),
        ),
        ({"backend": "torch"}, ("fake", "torch")),
    ],
)
def test_resume_refuses_another_setting_and_names_both_sides(space, make_backend, effort, table_file, change, sides):
    build_table(space, table_file, make_backend(), effort=effort)
    before = table_file.read_bytes()
    backend = make_backend(change.get("device", "fake device"), change.get("version", "1"))
    options = {k: v for k, v in change.items() if k in ("threads", "batch", "dtype")}
    if "classes" in change:
        space = space.replace(num_classes=change["classes"])
    if "backend" in change:
        backend.name = "torch"
    with pytest.raises(LatencyError) as error:
        build_table(space, table_file, backend, effort=effort, **options)
    assert all(side in str(error.value) for side in sides)
    assert table_file.read_bytes() == before


def test_a_file_that_does_not_tell_its_time_is_read_and_left_as_it_is(space, make_backend, effort, table_file):
    built = build_table(space, table_file, make_backend(), effort=effort)
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    old = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    table_file.write_text("".join(json.dumps(row) + "\n" for row in old))
    before = table_file.read_bytes()
    assert LatencyTable.load(table_file).hash == built.hash
    backend = make_backend()
    build_table(space, table_file, backend, effort=replace(effort, block_seconds=1e-9, network_seconds=1e-9))
    assert (table_file.read_bytes(), backend.prepared) == (before, [])


@pytest.mark.parametrize("kind", ["block", "fixed", "network"])
def test_a_correction_counts_where_no_other_line_follows_it(space, make_backend, effort, table_file, kind):
    build_table(space, table_file, make_backend(), effort=effort)
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    row = next(row for row in rows if row["kind"] == kind)
    with table_file.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(LatencyError, match="unfinished; go on with the same command"):
        LatencyTable.load(table_file)
    build_table(space, table_file, make_backend(), effort=effort)
    assert LatencyTable.load(table_file).correction is not None


@pytest.fixture(scope="module")
def quick_then_full(tmp_path_factory, space, specs, make_backend, effort):
    """The file after a quick build, and after a full one into the same; the latter's effort and predictions."""
    path = tmp_path_factory.mktemp("both") / "table.jsonl"
    quick = replace(effort, first_widths=3, networks=4, block_seconds=1e-9, network_seconds=1e-9)
    full = replace(effort, first_widths=4, networks=6, block_seconds=2e-9, network_seconds=2e-9)
    build_table(space, path, make_backend(), effort=quick)
    first = path.read_bytes()
    table = build_table(space, path, make_backend(), effort=full)
    return first, path.read_bytes(), full, quick, [table(s) for s in specs]


def test_a_full_build_measures_again_what_a_quick_one_measured(quick_then_full, space, make_backend, tmp_path):
    first, raw, full, quick, _ = quick_then_full
    path = tmp_path / "table.jsonl"
    path.write_bytes(first)
    assert set(LatencyTable.load(path).seconds.values()) == {1e-9}
    path.write_bytes(raw)
    table = LatencyTable.load(path)
    assert set(table.seconds.values()) == {2e-9}
    backend = make_backend()
    build_table(space, path, backend, effort=full)
    assert (backend.prepared, path.read_bytes()) == ([], raw)
    build_table(space, path, backend, effort=quick)  # goes on with the time that it was begun with
    assert set(LatencyTable.load(path).seconds.values()) == {2e-9}


@settings(max_examples=12, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_a_full_build_after_a_quick_one_can_be_cut_anywhere(
    tmp_path_factory, quick_then_full, space, specs, make_backend, share
):
    first, raw, full, _, samples = quick_then_full
    cut = len(first) + round(share * (len(raw) - len(first)))
    path = tmp_path_factory.mktemp("cut") / "table.jsonl"
    path.write_bytes(raw[:cut])
    if raw[len(first) : cut].count(b"\n") and cut < len(raw) - 1:
        with pytest.raises(LatencyError, match="unfinished"):
            LatencyTable.load(path)
    table = build_table(space, path, make_backend(), effort=full)
    assert [table(s) for s in specs] == samples
    assert LatencyTable.load(path).hash == table.hash
    assert set(table.seconds.values()) == {2e-9}


def test_the_same_command_measures_again_what_the_processor_was_slow_for(
    space, make_backend, effort, table_file, monkeypatch
):
    speed = [(12.0, 20.0, 300.0)]
    monkeypatch.setattr(References, "__call__", lambda self: self.looks.append(speed[0]) or speed[0])
    monkeypatch.setattr(build, "recall", lambda key: (10.0, 16.0, 200.0))
    table = build_table(space, table_file, make_backend(), effort=effort)
    slow, names = set(table.slow), len(table.seconds)
    assert len(slow) == names  # stem and tail too
    finished = table_file.read_bytes()
    speed[0] = (10.0, 16.0, 200.0)
    build_table(space, table_file, make_backend(), effort=effort)
    assert table_file.read_bytes() == finished  # a search that goes on keeps its table
    cut = make_backend(fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        build_table(space, table_file, cut, effort=effort, repeat_slow=True)
    assert build_table(space, table_file, make_backend(), effort=effort, repeat_slow=True).slow == set()
    assert LatencyTable.load(table_file).slow == set()
    # an interruption before the second chances does not cost them
    path = table_file.with_name("cut.jsonl")
    lines = finished.splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    path.write_bytes(b"".join(lines[: kinds.index("network")]))
    assert build_table(space, path, make_backend(), effort=effort).slow == set()


def test_blocks_measured_while_the_processor_was_slow_get_a_second_chance(
    space, make_backend, effort, table_file, monkeypatch
):
    looks = itertools.count()

    def slow_at_first(self):
        look = (10.0, 16.0, 200.0) if next(looks) > 1500 else (12.0, 20.0, 300.0)
        self.looks.append(look)
        return look

    monkeypatch.setattr(References, "__call__", slow_at_first)
    monkeypatch.setattr(build, "recall", lambda key: (10.0, 16.0, 200.0))
    backend = make_backend()
    build_table(space, table_file, backend, effort=effort)
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    blocks = [json.dumps([r["block"], r["in_channels"], r["in_size"]]) for r in rows if r["kind"] == "block"]
    assert len(blocks) > len(set(blocks))
    assert LatencyTable.load(table_file).describe()["slow"] == 0
    looks = itertools.count(10**6)
    quiet = table_file.with_name("quiet.jsonl")
    build_table(space, quiet, make_backend(), effort=effort)
    assert [json.loads(line)["kind"] for line in quiet.read_text().splitlines()].count("block") == len(set(blocks))
    looks = itertools.repeat(0)
    slow = table_file.with_name("slow.jsonl")
    assert build_table(space, slow, make_backend(), effort=effort).describe()["slow"] > 0  # it says so


def test_two_builds_of_one_table_do_not_write_into_each_other(space, make_backend, effort, table_file):
    backend = make_backend()
    prepare = backend.prepare

    def second(*args):
        backend.prepare = prepare
        with pytest.raises(
            LatencyError, match=r"another process is building latency table .*table\.jsonl; wait for it"
        ):
            build_table(space, table_file, make_backend(), effort=effort)
        return prepare(*args)

    backend.prepare = second
    build_table(space, table_file, backend, effort=effort)
    assert LatencyTable.load(table_file).correction is not None


def test_full_disk_keeps_what_was_there(table_file, monkeypatch):
    table_file.write_bytes(b'{"kind": "header"}\n')

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="free some space and run the same command again"):
        append(table_file, [{"kind": "block"}], 19)
    assert table_file.read_bytes() == b'{"kind": "header"}\n'
