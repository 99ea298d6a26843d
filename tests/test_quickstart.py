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

from prunet_zoo.mm.cli import run_tool
from prunet_zoo.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "configs/classification/prunet-cpu-small.json"
STAGES = ["table", "search", "classifier", "detector", "measure", "picture"]

# A stage notes its arguments in calls.jsonl and does what action.json asks of it: end with a status, or be stopped.
STAGE = """
import json, os, pathlib, signal, sys, time
here, argv = pathlib.Path.cwd(), sys.argv[1:]
name = pathlib.Path(sys.argv[0]).stem
work = pathlib.Path(argv[argv.index("--work-dir") + 1]) if "--work-dir" in argv else None
stage = {"latency": argv[0], "draw": "picture"}.get(name) or work.name
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps([stage, argv]) + "\\n")
action = json.loads((here / "action.json").read_text()).get(stage)
if isinstance(action, int):
    sys.exit(action)
if action:
    got = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: got.append(signal.Signals(n).name))
    if action == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to both
    os.kill(os.getppid(), signal.Signals[action])
    until = time.monotonic() + 20
    while not got and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # saving takes longer than the quarter of a second that subprocess.run grants
    (here / "saved.json").write_text(json.dumps(got))
    sys.exit(128 + signal.Signals[action])
def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
if stage == "table":
    write(pathlib.Path(argv[argv.index("--out") + 1]), {})
elif stage == "search":
    write(work / "report.json", {"predicted": 0.29})
    (work / "spec.json").write_text((here / "spec.json").read_text())
elif stage == "classifier":
    write(work / "metrics.json", {"metrics": {"epoch": 20, "top1": 98.0}, "best": {"epoch": 14, "top1": 99.5}})
elif stage == "detector":
    write(work / "metrics.json", {"metrics": {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": 0.8}, "best": {}})
elif stage == "measure":
    print(json.dumps({"median_ms": 0.3, "device": "a processor", "date": "2026-01-01"}))
elif stage == "picture":
    write(pathlib.Path(argv[argv.index("--out") + 1]), {})
"""


class Bench:
    """The tool with its stages replaced, and what they were called with."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.root, self.out, self.monkeypatch, self.capfd = root, root / "out", monkeypatch, capfd
        for name in ("tools/latency.py", "tools/search.py", "tools/train.py", "prunet_zoo/mm/draw.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(STAGE)
        (root / "calls.jsonl").touch()
        shutil.copy(SPEC, root / "spec.json")
        self.tool = load_tool()
        monkeypatch.setattr(self.tool, "ROOT", root)
        monkeypatch.setattr(self.tool, "LatencyTable", SimpleNamespace(load=lambda path: path.read_text()))
        monkeypatch.setattr(self.tool, "cost_range", lambda table, space: ((0.1, None), (0.7, None)))
        self.shown = ""

    def call(self, *argv: str, actions: dict[str, Any] | None = None) -> int:
        """Run it; returns the exit status. ``actions``: what the stages are to do."""
        (self.root / "action.json").write_text(json.dumps(actions or {}))
        (self.root / "calls.jsonl").write_text("")
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
        return dict(json.loads(line) for line in (self.root / "calls.jsonl").read_text().splitlines())

    def read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text())


def load_tool(name: str = "quickstart") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, monkeypatch, capfd)


def test_stages_arguments_and_summary(bench: Bench) -> None:
    assert bench.call("--seed", "3") == 0, bench.shown
    out, calls = bench.out, bench.calls
    assert list(calls) == STAGES
    tail = ["--seed", "3", "--resume"]
    table, spec = str(out / "latency_table.jsonl"), str(out / "search/spec.json")
    assert calls["table"] == ["table", "prunet_cpu_small", "--out", table]
    search = [bench.tool.SEARCH, "--target-ms", "0.3", "--table", table, "--verify", "4"]  # 0.1 + 0.6 / 3
    assert calls["search"] == [*search, "--work-dir", str(out / "search"), *tail]
    weights = str(out / "search/weights.safetensors")
    classify = [bench.tool.CLASSIFY, "--arch", spec, "--weights", weights]
    assert calls["classifier"] == [*classify, "--work-dir", str(out / "classifier"), *tail]
    # best.safetensors is chosen on the test scans, which the scenes for validation are made of
    weights = str(out / "classifier/last.safetensors")
    detect = [bench.tool.DETECT, "--arch", spec, "--weights", weights]
    assert calls["detector"] == [*detect, "--work-dir", str(out / "detector"), *tail]
    assert calls["measure"] == ["measure", spec, "--backend", "onnxruntime", "--threads", "1", "--json"]
    assert calls["picture"] == [str(out / "detector"), "--out", str(out / "detections.png")]

    summary, network = bench.read("summary.json"), load_spec(SPEC)
    seconds = summary.pop("seconds")
    assert summary == {
        **{"target_ms": 0.3, "predicted_ms": 0.29, "measured_ms": 0.3, "map50": 0.8, "map": 0.5, "seed": 3},
        **{"params": network.params(), "macs": network.macs(), "device": "a processor", "date": "2026-01-01"},
        "top1": 98.0,  # of the last epoch, not of the best
    }
    assert list(seconds) == STAGES and all(value >= 0 for value in seconds.values())
    assert "98.00 %" in bench.shown and str(out / "detections.png") in bench.shown


def test_configs_and_tools_of_the_stages_exist() -> None:
    tool = load_tool()
    for name in (tool.SEARCH, tool.CLASSIFY, tool.DETECT, "tools/latency.py", "tools/search.py", "tools/train.py"):
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
    assert seen[0].target_ms == 0.25 and seen[0].verify == 4


def test_a_second_call_adds_to_the_seconds(bench: Bench) -> None:
    assert bench.call() == 0
    bench.out.joinpath("stages.json").write_text(json.dumps(dict.fromkeys(STAGES, 100.0)))
    assert bench.call() == 0
    assert list(bench.calls) == STAGES  # each goes on where it was stopped, by itself
    assert all(100 <= value < 160 for value in bench.read("summary.json")["seconds"].values())


def test_a_failing_stage_ends_it(bench: Bench) -> None:
    assert bench.call(actions={"classifier": 2}) == 2
    assert list(bench.calls) == ["table", "search", "classifier"]
    assert "error: stage 'classifier' ended with status 2" in bench.shown
    assert list(bench.read("stages.json")) == ["table", "search", "classifier"]
    assert not (bench.out / "summary.json").exists()
    assert bench.call() == 0 and (bench.out / "summary.json").is_file()


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_stage_saves_and_the_printed_command_goes_on(bench: Bench, name: str, status: int) -> None:
    assert bench.call("--seed", "7", "--fresh", actions={"search": name}) == status, bench.shown
    assert list(bench.calls) == ["table", "search"]
    assert json.loads((bench.root / "saved.json").read_text()) == [name]  # once, and it had the time to save
    assert bench.read("stages.json")["search"] >= 0.5
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

    bench.monkeypatch.setattr(bench.tool, "LatencyTable", SimpleNamespace(load=interrupt))
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
    assert "has no stages.json" in bench.shown and not bench.calls
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
