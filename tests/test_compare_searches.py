"""tools/report.py: what is read, what may share an axis, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunet_zoo.compare import compare, pareto_line, read_searches
from prunet_zoo.compare.draw import draw_comparison
from prunet_zoo.compare.page import HEAD, TUNED, cells, render
from prunet_zoo.compare.reports import Found
from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
TABLE = {"device": "CPU A", "backend": "onnxruntime", "dtype": "fp32", "batch": 1, "threads": 1, "accelerator": "cpu"}


def report(method: str = "TieredPruning", seed: int = 0, ms: float | None = 0.07, **more: Any) -> dict[str, Any]:
    """What a search writes, as far as it is compared, and a field that is not."""
    record = None if ms is None else {**TABLE, "median_ms": ms, "ci_low_ms": 0.99 * ms, "ci_high_ms": 1.01 * ms}
    return {
        "name": f"net-{seed}", "method": method, "space": {"name": "small", "hash": "x", "count": 9.0}, "seed": seed,
        "unit": "ms", "target": 0.0715, "predicted": 0.069, "measured": record and {**record, "disturbed": []},
        "status": "measured" if ms else "predicted", "cost": {**TABLE, "backend_version": "1"}, "top1_inherited": 90.0,
        "params": 300_000, "macs": 6_000_000, "seconds": 12.0, "history": [{"peak_mb": 300.0}, {"peak_mb": 410.5}],
        "events": [], **more,
    }  # fmt: skip


def write(folder: Path, content: dict[str, Any] | str, **config: Any) -> Path:
    """A finished search's folder; ``config``: settings of its strategy."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "spec.json").write_text("{}")
    (folder / "report.html").write_text("<p>")
    flat = {f"train_cfg.strategy.{key}": value for key, value in {"type": "TieredPruning", **config}.items()}
    (folder / "config_fingerprint.json").write_text(json.dumps(flat))
    return folder


def under_way(folder: Path, strategy: str = "DDPNAS") -> Path:
    folder.mkdir(parents=True)
    (folder / "config_fingerprint.json").write_text(json.dumps({"train_cfg.strategy.type": strategy}))
    return folder


def test_a_report_says_what_was_found(tmp_path: Path):
    write(tmp_path / "a", report("PruningAsSearch", seed=3))
    ((found,), rest) = read_searches([tmp_path / "a"])
    assert rest == [] and found.method == "pas" and (found.kind, found.cost, found.seed) == ("measured", 0.07, 3)
    assert (found.low, found.high) == pytest.approx((0.0693, 0.0707)) and found.peak_mb == 410.5
    write(tmp_path / "b", report(peak_mb=99.0, search_seconds=70.0, ms=None))
    ((found,), _) = read_searches([tmp_path / "b"])
    assert (found.kind, found.cost, found.peak_mb, found.seconds) == ("predicted", 0.069, 99.0, 70.0)
    counted = report(ms=None, unit="MMACs", target=5.0, predicted=4.9, cost={"cost": "MACs computed from the spec"})
    write(tmp_path / "c", counted)
    ((found,), _) = read_searches([tmp_path / "c"])
    assert (found.kind, found.unit, found.setting) == ("counted", "MMACs", ())


def test_epochs_trained_since_the_decision_are_told(tmp_path: Path):
    write(tmp_path / "a", report("PruningAsSearch", epochs=16, decided_epoch=12))
    write(tmp_path / "b", report("TieredPruning", epochs=16, decided_epoch=16))
    write(tmp_path / "c", report("Archtree"))  # an older report
    found, _ = read_searches([tmp_path])
    assert [f.tuned for f in found] == [4, 0, None]
    assert [cells(f)[HEAD.index(TUNED)] for f in found] == ["4", "0", "–"]
    assert len(cells(found[0])) == len(HEAD)
    page = render(tmp_path, compare(found), None, [])
    assert f"<th>{TUNED}</th>" in page and "before any training" not in page


def test_a_folder_of_searches_stands_for_them_and_none_is_read_twice(tmp_path: Path):
    write(tmp_path / "runs" / "a", report())
    write(tmp_path / "runs" / "b", report(seed=1))
    under_way(tmp_path / "runs" / "c")
    (tmp_path / "runs" / "notes").mkdir()
    found, rest = read_searches([tmp_path / "runs", tmp_path / "runs" / "a"])
    assert [f.seed for f in found] == [0, 1] and [u.method for u in rest] == ["ddpnas"]


def test_a_search_that_is_killed_while_it_writes_is_not_finished(tmp_path: Path):
    folder = write(tmp_path / "a", report())
    (folder / "spec.json").unlink()
    assert [u.folder for u in read_searches([folder])[1]] == [str(folder)]
    (folder / "config_fingerprint.json").unlink()  # results that were copied elsewhere
    assert len(read_searches([folder])[0]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"method": "x", "target"', "report.json is damaged"),
        ("[1]", "a JSON object is expected"),
        (json.dumps({k: v for k, v in report().items() if k != "macs"}), "macs: Field required"),
        (json.dumps(report(predicted=-1.0)), "predicted: Input should be greater than 0"),
        (json.dumps(report(measured={"median_ms": 1.0})), "measured.ci_low_ms: Field required"),
    ],
)
def test_damaged_reports_are_named(tmp_path: Path, content: str, words: str):
    write(tmp_path / "a", content)
    with pytest.raises(DataError, match=words.replace(".", r"\.")) as error:
        read_searches([tmp_path / "a"])
    assert "run its search again" in str(error.value)


def test_folders_that_are_no_search_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="is no folder"):
        read_searches([tmp_path / "nothing"])
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / "report.json").write_text('{"networks": []}')  # of another tool
    with pytest.raises(DataError, match="is no search: neither it nor a folder in it"):
        read_searches([tmp_path / "latency"])


def test_a_folder_without_a_search_is_named_and_the_others_are_compared(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    refused = tmp_path / "refused"  # at its target, before the first step
    (refused / "20260101_000000").mkdir(parents=True)
    arguments = [str(write(tmp_path / "a", report())), str(refused), "--out", str(tmp_path / "out")]
    assert tool.main(arguments) == 0
    shown = capsys.readouterr()
    assert f"no search in it, left out: {refused}\n" in shown.err and "1 searches" in shown.out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unfinished"][0]["folder"] == str(refused)


def test_devices_units_and_data_get_panels_of_their_own(tmp_path: Path):
    other = report(measured={**report()["measured"], "device": "CPU B"})
    macs = report(ms=None, unit="MMACs", target=5.0, cost={})
    for i, content in enumerate((report(), report("Archtree"), other, macs, report(data="cifar10"))):
        write(tmp_path / str(i), content)
    panels = compare(read_searches([tmp_path])[0])
    plain = [p for p in panels if p.data is None]
    assert sorted((p.unit, dict(p.setting).get("device", ""), len(p.settings)) for p in plain) == [
        ("MMACs", "", 1),
        ("ms", "CPU A", 2),
        ("ms", "CPU B", 1),
    ]
    assert [p.data for p in panels if p.data] == ["cifar10"]
    figure = draw_comparison(panels)
    assert figure is not None and len(figure.axes) == 4
    assert {ax.get_xlabel() for ax in figure.axes} == {"latency (ms)", "computed cost (MMACs)"}


def test_seeds_of_a_setting_stand_together(tmp_path: Path):
    for seed, (ms, top1) in enumerate([(0.069, 90.0), (0.070, 92.0), (0.071, 94.0)]):
        write(tmp_path / str(seed), report(seed=seed, ms=ms, top1_inherited=top1))
    write(tmp_path / "far", report(target=0.2, ms=0.19))
    ((panel),) = compare(read_searches([tmp_path])[0])
    several, single = panel.settings
    assert (several.cost, several.top1) == pytest.approx((0.07, 92.0)) and several.cost_range == (0.069, 0.071)
    told = several.to_dict()
    assert told["top1_range"] == [90.0, 94.0] and told["top1_deviation"] == 2.0 and told["seeds"] == [0, 1, 2]
    assert single.cost_range == pytest.approx((0.1881, 0.1919))
    assert panel.to_dict()["pareto"] == [0]  # dearer and less accurate than the mean of the others


def test_only_searches_that_differ_in_nothing_but_the_seed_are_averaged(tmp_path: Path):
    for seed, beam in ((0, 1), (1, 1), (0, 4), (1, 4)):
        name = tmp_path / f"{beam}{seed}"
        write(name, report("Archtree", seed, top1_inherited=80.0 + beam + seed), beam=beam, target=seed, credit="x")
        path = name / "config_fingerprint.json"
        flat = json.loads(path.read_text())
        path.write_text(json.dumps({**flat, "randomness.seed": seed, "train_cfg.name": f"net-{seed}"}))
    write(tmp_path / "more", report("Archtree"), beam=4)  # credit is left at its default
    (panel,) = compare(read_searches([tmp_path])[0])
    assert [(s.label, s.top1, len(s.found)) for s in panel.settings] == [
        ("beam=1, credit=x", 81.5, 2),
        ("beam=4, credit=x", 84.5, 2),
        ("beam=4, credit not set", 90.0, 1),
    ]
    assert panel.settings[0].to_dict()["differs"] == {"train_cfg.strategy.beam": 1, "train_cfg.strategy.credit": "x"}
    page = render(tmp_path, [panel], None, [])
    assert "archtree (beam=4, credit=x)" in page and "differ in more than the seed" in page
    figure = draw_comparison([panel])
    assert figure is not None
    assert "archtree (beam=4, credit not set)" in {text.get_text() for text in figure.axes[0].texts}


def test_the_report_knows_its_settings_and_what_is_not_known_is_not_averaged(tmp_path: Path):
    config = {"train_cfg.max_epochs": 16, "param_scheduler.T_max": 16}
    longer = {"train_cfg.max_epochs": 32, "param_scheduler.T_max": 32}
    for i, more in enumerate(({"config": config}, {"config": config, "verify": 1}, {"config": longer}, {}, {})):
        (write(tmp_path / str(i), report(seed=i, **more)) / "config_fingerprint.json").unlink()  # results were copied
    (panel,) = compare(read_searches([tmp_path])[0])
    unknown = "settings not known"
    assert [s.label for s in panel.settings] == [
        "max_epochs=16, verify not set, …", "max_epochs=16, verify=1, …", "max_epochs=32, verify not set, …",
        unknown, unknown,
    ]  # fmt: skip
    assert panel.settings[2].to_dict()["differs"]["param_scheduler.T_max"] == 32


def test_a_seed_counts_once(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, seed, top1 in (("a", 0, 90.0), ("b", 1, 92.0), ("c", 0, 70.0)):
        write(tmp_path / "runs" / name, report(seed=seed, top1_inherited=top1))
    for name in ("d", "e"):
        write(tmp_path / "runs" / name, report("Archtree", seed=None))  # nobody knows whether it is the same
    out = tmp_path / "out"
    assert tool.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    runs, shown = tmp_path / "runs", capsys.readouterr()
    assert f"seed 0 again, not counted: {runs / 'c'}; {runs / 'a'} counts" in shown.err and "4 searches" in shown.out
    first, second = json.loads((out / "report.json").read_text())["panels"][0]["settings"]
    assert (first["seeds"], first["top1"], first["repeated"]) == ([0, 1], 91.0, [str(runs / "c")])
    assert second["seeds"] == [None, None] and second["repeated"] == []
    assert "The same seed again, not counted" in (out / "report.html").read_text()


def found(cost: float, top1: float | None, seed: int = 0) -> Found:
    return Found(
        folder="", name="", method="tiered", space="s", data=None, seed=seed, unit="ms", target=cost, cost=cost,
        low=cost, high=cost, kind="measured", setting=(), status="measured", disturbed=False, top1=top1, macs=1,
        params=1, seconds=1.0, peak_mb=None,
    )  # fmt: skip


POINTS = st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.integers(50, 55))), min_size=1, max_size=8)


@given(POINTS)
def test_the_pareto_line_holds_what_nothing_beats(points: list[tuple[int, int | None]]):
    (panel,) = compare([found(float(cost), top1 and float(top1), seed) for seed, (cost, top1) in enumerate(points)])
    line = pareto_line(panel.settings)
    assert [s.cost for s in line] == sorted(s.cost for s in line)
    for s in panel.settings:
        beaten = any(o.cost <= s.cost and o.top1 >= s.top1 for o in line if s.top1 is not None)
        assert s.top1 is None or beaten
    for s in line:
        assert not any(
            o.cost <= s.cost and o.top1 >= s.top1 and (o.cost, o.top1) != (s.cost, s.top1)
            for o in panel.settings
            if o.top1 is not None
        )


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("report")


def test_the_tool_writes_a_page_that_stands_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")  # what a pipe counts for
    runs, out = tmp_path / "runs", tmp_path / "out"
    for seed in (0, 1):
        write(runs / f"tiered{seed}", report(seed=seed, top1_inherited=90.0 + seed))
    write(runs / "ddpnas", report("DDPNAS", ms=None))
    write(runs / "pas", report("PruningAsSearch", status="missed: tries used up", top1_inherited=None))
    under_way(runs / "tree", "Archtree")
    assert tool.main([str(runs), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "4 searches" in shown.out and "predicted" in shown.out and "missed" in shown.out
    lines = [line for line in shown.out.splitlines() if "CPU A, onnxruntime, 1 thr." in line]
    assert len(lines) == 4, shown.out  # a search a line: nothing is folded
    assert f"not finished, left out: {runs / 'tree'} (archtree)" in shown.err
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "<script" not in page and "http" not in page
    assert "../runs/tiered0/report.html" in page and "tries used up" in page and "not finished" in page
    assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "report.json").read_text())
    assert [row["method"] for row in data["searches"]] == ["tiered", "tiered", "ddpnas", "pas"]
    assert data["unfinished"][0]["method"] == "archtree"
    before = (out / "report.json").read_bytes()
    assert tool.main([str(runs), "--out", str(out)]) == 0 and (out / "report.json").read_bytes() == before


def test_the_tool_replaces_no_search_and_says_when_none_is_finished(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write(tmp_path / "a", report())
    for arguments, words in (
        ([str(folder), "--out", str(folder)], "is the work directory of a search"),
        ([str(folder), "--out", str(folder / "spec.json")], "is a file; give a folder"),
        ([str(under_way(tmp_path / "b")), "--out", str(tmp_path / "out")], "none of these searches is finished"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_plain_tool(tool.main, arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert json.loads((folder / "report.json").read_text())["method"] == "TieredPruning"
    assert not (tmp_path / "out").exists()


def test_without_accuracies_there_is_a_table_and_no_picture(tool: ModuleType, tmp_path: Path):
    write(tmp_path / "a", report(top1_inherited=None))
    out = tmp_path / "out"
    out.mkdir()
    (out / "accuracy_latency.png").write_text("of an earlier call")
    assert tool.main([str(tmp_path / "a"), "--out", str(out)]) == 0
    assert (
        not (out / "accuracy_latency.png").exists() and "No network was evaluated" in (out / "report.html").read_text()
    )


def test_neither_torch_nor_mmengine_is_needed():
    code = "import sys\nfor name in ('torch', 'mmengine', 'timm'): sys.modules[name] = None\n"
    code += "import prunet_zoo.compare.page"
    subprocess.run([sys.executable, "-c", code], check=True)
