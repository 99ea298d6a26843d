"""benchmarks/latency_spaces.py and latency_accuracy.py: which widths are kept, and what becomes of the figures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from prunet_zoo.latency import Effort, LatencyTable, build_table
from prunet_zoo.latency.plan import list_templates


@pytest.fixture(scope="module")
def spaces(load_benchmark):
    return load_benchmark("latency_spaces")


def test_thinned_tables_keep_the_ends_and_predict_an_additive_cost(spaces, space, make_backend, effort, table_file):
    everything = Effort(all_widths=10**6, networks=6, block_seconds=0.0, network_seconds=0.0)
    table = build_table(space, table_file, make_backend(), effort=everything)
    templates = list_templates(space)
    counts = {}
    for name, choose in spaces.TABLES.items():
        kept = spaces.thin(table, choose)
        counts[name] = sum(map(len, kept.points.values()))
        for t in templates:
            assert {t.grid[0], t.grid[-1]} <= set(kept.points[t.key]) <= set(t.grid)
        for i in range(5):
            spec = space.decode(space.sample(random.Random(i)))
            assert kept(spec) == pytest.approx(table(spec), rel=5e-3)
    assert counts["full"] == counts["shipped"] == sum(len(t.grid) for t in templates)  # small grids
    assert counts["quarter"] < counts["full"] / 2
    assert LatencyTable.load(table_file).points == table.points  # the table itself is untouched


def test_networks_are_drawn_that_the_table_was_not_corrected_on(spaces, space, make_backend, effort, table_file):
    table = build_table(space, table_file, make_backend(), effort=effort)
    drawn = spaces.draw_networks(space, table, 20)
    assert not set(drawn["sizes"]) & set(table.networks)
    assert len(drawn["sizes"]) >= 16 and len(drawn["uniform"]) == 10


def test_the_condensed_figures_have_the_promised_form(load_benchmark):
    row = {"within5": 1.0, "within10": 1.0, "tau": 0.99, "n": 50, "mean_abs": 0.01, "worst": 0.03}
    kind = {"shipped": row, "quarter_to_full": 1.1}
    backend = {"sizes": kind, "uniform": kind, "repeat": {"mean_abs": 0.01}, "device": "a CPU"}
    found = {
        "spaces": {"spaces": {"prunet_gpu": {"torch": backend}}},
        "published": {"published": {"v100": {"mean_abs": 0.06, "worst": 0.1}}},
        "targets": {"targets": [{"target_ms": 1.0, "measured_ms": 0.98}]},
        "repeat": {"n": 40, "marked": 0.5, "unmarked_within2": 0.96, "rows": [1, 2]},
    }
    figures = load_benchmark("latency_accuracy").condense(found)
    assert figures["spaces"]["prunet_gpu"]["torch"]["within5"] == 1.0
    assert figures["spaces"]["prunet_gpu"]["torch"]["uniform"]["tau"] == 0.99
    assert figures["published"]["v100"]["worst"] == 0.1
    assert figures["targets"][0]["measured_ms"] == 0.98
    assert "rows" not in figures["repeat"]
    json.dumps(figures)


def test_a_part_is_run_again_for_another_command(load_benchmark, monkeypatch, tmp_path):
    accuracy = load_benchmark("latency_accuracy")
    ran = []

    class Done:
        returncode = 0

    def run(command):
        ran.append(command)
        Path(command[-1]).write_text(json.dumps({"run": len(ran)}))
        return Done

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    assert accuracy.run_part("repeat", ["latency_repeat.py", "--quick"], tmp_path) == {"run": 1}
    assert accuracy.run_part("repeat", ["latency_repeat.py", "--quick"], tmp_path) == {"run": 1}
    assert accuracy.run_part("repeat", ["latency_repeat.py"], tmp_path) == {"run": 2}
