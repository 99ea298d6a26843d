"""tools/pipeline.py with stages that only write their files: what runs, what is skipped or begins anew, the report."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunet_zoo.errors import UnknownNameError
from prunet_zoo.mm import pipeline_config
from prunet_zoo.mm.cli import ConfigError, load_config, run_tool
from prunet_zoo.mm.pipeline import Pipeline, StageError
from prunet_zoo.mm.pipeline_config import PipelineConfig, _flat, _shown
from prunet_zoo.mm.pipeline_report import collect, read_scalars, rows_of

ROOT = Path(__file__).resolve().parents[2]
SEARCH = "configs/search/tiered_prunet-cpu-small_digits.py"
CLASSIFIER = "configs/classification/prunet-cpu-small_digits.py"
DETECTOR = "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
CONFIG = {
    "title": "a test",
    "target_ms": 0.3,
    "table": {"space": "prunet_cpu_small"},
    "search": {"config": SEARCH},
    "classifier": {"config": CLASSIFIER},
    "detectors": {"one": {"config": DETECTOR}, "two": {"config": DETECTOR, "weights": "search"}},
}
ALL = ["table", "search", "classifier", "one", "two", "measure", "picture"]


class Bench:
    """A work directory, a repository of stand-ins, and what they were called with."""

    def __init__(self, root: Path, stages: ModuleType) -> None:
        self.root, self.out, self.stages = root, root / "out", stages
        self.config = json.loads(json.dumps(CONFIG))
        stages.make_repository(root)

    def make(self, **changes: Any) -> Pipeline:
        return Pipeline(PipelineConfig({**self.config, **changes}, self.out, self.root, self.root))

    def run(self, rerun: tuple[str, ...] = (), actions: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        """The stages that ran."""
        self.stages.set_actions(self.root, actions or {})
        pipeline = self.make(**changes)
        pipeline.forget(rerun)
        pipeline.run()
        return pipeline.ran

    @property
    def calls(self) -> dict[str, tuple[list[str], bool]]:
        return {stage: (argv, resumed) for stage, argv, resumed in self.stages.read_calls(self.root)}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_stages: ModuleType) -> Bench:
    monkeypatch.setattr(pipeline_config, "LatencyTable", SimpleNamespace(load=lambda path: path.read_text()))
    monkeypatch.setattr(pipeline_config, "cost_range", lambda table, space: ((0.1, None), (0.7, None)))
    return Bench(tmp_path, fake_stages)


def test_stages_run_once_and_in_order(bench: Bench) -> None:
    assert bench.run() == ALL
    out, spec = str(bench.out), str(bench.out / "search/spec.json")
    for name, weights in (("one", "classifier/best.safetensors"), ("two", "search/weights.safetensors")):
        argv, _ = bench.calls[name]
        tail = ["--work-dir", f"{out}/{name}", "--seed", "0", "--resume"]
        assert argv == [DETECTOR, "--arch", spec, "--weights", f"{out}/{weights}", *tail]
    assert bench.run() == [] and not bench.calls


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("search", ALL[1:]),
        ("classifier", ["classifier", "one", "measure", "picture"]),
        ("two", ["two", "measure", "picture"]),
        ("picture", ["picture"]),
    ],
)
def test_a_stage_and_what_depends_on_it_run_again(bench: Bench, name: str, after: list[str]) -> None:
    bench.run()
    (bench.out / "search/old.json").write_text("{}")
    assert bench.run(rerun=(name,)) == after
    assert not any(resumed for _, resumed in bench.calls.values())  # each begins with an empty folder
    assert (bench.out / "search/old.json").exists() == ("search" not in after)
    assert bench.run() == []


def test_changed_inputs(bench: Bench) -> None:
    bench.run()
    bench.config["seed"] = 1
    assert bench.run() == ALL[1:5]  # what they leave is the same, so it needs no new measurement and picture
    options = {"config": DETECTOR, "cfg_options": {"train_cfg": {"max_epochs": 7}}}
    detectors = {**bench.config["detectors"], "one": options}
    assert bench.run(detectors=detectors)[0] == "one" and "two" not in bench.calls
    assert bench.calls["one"][0][-2:] == ["--cfg-options", "train_cfg.max_epochs=7"]


def test_other_weights_are_another_input(bench: Bench) -> None:
    bench.run()
    (bench.root / "salt").write_text("!")  # the search would find other weights now
    assert bench.run(rerun=("search",)) == ALL[1:]
    assert bench.run() == []


@pytest.mark.parametrize("how", ["missing", pytest.param("changed", marks=pytest.mark.slow)])
def test_a_result_that_does_not_stand_is_made_again(bench: Bench, how: str) -> None:
    bench.run()
    path = bench.out / "classifier/best.safetensors"
    path.unlink() if how == "missing" else path.write_text("something else")
    assert bench.run() == ["classifier"]  # its result is the same: what depends on it stands
    assert bench.run() == []


def test_a_failing_stage_goes_on_where_it_was(bench: Bench) -> None:
    with pytest.raises(StageError, match=r"stage 'one' ended with status 3; .* goes on with this stage"):
        bench.run(actions={"one": 3})
    assert list(bench.calls) == ["table", "search", "classifier", "one"]
    assert bench.run() == ["one", "two", "measure", "picture"]
    assert bench.calls["one"][1]  # found what it had begun
    with pytest.raises(StageError, match=r"'two' ended well, but left no two/metrics.json, two/last_checkpoint"):
        bench.run(rerun=("two",), actions={"two": "nothing"})


def test_a_rerun_that_was_stopped_goes_on(bench: Bench) -> None:
    bench.run()
    with pytest.raises(StageError):
        bench.run(rerun=("search",), actions={"classifier": 1})
    assert bench.run(rerun=("search",)) == ["classifier", "one", "two", "measure", "picture"]
    assert bench.run(rerun=("search",)) == ALL[1:]  # it was finished: a new request


# `bench`'s patches do not reach a process of its own; with a target nothing reads the table
CHILD = """
import sys
from pathlib import Path
from prunet_zoo.mm.pipeline import Pipeline
from prunet_zoo.mm.pipeline_config import PipelineConfig
import json
root = Path(sys.argv[1])
Pipeline(PipelineConfig(json.loads(sys.argv[2]), root / "out", root, root)).run()
"""


@pytest.mark.parametrize("stage", ["search", pytest.param("speed_one", marks=pytest.mark.slow)])
def test_killed_with_its_child(bench: Bench, stage: str) -> None:
    bench.stages.set_actions(bench.root, {stage: "SIGKILL"})
    command = [sys.executable, "-c", CHILD, str(bench.root), json.dumps(bench.config)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    before = ["table"] if stage == "search" else ALL[:5]
    assert bench.run() == [name for name in ALL if name not in before]
    assert bench.calls.get("search", ([], True))[1]  # went on in its folder
    assert bench.run() == []


def test_killed_while_a_result_is_removed(bench: Bench) -> None:
    bench.run()

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prunet_zoo.mm.pipeline._remove", stop)
        bench.run(rerun=("classifier",))
    assert bench.run() == ["classifier", "one", "measure", "picture"]
    assert not bench.calls["classifier"][1]


def test_a_folder_of_something_else_is_left_alone(bench: Bench) -> None:
    (bench.out / "search").mkdir(parents=True)
    (bench.out / "search/thesis.txt").write_text("mine")
    with pytest.raises(StageError, match=r"has search, but no pipeline.json"):
        bench.run()
    assert (bench.out / "search/thesis.txt").read_text() == "mine"
    (bench.out / "pipeline.json").write_text("{")
    with pytest.raises(StageError, match="is damaged"):
        bench.make()


def test_unknown_stage(bench: Bench) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'classifier'"):
        bench.run(rerun=("clasifier",))


BAD = [
    ({"search": None}, "needs search="),
    ({"serach": {}}, "did you mean 'search'"),
    ({"search": {"confg": "x"}}, "did you mean 'config'"),
    ({"classifier": {"cfg_options": {}}}, "classifier needs config="),
    ({"classifier": None}, "one starts from the classifier's weights, but there is no classifier"),
    ({"table": {"space": "a", "file": "b"}}, "either space=… .* or file="),
    ({"target_ms": float("nan")}, "positive number of milliseconds, got nan"),
    ({"target_ms": -1}, "positive number of milliseconds, got -1"),
    ({"detectors": {"search": {"config": DETECTOR}}}, "cannot be a detector's name"),
    ({"detectors": {"../x": {"config": DETECTOR}}}, "cannot be a detector's name"),
    ({"detectors": {"x": {"config": DETECTOR, "weights": "good"}}}, "must be one of best, last, search"),
    ({"measure": 3}, "measure must be a dict"),
    (
        {"search": {"config": SEARCH, "device": "v100-tensorrt-fp16"}},
        "search.device .* and table .* exclude each other",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_configs(bench: Bench, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.make(**changes)


def test_a_table_from_elsewhere(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"latency table .* does not exist"):
        bench.run(table={"file": "v100.jsonl"}, target_ms=None)
    (bench.root / "v100.jsonl").write_text("{}")
    assert bench.run(table={"file": "v100.jsonl"}, target_ms=None) == ALL[1:]
    argv = bench.calls["search"][0]
    assert argv[argv.index("--table") + 1] == str(bench.root / "v100.jsonl") and "--target-ms" not in argv


def test_a_search_for_a_device_that_is_not_at_hand(bench: Bench) -> None:
    section = {"config": SEARCH, "device": "v100-tensorrt-fp16", "verify": 0}
    commands, inputs = bench.make(search=section, table=None, target_ms=0.6).config.stages[0].plan()
    words = " ".join(commands[0].words)
    assert "--target-ms 0.6 --device v100-tensorrt-fp16 --verify 0" in words and "--table" not in words
    assert inputs["device"] == "v100-tensorrt-fp16" and inputs["verify"] == 0


def test_several_processes(bench: Bench) -> None:
    config = bench.make(search={"config": SEARCH, "processes": 2, "args": ["--amp"]}, table=None, target_ms=None).config
    commands, inputs = config.stages[0].plan()
    words = list(commands[0].words)
    assert Path(words[0]).name == "launch.py" and words[1:5] == ["--processes", "2", "tools/search.py", SEARCH]
    assert words[-1] == "--amp" and inputs["processes"] == 2


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["a", "data/x", "1e-3x"]),
        lambda inner: (
            st.lists(inner.filter(lambda v: not isinstance(v, dict)), min_size=1, max_size=3)
            | st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2)
        ),
        max_leaves=6,
    ).filter(lambda v: isinstance(v, dict))
)
def test_options_are_read_back_as_they_were(options: dict[str, Any]) -> None:
    from mmengine.config import Config, DictAction

    def flat_lists(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(flat_lists, value.values()))
        return not isinstance(value, list) or all(not isinstance(v, dict) and flat_lists(v) for v in value)

    if not flat_lists(options):
        return
    words = [f"{key}={_shown(value)}" for key, value in _flat(options)]
    namespace = SimpleNamespace()
    DictAction([], "options")(None, namespace, words)  # type: ignore[arg-type]
    cfg = Config({})
    cfg.merge_from_dict(namespace.options)
    assert cfg.to_dict() == options


def test_report(bench: Bench, load_tool: Callable[[str], ModuleType], monkeypatch: Any, capfd: Any) -> None:
    tool = load_tool("pipeline")
    monkeypatch.setattr(tool, "ROOT", bench.root)
    monkeypatch.chdir(bench.root)
    path = bench.root / "mine.py"
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in CONFIG.items()))
    assert tool.main([str(path), "--cfg-options", "title=other"]) == 0
    out = bench.root / "work_dirs/mine"
    report = json.loads((out / "report.json").read_text())
    assert report["title"] == "other" and report["target_ms"] == 0.3 and report["reach_ms"] == [0.1, 0.7]
    assert list(report["seconds"]) == list(report["commands"]) == ALL
    assert report["detectors"]["two"]["metrics"]["coco/bbox_mAP_50"] == 0.8
    page, shown = (out / "report.html").read_text(), capfd.readouterr().out
    for text in ("one: box mAP50 / mAP", "0.800 / 0.500", "98.00 %", "12.5 ms", "tools/search.py"):
        assert text in page, text
    assert "http" not in page.split("<body>")[1] and page.count("data:image/png;base64,") == 4
    assert "98.00 %" in shown and str(out / "report.html") in shown


def test_logs_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    for name, lines in (
        ("1", ['{"loss": 3, "step": 1}', '{"loss": 2, "step": 2}', '{"lo']),
        ("2", ['{"loss": 1, "step": 2}']),
    ):
        path = tmp_path / name / "vis_data/scalars.json"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines))
    assert read_scalars(tmp_path) == {"loss": [(1, 3), (2, 1)]}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pipeline").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs(path: Path, tmp_path: Path) -> None:
    config = PipelineConfig(load_config(path), tmp_path, ROOT, ROOT)
    for section in (config.cfg["search"], config.cfg["classifier"], *config.detectors.values()):
        load_config(ROOT / section["config"])
    commands, inputs = config.stages[0].plan()
    assert config.stages[0].name == "table" and commands and inputs


def test_a_printed_command_goes_on(
    bench: Bench, load_tool: Callable[[str], ModuleType], monkeypatch: Any, capfd: Any
) -> None:
    tool = load_tool("pipeline")
    monkeypatch.setattr(tool, "ROOT", bench.root)
    monkeypatch.chdir(bench.root)
    (bench.root / "mine.py").write_text("\n".join(f"{key} = {value!r}" for key, value in CONFIG.items()))
    bench.stages.set_actions(bench.root, {"classifier": "SIGTERM"})
    monkeypatch.setattr(sys, "argv", ["tools/pipeline.py", "mine.py", "--target-ms", "0.2"])
    with pytest.raises(SystemExit) as caught:
        run_tool(tool.main)
    assert caught.value.code == 143
    assert json.loads((bench.root / "saved.json").read_text()) == ["SIGTERM"]
    command = shlex.split(capfd.readouterr().err.strip().splitlines()[-1])
    assert command[1:] == sys.argv
    bench.stages.set_actions(bench.root, {})
    assert tool.main(command[2:]) == 0
    assert next(iter(bench.calls)) == "classifier" and bench.calls["classifier"][1]


def test_rows_without_classifier_and_detectors(bench: Bench) -> None:
    changes: dict[str, Any] = {"classifier": None, "detectors": {}}
    assert bench.run(**changes) == ["table", "search", "measure"]
    rows = dict(rows_of(collect(bench.make(**changes))))
    assert "measured" in rows and not any("top-1" in key or "mAP" in key for key in rows)
