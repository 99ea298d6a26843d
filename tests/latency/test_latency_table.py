"""Tables: what is looked up, which of two measurements counts, what is refused."""

from __future__ import annotations

import json
import random

import pytest

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency import LatencyTable, build_table
from prunet_zoo.latency.probes import random_network
from prunet_zoo.latency.tablefile import read_table
from prunet_zoo.space import SearchSpace, load_space
from prunet_zoo.spec import BlockSpec

pytestmark = pytest.mark.usefixtures("steady")


def test_a_table_finds_an_additive_cost_again(space, make_backend, effort, table_file):
    backend = make_backend()
    table = build_table(space, table_file, backend, effort=effort)
    with backend.environment(None):
        for encoding in (space.largest(), *(space.sample(random.Random(i)) for i in range(20))):
            truth = backend.prepare(random_network(space, encoding), (1, 3, 16, 16), None).ms
            assert table(space.decode(encoding)) == pytest.approx(truth, rel=2e-3)
    assert table.correction.worst_error < 5e-3


def test_prediction_is_exactly_fixed_plus_blocks(space, specs, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    for spec in specs:
        blocks = [p for p in spec.placed() if p.stage >= len(space.stem)]
        total = table.fixed(spec) + sum(table.block(p.block, p.in_channels, p.in_size) for p in blocks)
        assert table(spec) == total
        assert table.fixed(spec) == table.fixed(space) > 0


def test_file_round_trip(space, specs, make_backend, effort, table_file):
    built = build_table(space, table_file, make_backend(), effort=effort)
    loaded = LatencyTable.load(table_file)
    assert loaded.hash == built.hash
    assert [loaded(s) for s in specs] == [built(s) for s in specs]
    about = loaded.describe()
    assert (about["device"], about["backend"], about["threads"], about["unit"]) == ("fake device", "fake", 1, "ms")
    json.dumps(about)
    lines = table_file.read_text().splitlines()
    assert json.loads(lines[0])["kind"] == "header"
    assert all(isinstance(json.loads(line), dict) for line in lines)


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


def test_of_what_was_measured_twice_the_lower_latency_counts(space, specs, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    before = [table(s) for s in specs], table.hash
    rows = [json.loads(line) for line in table_file.read_text().splitlines()]
    slower = [{**row, "ms": 1.5 * row["ms"]} for row in rows if row["kind"] in ("block", "fixed", "network")]
    table.add([*slower, rows[-1]])
    assert ([table(s) for s in specs], table.hash) == before
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
