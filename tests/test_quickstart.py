"""tools/quickstart.py with stages that only write their files: order, arguments, summary, failures, signals."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prunet_zoo.mm import pipeline_config
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "search": "configs/search/tiered_prunet-cpu-small_digits.py",
    "classifier": "configs/classification/prunet-cpu-small_digits.py",
    "detector": "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py",
}
STAGES = ["table", "search", "classifier", "detector", "measure", "picture"]
CALLS = [*STAGES[:5], "speed_detector", "picture"]


class Bench:
    """The tool with its stages replaced, and what they were called with."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stages: ModuleType
    ) -> None:
        self.root, self.out, self.monkeypatch, self.capfd, self.stages = root, root / "out", monkeypatch, capfd, stages
        stages.make_repository(root)
        self.tool = load_tool()
        monkeypatch.setattr(self.tool, "ROOT", root)
        monkeypatch.setattr(pipeline_config, "LatencyTable", SimpleNamespace(load=lambda path: path.read_text()))
        monkeypatch.setattr(pipeline_config, "cost_range", lambda table, space: ((0.1, None), (0.7, None)))
        self.shown = ""

    def call(self, *argv: str, actions: dict[str, Any] | None = None) -> int:
        """Run it; returns the exit status. ``actions``: what the stages are to do."""
        self.stages.set_actions(self.root, actions or {})
        arguments = ["--work-dir", str(self.out), *argv]
        self.monkeypatch.setattr(sys, "argv", ["tools/quickstart.py", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                run_tool(self.tool.main, drop=self.tool.FRESH)
        finally:
            signal.signal(signal.SIGTERM, before)
        self.shown = "".join(self.capfd.readouterr())
        return int(caught.value.code or 0)

    @property
    def calls(self) -> dict[str, list[str]]:
        """Stage → its arguments, in the order of the last call."""
        return {stage: argv for stage, argv, _ in self.stages.read_calls(self.root)}

    def read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text())


def load_tool(name: str = "quickstart") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fake_stages: ModuleType
) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd, fake_stages)


def test_stages_arguments_and_summary(bench: Bench) -> None:
    assert bench.call("--seed", "3") == 0, bench.shown
    out, calls = bench.out, bench.calls
    assert list(calls) == CALLS
    tail = ["--seed", "3", "--resume"]
    table, spec = str(out / "latency_table.jsonl"), str(out / "search/spec.json")
    assert calls["table"] == ["table", "prunet_cpu_small", "--out", table]
    search = [CONFIGS["search"], "--target-ms", "0.3", "--table", table]  # 0.1 + 0.6 / 3
    assert calls["search"] == [*search, "--work-dir", str(out / "search"), *tail]
    weights = str(out / "search/weights.safetensors")
    classify = [CONFIGS["classifier"], "--arch", spec, "--weights", weights]
    assert calls["classifier"] == [*classify, "--work-dir", str(out / "classifier"), *tail]
    # best.safetensors is chosen on the test scans, which the scenes for validation are made of
    weights = str(out / "classifier/last.safetensors")
    detect = [CONFIGS["detector"], "--arch", spec, "--weights", weights]
    assert calls["detector"] == [*detect, "--work-dir", str(out / "detector"), *tail]
    assert calls["measure"] == ["measure", spec, "--backend", "onnxruntime", "--threads", "1", "--json"]
    assert calls["picture"] == [str(out / "detector"), "--out", str(out / "detections.png")]

    summary, network = bench.read("summary.json"), load_spec(bench.root / "spec.json")
    seconds = summary.pop("seconds")
    assert summary == {
        **{"target_ms": 0.3, "predicted_ms": 0.29, "measured_ms": 0.3, "map50": 0.8, "map": 0.5, "seed": 3},
        **{"params": network.params(), "macs": network.macs(), "device": "a processor", "date": "2026-01-01"},
        "top1": 98.0,  # of the last epoch, not of the best
    }
    assert list(seconds) == STAGES and all(value >= 0 for value in seconds.values())
    assert "98.00 %" in bench.shown and str(out / "detections.png") in bench.shown


def test_configs_and_tools_of_the_stages_exist() -> None:
    for name in (*CONFIGS.values(), "tools/latency.py", "tools/search.py", "tools/train.py"):
        assert (ROOT / name).is_file()


def test_the_real_tools_take_the_stages_arguments(bench: Bench) -> None:
    assert bench.call("--target-ms", "0.25") == 0
    seen: list[argparse.Namespace] = []

    class Parsed(Exception):
        pass

    def stop(args: argparse.Namespace) -> None:
        seen.append(args)
        raise Parsed

    for name, stages in (("search", ["search"]), ("train", ["classifier", "detector"])):
        tool = load_tool(name)
        bench.monkeypatch.setattr(tool, "config_from_args", stop)
        for stage in stages:
            with pytest.raises(Parsed):
                tool.main(bench.calls[stage])
    assert all(args.resume and args.seed == 0 for args in seen)
    assert [args.work_dir for args in seen] == [str(bench.out / stage) for stage in STAGES[1:4]]
    assert seen[0].target_ms == 0.25 and seen[0].verify is None


def test_a_second_call_skips_what_stands(bench: Bench) -> None:
    assert bench.call() == 0
    before = bench.read("summary.json")
    assert bench.call() == 0
    assert not bench.calls and bench.read("summary.json") == before
    assert bench.call("--target-ms", "0.2") == 0  # another target: the table stands
    assert list(bench.calls)[:2] == ["search", "classifier"] or list(bench.calls) == ["search"]


def test_a_failing_stage_ends_it(bench: Bench) -> None:
    assert bench.call(actions={"classifier": 2}) == 2
    assert list(bench.calls) == ["table", "search", "classifier"]
    assert "error: stage 'classifier' ended with status 2" in bench.shown
    assert list(bench.read("pipeline.json")["stages"]) == ["table", "search", "classifier"]
    assert not (bench.out / "summary.json").exists()
    assert bench.call() == 0 and (bench.out / "summary.json").is_file()


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_stage_saves_and_the_printed_command_goes_on(bench: Bench, name: str, status: int) -> None:
    assert bench.call("--seed", "7", "--fresh", actions={"search": name}) == status, bench.shown
    assert list(bench.calls) == ["table", "search"]
    assert json.loads((bench.root / "saved.json").read_text()) == [name]  # once, and it had the time to save
    assert bench.read("pipeline.json")["stages"]["search"]["seconds"] >= 0.5
    assert "stopped in stage 'search'" in bench.shown and "Traceback" not in bench.shown
    command = shlex.split(bench.shown.strip().splitlines()[-1])
    assert command[1] == "tools/quickstart.py"
    args = bench.tool.make_parser().parse_args(command[2:])
    assert (args.work_dir, args.seed, args.fresh) == (bench.out, 7, False)
    assert bench.call(*command[2:]) == 0
    assert bench.read("summary.json")["seed"] == 7


def test_ctrl_c_between_the_stages(bench: Bench) -> None:
    def interrupt(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    bench.monkeypatch.setattr(pipeline_config, "LatencyTable", SimpleNamespace(load=interrupt))
    assert bench.call("--fresh") == 130
    command = shlex.split(bench.shown.strip().splitlines()[-1])
    assert not bench.tool.make_parser().parse_args(command[2:]).fresh


def test_fresh_removes_its_own_files_alone(bench: Bench) -> None:
    assert bench.call() == 0
    (bench.out / "notes.txt").write_text("mine")
    (bench.out / "photos").mkdir()
    stale = [bench.out / "search/old.json", bench.out / "summary.json", bench.out / "detections.png"]
    stale[0].write_text("{}")
    assert bench.call("--fresh", actions={"table": 2}) == 2
    assert not any(path.exists() for path in stale) and not (bench.out / "classifier").exists()
    assert (bench.out / "notes.txt").read_text() == "mine" and (bench.out / "photos").is_dir()
    elsewhere = bench.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (bench.out / "search").symlink_to(elsewhere)
    assert bench.call("--fresh", actions={"table": 2}) == 2
    assert (elsewhere / "kept").exists() and not (bench.out / "search").exists()


def test_fresh_refuses_a_folder_of_something_else(bench: Bench) -> None:
    (bench.out / "search").mkdir(parents=True)
    (bench.out / "search" / "thesis.txt").write_text("mine")
    assert bench.call("--fresh") == 2
    assert "has no pipeline.json" in bench.shown and not bench.calls
    assert (bench.out / "search" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(bench.out)
    assert bench.call("--fresh", actions={"table": 2}) == 2 and bench.calls  # a missing or empty folder is fine
    assert bench.call("--fresh") == 0  # also after a first stage that left nothing


def test_relative_work_dir_is_the_callers(tmp_path: Path) -> None:
    tools, caller = tmp_path / "repository/tools", tmp_path / "caller"
    tools.mkdir(parents=True)
    caller.mkdir()
    shutil.copy(ROOT / "tools/quickstart.sh", tools)
    (tools / "setup_env.sh").write_text(f"echo {shlex.quote(sys.executable)}\n")
    (tools / "quickstart.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv, sep='|')\n")
    command = ["bash", "../repository/tools/quickstart.sh", "--work-dir", "my run"]
    shown = subprocess.run(command, cwd=caller, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == f"{caller}|{tools}/quickstart.py|--work-dir|my run"


def test_relative_work_dir_of_the_tool(bench: Bench) -> None:
    bench.monkeypatch.chdir(bench.root)
    assert bench.call("--work-dir", "mine") == 0
    assert bench.calls["search"][-4] == str(bench.root / "mine/search")
    assert (bench.root / "mine/summary.json").is_file()
