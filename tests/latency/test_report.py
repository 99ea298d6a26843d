"""The report: published figures as their sources have them, names that can be read, blocks that add up, resuming."""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError, SpecError, UnknownNameError
from prunet_zoo.latency import accuracy, breakdown, draw, measurement
from prunet_zoo.latency import report as report_module
from prunet_zoo.latency.accuracy import KnownNetwork, known_networks, pareto, select_networks
from prunet_zoo.latency.backends import Setting
from prunet_zoo.latency.breakdown import break_down
from prunet_zoo.latency.build import build_table
from prunet_zoo.latency.commands import report as command
from prunet_zoo.latency.draw import Point, draw_accuracy
from prunet_zoo.latency.labels import overlap, place_boxes
from prunet_zoo.latency.predictions import Predicted, Prediction, from_predictors, from_table, left_out_networks
from prunet_zoo.latency.report import Job, ReportPlan, _groups, _how, make_report
from prunet_zoo.latency.timing import Series
from prunet_zoo.zoo import load_index

ROOT = Path(__file__).parents[2]


def test_the_zoos_accuracies_are_those_of_its_results():
    with open(ROOT / "checkpoints" / "results.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "top1" and row["dataset"] == "ImageNet-1k"]
    published = {row["model"]: (float(row["value"]), int(row["input_size"])) for row in rows}
    mine = {n.name: (n.top1, n.input_size) for n in known_networks() if n.weights is None}
    assert mine == {name: figures for name, figures in published.items() if name in load_index()}


def test_timms_networks_are_timms():
    for network in known_networks():
        if network.weights is not None:
            assert network.teacher is None
            name, tag = network.weights.split(".")
            assert network.name == f"timm/{name}" and timm.is_model(name)
            cfg = timm.get_pretrained_cfg(network.weights)
            assert cfg is not None and cfg.tag == tag
            assert network.input_size in ((cfg.test_input_size or cfg.input_size)[-1], cfg.input_size[-1])
            assert "in21k" not in tag and "in22k" not in tag and "jft" not in tag  # ImageNet-1k alone


def test_distilled_networks_name_their_teachers():
    teachers = {n.name: n.teacher for n in known_networks() if n.teacher}
    assert teachers == {
        "prunet_p0": "tf_efficientnet_b2", "prunet_p1": "tf_efficientnet_b2",
        "gpunet_d1": "tf_efficientnet_b5_ns", "gpunet_d2": "tf_efficientnet_b6_ns",
    }  # fmt: skip
    assert all(timm.is_model(teacher) for teacher in teachers.values())


def test_every_network_is_listed_once_with_a_label_of_its_own():
    networks = known_networks()
    assert len({(n.name, n.input_size) for n in networks}) == len({n.label for n in networks}) == len(networks) >= 30
    assert {n.family for n in networks} >= {"PruNet", "GPUNet", "EfficientNet", "EfficientNetV2", "MobileNetV3"}


def test_names_labels_and_families_select():
    assert [n.label for n in select_networks(["p0", "timm/resnet18"])] == ["P0", "R18@224", "R18@288"]
    assert {n.family for n in select_networks(["resnet", "PruNet"])} == {"ResNet", "PruNet"}
    assert len(select_networks()) == len(known_networks())
    assert all(n.input_size <= accuracy.QUICK_SIDE for n in select_networks(quick=True))
    assert select_networks(["gpunet_d2"], quick=True)[0].input_size == 528  # named ones are meant
    with pytest.raises(UnknownNameError, match=r"did you mean.*prunet_p0"):
        select_networks(["prunet_p9"])


points = st.lists(st.tuples(st.integers(1, 30).map(float), st.integers(60, 90).map(float)), max_size=25)


@given(points)
def test_the_pareto_line_has_all_that_nothing_beats_and_nothing_else(found):
    line = pareto(found)
    for i, (ms, top1) in enumerate(found):
        beaten = any(m <= ms and t >= top1 and (m, t) != (ms, top1) for m, t in found)
        if beaten:
            assert i not in line
        else:
            assert (ms, top1) in [found[j] for j in line]
    assert [found[j] for j in line] == sorted({found[j] for j in line})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12, unique=True))
def test_boxes_cover_neither_each_other_nor_points(cells):
    spots = [(100.0 + 80 * x, 100.0 + 50 * y) for x, y in cells]
    boxes = place_boxes(spots, [(50.0, 10.0)] * len(spots), (0, 0, 1000, 700))
    for i, box in enumerate(boxes):
        assert overlap(box, (0, 0, 1000, 700)) == pytest.approx(500)
        assert not any(overlap(box, other) for other in boxes[:i])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in spots)


def test_no_name_of_the_picture_covers_another():
    shown = [
        Point(n.label, n.family, 10 ** (i % 7 / 6 + (n.top1 - 68) / 9), n.top1, 1.0, 1e4)
        for i, n in enumerate(known_networks())
    ]
    fig = draw_accuracy(shown, "title")
    ax = fig.axes[0]
    renderer = fig.canvas.get_renderer()
    boxes = {t.get_text(): t.get_window_extent(renderer).extents for t in ax.texts}
    assert set(boxes) == {p.label for p in shown}
    names = list(boxes)
    for i, name in enumerate(names):
        covered = [other for other in names[:i] if overlap(tuple(boxes[name]), tuple(boxes[other])) > 0]
        assert not covered, f"{name} covers {covered}"


def test_blocks_and_call_make_the_whole_network(space, make_backend):
    spec = space.decode(space.largest())
    backend = make_backend()
    result = break_down(spec, backend, seconds=0.0)
    assert [p.name for p in result.parts] == [p.name for p in spec.placed()] + ["tail"]
    assert result.whole_ms - result.sum_ms == pytest.approx(0.01)  # the call, which no block has
    weights = {p.name: p.block.params(p.in_channels) for p in spec.placed()}
    first = result.parts[0]
    assert first.ms == pytest.approx(1e-4 * 3 * 4 * 9) and weights[first.name] >= 3 * 4 * 9
    assert sum(result.by_kind().values()) == pytest.approx(result.sum_ms)


def test_slow_rounds_do_not_count_and_a_part_below_zero_stays(space, make_backend, monkeypatch):
    class Known(breakdown.References):
        def are_clean(self, rows):
            return [row == "clean" for row in rows]

    def time_sets(sets, seconds, references=None):
        placed = list(spec.placed())
        ends = [(p.in_channels, p.in_size) for p in placed] + [(placed[-1].block.out_channels, placed[-1].out_size)]
        frames = len(set(ends))
        values = [5.0] * frames + [3.0] * (len(sets[0]) - frames)
        looks = ["clean"] * 6 + ["slow"] * 6
        return [[Series(rounds=[[ms]] * 6 + [[ms / 10]] * 6, looks=looks) for ms in values]]

    spec = space.decode(space.largest())
    monkeypatch.setattr(breakdown, "References", Known)
    monkeypatch.setattr(breakdown, "time_sets", time_sets)
    result = break_down(spec, make_backend())
    assert result.whole_ms == 3.0 and result.parts[0].ms == -2.0
    heights = [bar.get_height() for bar in draw.draw_breakdowns([result]).axes[0].patches]
    assert min(heights) == 0.0


def test_a_table_is_checked_in_its_own_memory_format(space, table_file, make_backend, effort):
    backend = make_backend()
    backend.memory_formats = ("contiguous", "channels_last")
    table = build_table(space, table_file, backend, effort=effort, memory_format="channels_last")
    assert _how(table).setting == Setting(memory_format="channels_last")


def test_predictors_are_shown_with_networks_left_out_of_their_fit():
    found = {p.source: p for p in from_predictors()}
    assert {"v100-tensorrt-fp16", "a100-tensorrt-fp16"} <= set(found)
    v100 = found["v100-tensorrt-fp16"]
    assert v100.published and {n.measured_ms for n in v100.networks} >= {0.63, 0.96}  # P0 and P1, as published


def test_the_statistics_of_a_prediction():
    pairs = [(1.0, 1.0), (2.18, 2.0), (2.88, 3.0), (5.0, 4.0)]
    shown = Prediction(
        source="s",
        about="",
        published=False,
        networks=tuple(Predicted(name=str(p), predicted_ms=p, measured_ms=m) for p, m in pairs),
    )
    assert shown.worst == pytest.approx(0.25) and shown.typical == pytest.approx(0.065)
    assert shown.tau == 1.0 and shown.within(0.05) == 0.5 and shown.within(0.1) == 0.75
    assert Prediction(source="s", about="", published=False, networks=shown.networks[:1]).tau is None


def test_a_table_is_checked_on_networks_that_it_was_not_corrected_on(space, table_file, make_backend, effort):
    table = build_table(space, table_file, make_backend(), effort=effort)
    specs = left_out_networks(table, 5)
    assert specs and specs == left_out_networks(table, 5)
    assert not {spec.hash for spec in specs} & {space.decode(e).hash for e in table.networks}
    assert len({spec.name for spec in specs}) == len(specs)
    records = [SimpleNamespace(median_ms=2 * table(spec)) for spec in specs]
    shown = from_table(table, specs, records)
    assert [n.error for n in shown.networks] == pytest.approx([-0.5] * len(specs)) and not shown.published


def test_groups_hold_every_network_and_fit(space):
    small = Job(space.decode(space.largest()), 16)
    groups = _groups([small] * 7, 3 * small.params)
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [len(group) for group in _groups([small] * 2, small.params - 1)] == [1, 1]


NETWORKS = [
    KnownNetwork(name=f"timm/{name}", family="Small <&>", label=name, input_size=32, top1=top1, weights=f"{name}.x")
    for name, top1 in (("mobilenetv3_small_050", 50.0), ("tinynet_e", 60.0), ("lcnet_050", 55.0))
]


def changed_records(monkeypatch, **changes) -> None:
    """Records as they are made, but with these values; otherwise undisturbed, whatever else this machine does."""

    def measure(*args, keep, **options):
        changed = {"disturbed": (), **changes}
        measurement.measure_together(*args, keep=lambda r: keep(r.model_copy(update=changed)), **options)

    monkeypatch.setattr(report_module, "measure_together", measure)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    changed_records(monkeypatch)


@pytest.fixture
def plan_of(space, tmp_path):
    path = tmp_path / "net.json"
    path.write_text(space.decode(space.largest()).to_json(), encoding="utf-8")

    def plan(backend, **changes) -> ReportPlan:
        options = {"blocks": [str(path)], "attempts": 1, "seconds": 0.0, "block_seconds": 0.0}
        return ReportPlan(NETWORKS, backend=backend, **{**options, **changes})

    return plan


def test_the_folder_has_page_pictures_records_and_figures(plan_of, make_backend, tmp_path):
    out, said = tmp_path / "out", []
    data = make_report(out, plan_of(make_backend()), lambda *progress: said.append(progress))
    names = {p.name for p in out.iterdir()}
    assert {"report.html", "report.json", "records.jsonl", "blocks.json", "accuracy.png", "blocks.png"} <= names
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(data))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3  # accuracy, predictors, blocks
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # self-contained
    assert "timm/lcnet_050" in page and "fake device" in page
    assert said[0][0] == 0 and said[-1][:2] == (4, 4) and all(a <= b for a, b, _ in said)
    assert set(data["pareto"]) <= {n.label for n in NETWORKS} and data["reference"]["spread"] == 0


def test_a_disturbed_record_is_marked_with_its_reasons(plan_of, make_backend, tmp_path, monkeypatch):
    out = tmp_path / "out"
    changed_records(monkeypatch, disturbed=("load <1> & more",))
    make_report(out, plan_of(make_backend()))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "load &lt;1&gt; &amp; more" in page
    assert re.search(r"On the Pareto line: \S+ \(disturbed\).* Where disturbed figures are shown \(grey\)", page)


def test_disturbed_and_distilled_points_are_marked():
    clean, hollow = (Point("a", "ResNet", 1, 70, 1, 1), Point("b", "PruNet", 2, 80, 2, 2, distilled=True))
    grey = Point("c", "GPUNet", 3, 90, 3, 3, disturbed=True)
    for shown, wanted in (([clean], []), ([clean, hollow], ["hollow: distilled"]), ([grey], ["grey: disturbed"])):
        fig = draw_accuracy(shown, "title")
        names = [text.get_text() for text in fig.legends[0].get_texts()]
        assert [name for name in names if name.startswith(("hollow", "grey"))] == wanted
        line = [name for name in names if name.startswith("Pareto line")]
        assert line == ["Pareto line (uncertain: disturbed points on it)" if grey in shown else "Pareto line"]
        faces = {line.get_markerfacecolor() for line in fig.axes[0].lines if len(line.get_xdata()) == 1}
        assert ("white" in faces) == (hollow in shown) and (draw.DISTURBED in faces) == (grey in shown)


@pytest.mark.usefixtures("no_page")
def test_disturbed_and_quick_records_are_measured_again(plan_of, make_backend, tmp_path, monkeypatch):
    out, count = tmp_path / "out", lambda: len((tmp_path / "out" / "records.jsonl").read_bytes().splitlines())
    make_report(out, plan_of(make_backend()))
    assert count() == 3
    careful = {"attempts": 2, "seconds": 1e-6}
    make_report(out, plan_of(make_backend(), **careful))  # more attempts
    assert count() == 6
    make_report(out, plan_of(make_backend(), **careful))
    make_report(out, plan_of(make_backend()))  # less than what is there
    assert count() == 6
    careful["seconds"] = 2e-6
    changed_records(monkeypatch, disturbed=("load",))
    make_report(out, plan_of(make_backend(), **careful))  # more time
    assert count() == 9
    changed_records(monkeypatch)
    data = make_report(out, plan_of(make_backend(), **careful))
    assert count() == 12 and not any(n["record"]["disturbed"] for n in data["networks"])


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr("prunet_zoo.latency.report_page.write_page", lambda *args: None)  # drawing takes a second


@pytest.mark.usefixtures("no_page")
def test_an_interrupted_report_goes_on_where_it_was(plan_of, make_backend, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_report(out, plan_of(make_backend(fail_after=3)))  # after the networks, before the blocks
    assert len((out / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert not (out / "report.json").exists()
    again = make_backend()
    make_report(out, plan_of(again))
    assert not any(type(m).__module__.startswith("timm") for m in again.prepared)
    kept = (out / "records.jsonl").read_bytes()
    make_report(out, plan_of(make_backend(fail_after=0)))
    assert (out / "records.jsonl").read_bytes() == kept


@pytest.mark.usefixtures("no_page")
def test_another_device_or_setting_is_measured_anew(plan_of, make_backend, tmp_path):
    out = tmp_path / "out"
    make_report(out, plan_of(make_backend()))
    for other in (make_backend(device="another"), make_backend(version="2")):
        data = make_report(out, plan_of(other))
        assert {n["record"]["device"] for n in data["networks"]} == {other.device}
        assert {n["record"]["backend_version"] for n in data["networks"]} == {other.version}
    assert len((out / "records.jsonl").read_text(encoding="utf-8").splitlines()) == 9


def test_a_damaged_file_of_blocks_is_named(plan_of, make_backend, tmp_path):
    (tmp_path / "blocks.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LatencyError, match=r"blocks\.json holds no list"):
        make_report(tmp_path, plan_of(make_backend()))
    (tmp_path / "blocks.json").write_text('[{"spec_name": 3}]', encoding="utf-8")
    with pytest.raises(SpecError, match=r"blocks\.json, entry 0"):
        make_report(tmp_path, plan_of(make_backend()))


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(["report", *argv])


@pytest.mark.parametrize(
    "argv, error, message",
    [
        (["--networks", "nothing-like-it"], UnknownNameError, "unknown network"),
        (["--random", "1"], LatencyError, "from 2"),
        (["--seconds", "-1"], LatencyError, "--seconds"),
        (["--table", "missing.jsonl", "--networks", "p0"], LatencyError, "missing.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_measuring(argv, error, message, tmp_path):
    with pytest.raises(error, match=message):
        command.run(parse("--out", str(tmp_path / "out"), *argv))
    assert not (tmp_path / "out").exists()
