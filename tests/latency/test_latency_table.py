"""Tables: what is measured, what is looked up, what survives an interruption, what is refused."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError
from prunet_zoo.files import WriteError
from prunet_zoo.latency import LatencyTable, build, build_table
from prunet_zoo.latency.correction import NetworkParts, fit_correction
from prunet_zoo.latency.probes import random_network
from prunet_zoo.latency.references import References
from prunet_zoo.latency.table import QUANTA, Curve, find_quantum, leave_out_errors
from prunet_zoo.latency.tablefile import append, read_table
from prunet_zoo.space import SearchSpace, load_space
from prunet_zoo.spec import BlockSpec


@pytest.fixture(autouse=True)
def steady(monkeypatch) -> None:
    """A processor that is always at full speed."""
    speed = (10.0, 16.0, 200.0)
    monkeypatch.setattr(References, "__call__", lambda self: self.looks.append(speed) or speed)
    monkeypatch.setattr(build, "recall", lambda key: speed)


def _samples(space, n=20):
    rng = random.Random(3)
    return [space.decode(space.sample(rng)) for _ in range(n)]


def test_a_table_finds_an_additive_cost_again(space, make_backend, effort, table_file):
    backend = make_backend()
    table = build_table(space, table_file, backend, effort=effort)
    with backend.environment(None):
        for encoding in (space.largest(), *(space.sample(random.Random(i)) for i in range(20))):
            truth = backend.prepare(random_network(space, encoding), (1, 3, 16, 16), None).ms
            assert table(space.decode(encoding)) == pytest.approx(truth, rel=2e-3)
    assert table.correction.worst_error < 5e-3


def test_prediction_is_exactly_fixed_plus_blocks(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    for spec in _samples(space):
        blocks = [p for p in spec.placed() if p.stage >= len(space.stem)]
        total = table.fixed(spec) + sum(table.block(p.block, p.in_channels, p.in_size) for p in blocks)
        assert table(spec) == total
        assert table.fixed(spec) == table.fixed(space) > 0


def test_file_round_trip(space, make_backend, effort, table_file):
    built = build_table(space, table_file, make_backend(), effort=effort)
    loaded = LatencyTable.load(table_file)
    assert loaded.hash == built.hash
    assert [loaded(s) for s in _samples(space)] == [built(s) for s in _samples(space)]
    about = loaded.describe()
    assert (about["device"], about["backend"], about["threads"], about["unit"]) == ("fake device", "fake", 1, "ms")
    json.dumps(about)
    lines = table_file.read_text().splitlines()
    assert json.loads(lines[0])["kind"] == "header"
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, space, make_backend, effort):
    path = tmp_path_factory.mktemp("finished") / "table.jsonl"
    table = build_table(space, path, make_backend(), effort=effort)
    return path.read_bytes(), [table(s) for s in _samples(space)]


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


def test_resume_measures_only_what_is_missing(space, make_backend, effort, table_file, monkeypatch):
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
    assert [table(s) for s in _samples(space)] == [expected(s) for s in _samples(space)]
    rows = [r for r in map(json.loads, table_file.read_text().splitlines()) if r["kind"] in ("block", "fixed")]
    keys = [json.dumps([r.get("block"), r.get("in_channels"), r.get("in_size"), r.get("part")]) for r in rows]
    assert len(set(keys)) == len(keys)  # no block measured twice


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_a_file_cut_anywhere_is_gone_on_with(tmp_path_factory, finished, space, make_backend, effort, share):
    raw, samples = finished
    header = raw.index(b"\n") + 1
    cut = header + round(share * (len(raw) - header))
    path = tmp_path_factory.mktemp("cut") / "table.jsonl"
    path.write_bytes(raw[:cut])
    table = build_table(space, path, make_backend(), effort=effort)
    assert [table(s) for s in _samples(space)] == samples
    whole_lines = raw[: raw.rfind(b"\n", 0, cut) + 1]
    assert path.read_bytes().startswith(whole_lines)
    assert LatencyTable.load(path).hash == table.hash


def test_torn_last_line_is_dropped_but_damage_inside_is_an_error(space, make_backend, effort, table_file):
    build_table(space, table_file, make_backend(), effort=effort)
    whole = table_file.read_bytes()
    table_file.write_bytes(whole + b'{"kind": "block", "blo')
    _, entries, end = read_table(table_file)
    assert end == len(whole)
    assert len(entries) == whole.count(b"\n") - 1
    assert LatencyTable.load(table_file).correction is not None
    lines = whole.split(b"\n")
    table_file.write_bytes(b"\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(LatencyError, match=r"line 4 is damaged"):
        LatencyTable.load(table_file)


def test_unfinished_missing_and_foreign_files_are_refused(space, make_backend, effort, table_file, tmp_path):
    with pytest.raises(LatencyError, match=r"build it: python tools/latency.py table"):
        LatencyTable.load(tmp_path / "none.jsonl")
    with pytest.raises(KeyboardInterrupt):
        build_table(space, table_file, make_backend(fail_after=8), effort=effort)
    with pytest.raises(
        LatencyError, match=r"unfinished; go on with the same command .*table tiny --num-classes 5 --out .*fp32"
    ):
        LatencyTable.load(table_file)
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    with pytest.raises(LatencyError, match="no header"):
        LatencyTable.load(other)
    other.write_text("")
    with pytest.raises(LatencyError, match="no header"):
        build_table(space, other, make_backend(), effort=effort)
    row = json.loads(table_file.read_text().splitlines()[0])
    other.write_text(json.dumps({**row, "format": 99}) + "\n")
    with pytest.raises(LatencyError, match="format 99"):
        LatencyTable.load(other)


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


def test_require_names_both_sides(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    table.require(space, backend="fake", threads=1, device="fake device")
    with pytest.raises(LatencyError, match=r"backend 'fake', but backend 'onnxruntime' is asked for"):
        table.require(space, backend="onnxruntime", device="fake device")
    with pytest.raises(
        LatencyError, match=r"'tiny' differs from the 'prunet_cpu_small' asked for: input_size 16, not 32, .* and "
    ):
        table.require(load_space("prunet_cpu_small"), device="fake device")
    with pytest.raises(LatencyError, match=r"device 'fake device', but device 'GPU' is asked for"):
        table.require(space, device="GPU")


def test_a_table_of_another_space_names_what_differs(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    data = space.model_dump()
    data["stages"][0]["layers"][1]["hidden"]["max_expansion"] = 4
    data["stages"][1]["layers"][0]["kernel_sizes"] = [3, 5]
    with pytest.raises(LatencyError) as error:
        table.require(SearchSpace.from_dict({**data, "num_classes": 9}), device="fake device")
    for part in (
        "stages[0].layers[1].hidden.max_expansion 6.0, not 4.0",
        "stages[1].layers[0].kernel_sizes [3], not [3, 5]",
        "num_classes 5, not 9",
    ):
        assert part in str(error.value)
    assert "--num-classes" not in str(error.value)  # it would not be enough
    data = space.model_dump()
    data["stages"] = data["stages"][:1]
    with pytest.raises(LatencyError, match=r"asked for: stages has 2 entries, not 1; give the table"):
        table.require(SearchSpace.from_dict(data), device="fake device")


def test_a_network_with_other_classes_is_refused_with_what_to_do(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    with pytest.raises(LatencyError, match=r"num_classes 7, .* measured for 5; .*table … --num-classes N"):
        table(space.replace(num_classes=7).decode(space.largest()))


@pytest.mark.parametrize("text", ["# Title\n\nwords\n", "[1]\n", "{}\n", "\x00\x01\n\xff\n", "{"])
def test_a_file_that_is_no_table_is_told_so(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(LatencyError, match=r"README\.md is not a latency table") as error:
        LatencyTable.load(path)
    assert "delete" not in str(error.value)
    assert path.read_text(encoding="latin-1") == text


def test_header_is_read_strictly(space, make_backend, effort, table_file):
    build_table(space, table_file, make_backend(), effort=effort)
    first, *rest = table_file.read_text().splitlines()
    table_file.write_text("\n".join([json.dumps({**json.loads(first), "threads": "1"}), *rest, ""]))
    with pytest.raises(LatencyError, match=r"header of latency table .*threads: .*integer \(given: '1'\)"):
        LatencyTable.load(table_file)


def test_require_takes_this_machine_by_default(space, make_backend, effort, table_file):
    backend = make_backend()
    backend.name = "torch"
    table = build_table(space, table_file, backend, effort=effort)
    with pytest.raises(LatencyError, match="device 'fake device', but device"):
        table.require(space)


def test_lookup_of_what_is_not_there(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    with pytest.raises(LatencyError, match=r"has no block .*'kernel_size': 7"):
        table.block(BlockSpec(type="irb", out_channels=8, kernel_size=7, hidden=16), 8, (4, 4))
    with pytest.raises(LatencyError, match=r"hidden width 4000 .* outside of what was measured, 2 to 48"):
        table.block(BlockSpec(type="irb", out_channels=8, hidden=4000), 8, (4, 4))
    with pytest.raises(LatencyError, match="another stem"):
        table(load_space("prunet_cpu_small").decode(load_space("prunet_cpu_small").largest()))
    with pytest.raises(LatencyError, match=r"input_size 32, .* was measured for 16"):
        table(space.replace(input_size=32).decode(space.largest()))


def test_lookups_never_fall_with_width(space, make_backend, effort, table_file):
    """Noise that makes a wider block faster does not reach the search."""
    build_table(space, table_file, make_backend(), effort=effort)
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    rng = random.Random(0)
    for row in rows:
        if row["kind"] == "block":
            row["ms"] += rng.uniform(-0.02, 0.02)
    table_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = LatencyTable.load(table_file)
    for layer in space.layers:
        for c in range(len(layer.candidates)):
            widths = layer.candidate_widths(c)
            ms = [table.block(layer.block(c, w), layer.in_channels, layer.in_size) for w in widths]
            assert ms == sorted(ms)
            assert ms[0] >= 0


@given(
    st.dictionaries(st.integers(1, 10_000), st.floats(-1, 100), min_size=1, max_size=12),
    st.sampled_from(QUANTA),
    st.data(),
)
@settings(deadline=None)
def test_curve_is_non_decreasing_and_stays_within_its_points(points, quantum, data):
    curve = Curve(points, quantum)
    low, high = min(points), max(points)
    a, b = sorted(data.draw(st.tuples(st.integers(low, high), st.integers(low, high))))
    assert curve(a) <= curve(b) + 1e-9
    assert 0 <= curve(a) <= max(0.0, *points.values()) + 1e-9
    assert curve(low - 1) is None
    assert curve(high + 1) is None


def test_of_what_was_measured_twice_the_lower_latency_counts(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    before = [table(s) for s in _samples(space)], table.hash
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    slower = [{**row, "ms": 1.5 * row["ms"]} for row in rows if row["kind"] in ("block", "fixed", "network")]
    table.add([*slower, rows[-1]])
    assert ([table(s) for s in _samples(space)], table.hash) == before
    table.add([{**row, "slow": True} for row in slower])
    assert table.describe()["slow"] == 0  # each was measured at full speed before
    table.add([*({**row, "ms": 0.5 * row["ms"]} for row in rows if row["kind"] == "fixed"), rows[-1]])
    assert table.fixed(space) == pytest.approx(0.5 * LatencyTable.load(table_file).fixed(space))


def test_what_was_measured_for_longer_counts(space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    before = table.raw(*_searchable(space)), dict(table.networks), dict(table.parts)
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    last = [row for row in rows if row["kind"] in ("block", "fixed", "network")]
    table.add([{**row, "ms": 2 * row["ms"], "seconds": 1.0, "slow": False} for row in last])
    table.add([{**row, "ms": 0.1 * row["ms"], "seconds": 0.5, "slow": True} for row in last])  # had less
    assert table.raw(*_searchable(space)) == pytest.approx(2 * before[0])
    assert table.networks == {k: 2 * v for k, v in before[1].items()}
    assert table.parts == {k: 2 * v for k, v in before[2].items()}
    assert table.describe()["slow"] == 0
    assert table.has(*_searchable(space), 1.0) and not table.has(*_searchable(space), 1.1)


def _searchable(space):
    last = list(space.decode(space.largest()).placed())[-1]
    return last.block, last.in_channels, last.in_size


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
def quick_then_full(tmp_path_factory, space, make_backend, effort):
    """The file after a quick build, and after a full one into the same; the latter's effort and predictions."""
    path = tmp_path_factory.mktemp("both") / "table.jsonl"
    quick = replace(effort, first_widths=3, networks=4, block_seconds=1e-9, network_seconds=1e-9)
    full = replace(effort, first_widths=4, networks=6, block_seconds=2e-9, network_seconds=2e-9)
    build_table(space, path, make_backend(), effort=quick)
    first = path.read_bytes()
    table = build_table(space, path, make_backend(), effort=full)
    return first, path.read_bytes(), full, quick, [table(s) for s in _samples(space)]


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
    tmp_path_factory, quick_then_full, space, make_backend, share
):
    first, raw, full, _, samples = quick_then_full
    cut = len(first) + round(share * (len(raw) - len(first)))
    path = tmp_path_factory.mktemp("cut") / "table.jsonl"
    path.write_bytes(raw[:cut])
    if raw[len(first) : cut].count(b"\n") and cut < len(raw) - 1:
        with pytest.raises(LatencyError, match="unfinished"):
            LatencyTable.load(path)
    table = build_table(space, path, make_backend(), effort=full)
    assert [table(s) for s in _samples(space)] == samples
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


def test_a_straight_line_leaves_no_error_and_a_step_does():
    assert leave_out_errors({32: 1.0, 64: 2.0, 128: 4.0}) == {1: 0.0}
    assert leave_out_errors({32: 1.0, 64: 1.0, 96: 2.0}) == {1: pytest.approx(0.5)}
    assert leave_out_errors({8: 0.001, 16: 0.004, 24: 1.0})[1] == pytest.approx((0.5005 - 0.004) / 0.1)
    assert leave_out_errors({32: 1.0, 64: 2.0}) == leave_out_errors({0: 1.0}) == leave_out_errors({}) == {}


def test_a_device_that_computes_sixteen_channels_at_a_time_is_seen():
    stairs = [{w: scale * -(-w // 16) for w in (8, 24, 32, 56, 80, 88, 128)} for scale in (1.0, 3.0)]
    assert find_quantum(stairs) == 16
    assert find_quantum([{w: 0.2 + 0.01 * w for w in (8, 24, 32, 56, 80, 88, 128)}]) == 1
    assert find_quantum([{0: 1.0}, {8: 1.0, 16: 2.0}]) == find_quantum([]) == 1
    curve = Curve(stairs[0], 16)
    assert [curve(w) for w in (40, 48, 96, 104, 112)] == [3.0, 3.0, 6.0, 7.0, 7.0]
    assert curve(24) == 2.0  # as measured


def test_full_disk_keeps_what_was_there(table_file, monkeypatch):
    table_file.write_bytes(b'{"kind": "header"}\n')

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="free some space and run the same command again"):
        append(table_file, [{"kind": "block"}], 19)
    assert table_file.read_bytes() == b'{"kind": "header"}\n'


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.7, 1.5), per_block=st.floats(0, 0.02), outlier=st.floats(1.3, 3.0), seed=st.integers(0, 1000))
def test_correction_is_found_in_spite_of_a_disturbed_network(scale, per_block, outlier, seed):
    rng = random.Random(seed)
    networks = []
    for i in range(16):
        n = rng.randint(3, 20)
        blocks = sum(rng.uniform(0.02, 0.3) for _ in range(n))
        true = scale * blocks + 0.1 + per_block * n
        measured = true * (outlier if i == 5 else 1.0)
        networks.append(NetworkParts(blocks_ms=blocks, fixed_ms=0.1, blocks=n, params=n * 10_000, measured_ms=measured))
    fit = fit_correction(networks)
    errors = []
    for part in networks[:5] + networks[6:]:
        predicted = fit.scale * part.blocks_ms + fit.fixed * 0.1 + fit.per_block_ms * part.blocks
        errors.append(abs((predicted + fit.per_mparam_ms * part.params * 1e-6) / part.measured_ms - 1))
    assert statistics.median(errors) < 0.025
    assert max(errors) < 0.15
    assert min(fit.scale, fit.fixed, fit.per_block_ms, fit.per_mparam_ms) >= 0


def test_correction_needs_networks():
    with pytest.raises(LatencyError, match="at least two networks"):
        fit_correction([NetworkParts(blocks_ms=1, fixed_ms=0, blocks=1, params=1, measured_ms=1)])
