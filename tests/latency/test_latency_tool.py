"""tools/latency.py as a command: JSON alone on standard output, one line and status 2 on errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunet_zoo import latency, load_spec
from prunet_zoo.console import run_plain_tool
from prunet_zoo.cost import cost_range
from prunet_zoo.errors import LatencyError
from prunet_zoo.files import WriteError
from prunet_zoo.latency import LatencyTable, backends, build
from prunet_zoo.latency.commands import measure
from prunet_zoo.latency.memory import check_memory
from prunet_zoo.latency.references import References
from prunet_zoo.models import memory
from prunet_zoo.space import load_space

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "latency.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("latency_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status(tool, argv):
    """Run the tool as a command would; returns its exit status."""
    with pytest.raises(SystemExit) as ended:
        run_plain_tool(tool.main, argv, stopped=tool.stopped(argv))
    return ended.value.code


@pytest.fixture
def fake(monkeypatch, make_backend, effort):
    backend = make_backend()
    monkeypatch.setattr(build, "get_backend", lambda name: backend)
    monkeypatch.setattr(latency, "Effort", lambda: effort)
    return backend


def test_as_a_process_it_prints_the_record_alone(tmp_path):
    space = load_space("prunet_cpu_small")
    arch = tmp_path / "net.json"
    arch.write_text(space.decode(space.largest(), "net").to_json())
    command = [sys.executable, str(TOOL), "measure", str(arch), "--backend", "torch", "--input-size", "32", "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["spec_name"], record["backend"], record["input_size"]) == ("net", "torch", [32, 32])


def test_measure_prints_a_line(tool, capsys):
    assert tool.main(["measure", "prunet_p0", "--backend", "torch", "--input-size", "32", "64", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("prunet_p0: ")
    assert "1×32×64 px, fp32, torch" in out


def test_table_then_predict(tool, fake, space, tmp_path, capsys):
    (tmp_path / "space.json").write_text(space.to_json())
    spec = space.decode(space.largest(), "big")
    (tmp_path / "net.json").write_text(spec.to_json())
    table = tmp_path / "table.jsonl"
    assert tool.main(["table", str(tmp_path / "space.json"), "--out", str(table), "--json"]) == 0
    streams = capsys.readouterr()
    about = json.loads(streams.out)
    assert about["space_name"] == "tiny"
    (fastest, _), (slowest, _) = cost_range(LatencyTable.load(table), space)
    assert (about["fastest_ms"], about["slowest_ms"]) == (fastest, slowest)
    assert fastest < slowest
    assert tool.main(["predict", str(tmp_path / "net.json"), "--table", str(table), "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["predicted_ms"] == LatencyTable.load(table)(spec)
    assert predicted["device"] == "fake device"
    assert tool.main(["predict", str(tmp_path / "net.json"), "--table", str(table)]) == 0
    assert "predicted for fake device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["measure", "prunet_p9"], "did you mean 'prunet_p"),
        (["measure", "prunet_p0", "--backend", "onnxruntim"], "did you mean 'onnxruntime'"),
        (["measure", "none.json"], "no such file: none.json"),
        (["measure", "none.safetensors"], "does not exist"),
        (["measure", "prunet_p0", "--backend", "torch", "--threads", "0"], "threads must be at least 1"),
        (["measure", "prunet_p0", "--input-size", "1", "2", "3"], "one side or height and width, got 3"),
        (["measure", "prunet_p0", "--input-size", "-5"], "input size must be positive"),
        (["measure", "prunet_p0", "--seconds", "nan"], "--seconds takes a number from 0, got nan"),
        (["measure", "prunet_p0", "--seconds", "inf"], "--seconds takes a number from 0, got inf"),
        (["measure", "prunet_p0", "--seconds", "-1"], "--seconds takes a number from 0, got -1"),
        (["measure", "prunet_p0", "--input-size", "1000000"], "of memory are free; take a smaller --input-size"),
        (
            ["measure", "prunet_p0", "--batch", "1000000000"],
            "of memory are free; take a smaller --input-size or --batch",
        ),
        (["measure", "timm/resnet18", "--batch", "1000000"], "GiB for one layer of 'timm/resnet18', "),
        (["measure", "timm/resnet18", "--input-size", "1000000"], "of memory are free; take a smaller --input-size"),
        (["compare", "prunet_p0", "timm/resnet18", "--batch", "1000000"], "for one layer of 'prunet_p0', "),
        (
            ["compare", "prunet_p0", "--backends", "torch", "openvino", "--batch", "1000000"],
            "smaller --input-size or",
        ),
        (
            ["table", "prunet_cpu_small", "--out", "x.jsonl", "--batch", "1000000000"],
            "are free; take a smaller --batch",
        ),
        (["report", "--out", "x", "--networks", "prunet_p0", "--batch", "1000000"], "are free; take a smaller --batch"),
        (["report", "--out", "x", "--networks", "timm/resnet50", "--batch", "1000000"], "of 'timm/resnet50', "),
        (
            ["measure", "prunet_p0", "--backend", "torch", "--threads", "99999999999"],
            "threads must be at most 1024, got",
        ),
        (["measure", "prunet_p0", "--threads", "99999999999"], "threads must be at most 1024, got 99999999999"),
        (["measure", "prunet://prunet_p9"], "unknown zoo model 'prunet_p9'; did you mean"),
        (["measure", "digits_detector"], "'digits_detector' is a detector, and classifiers are measured here"),
        (["predict", "timm/resnet50", "--device", "v100-tensorrt-fp16"], "predict needs a network's spec, which"),
        (["fit", "none.jsonl", "--out", "mine.json"], "none.jsonl cannot be read"),
        (["table", "prunet_cpu_small", "--out", "x.jsonl", "--num-classes", "0"], "num_classes: "),
        (["table", "prunet_cpu", "--out", "x.jsonl"], "or 'prunet_cpu_small'?"),
        (["predict", "prunet_p0", "--table", "none.jsonl"], "build it: python tools/latency.py table"),
    ],
)
def test_errors_are_one_line_and_status_2(tool, capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(tool, argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert message in streams.err
    assert streams.err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_table_ends_with_the_range_of_its_space(tool, fake, space, tmp_path, capsys):
    (tmp_path / "space.json").write_text(space.to_json())
    table = tmp_path / "table.jsonl"
    assert tool.main(["table", str(tmp_path / "space.json"), "--out", str(table)]) == 0
    (fastest, _), (slowest, _) = cost_range(LatencyTable.load(table), space)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"fastest network of the space {fastest:.4g} ms, slowest {slowest:.4g} ms")


def test_table_for_another_number_of_classes(tool, fake, space, tmp_path, capsys):
    (tmp_path / "space.json").write_text(space.to_json())
    table = tmp_path / "table.jsonl"
    command = ["table", str(tmp_path / "space.json"), "--out", str(table)]
    assert tool.main([*command, "--num-classes", "7"]) == 0
    LatencyTable.load(table).require(space.replace(num_classes=7), device="fake device")
    capsys.readouterr()
    assert status(tool, command) == 2
    assert "num_classes 7, not 5; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("Error in execution: BFCArena Failed to allocate memory for requested buffer of size 9"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError("Unable to allocate"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_failed_allocation_is_told_from_a_fault(tool, monkeypatch, capsys, error, told):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(latency, "measure", fail)
    if told:
        assert status(tool, ["measure", "prunet_p0"]) == 2
        assert "does not fit into the memory of cpu; take a smaller --input-size" in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            tool.main(["measure", "prunet_p0"])


def test_memory_is_not_asked_for_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    check_memory(load_spec("prunet_p0"), (10**6, 10**6), 1, "fp32")
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * 1024**3)
    check_memory(load_spec("prunet_p0"), (224, 224), 1, "fp32")
    with pytest.raises(LatencyError, match=r"32×1024×1024 px needs at least .* GiB for one layer of 'prunet_p0', 2\.0"):
        check_memory(load_spec("prunet_p0"), (1024, 1024), 32, "fp32")


def test_the_widest_layer_of_any_network():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 4, 1)).train()
    assert memory.widest_layer(module, (2, 3, 16, 16)) == 2 * (3 * 16 * 16 + 8 * 8 * 8)
    assert module.training and not module[0]._forward_hooks
    assert memory.widest_layer(torch.nn.Linear(7, 2), (5, 3, 16, 16)) == 5 * 3 * 16 * 16  # does not run: the input


@pytest.mark.parametrize("command", ["table", "compare", "report"])
def test_a_failed_allocation_is_told_by_every_command(
    tool, monkeypatch, capsys, space, tmp_path, make_backend, command
):
    from prunet_zoo.latency import compare_now, report

    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    backend = make_backend()
    backend.prepare = fail
    for module in (build, compare_now, report):
        monkeypatch.setattr(module, "get_backend", lambda name: backend)
    (tmp_path / "space.json").write_text(space.to_json())
    out = tmp_path / "out"
    argv = {
        "table": [str(tmp_path / "space.json"), "--out", str(out)],
        "compare": ["prunet_p0", "prunet_p1"],
        "report": ["--out", str(out), "--networks", "prunet_p0"],
    }[command]
    if command == "report":
        monkeypatch.setattr(report, "measure_together", fail)
    assert status(tool, [command, *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "not fit into the memory of cpu; take a smaller" in line
    assert not out.is_file()


def test_measure_takes_what_export_takes(tool, capsys):
    argv = ["measure", "digits_classifier", "--backend", "torch", "--seconds", "0", "--attempts", "1"]
    assert tool.main(argv) == 0
    first = capsys.readouterr().out.partition(":")[0]
    assert tool.main(["measure", "prunet://digits_classifier", *argv[2:]]) == 0
    assert capsys.readouterr().out.partition(":")[0] == first
    for name in ("digits_classifier", "prunet://prunet_p0"):  # of the latter nothing is downloaded
        assert tool.main(["predict", name, "--device", "v100-tensorrt-fp16"]) == 0


def test_a_table_of_a_slow_processor_says_what_helps(tool, fake, space, tmp_path, capsys, monkeypatch):
    slow, fast = (12.0, 20.0, 300.0), (10.0, 16.0, 200.0)
    speed = [slow]
    monkeypatch.setattr(References, "__call__", lambda self: self.looks.append(speed[0]) or speed[0])
    monkeypatch.setattr(build, "recall", lambda key: fast)
    (tmp_path / "space.json").write_text(space.to_json())
    command = ["table", str(tmp_path / "space.json"), "--out", str(tmp_path / "t.jsonl")]
    assert tool.main(command) == 0
    assert "run the same command again while nothing else runs" in capsys.readouterr().out
    speed[0] = fast
    assert tool.main(command) == 0  # as it says
    assert "slow whenever" not in capsys.readouterr().out
    assert LatencyTable.load(tmp_path / "t.jsonl").slow == set()
    before = (tmp_path / "t.jsonl").read_bytes()
    assert tool.main(command) == 0
    assert (tmp_path / "t.jsonl").read_bytes() == before


def test_interrupted_table_says_how_to_go_on(tool, fake, space, tmp_path, capsys):
    (tmp_path / "space.json").write_text(space.to_json())
    fake.fail_after = 8
    assert status(tool, ["table", str(tmp_path / "space.json"), "--out", str(tmp_path / "t.jsonl")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    fake.fail_after = None
    assert tool.main(["table", str(tmp_path / "space.json"), "--out", str(tmp_path / "t.jsonl")]) == 0


def test_every_command_tells_what_an_interruption_left(tool, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure", interrupt)
    assert status(tool, ["measure", "prunet_p0"]) == 130
    assert "what was appended to the log (--log) so far is kept" in capsys.readouterr().err
    assert "goes on" in tool.stopped(["report", "--out", "x"])
    for argv in ([], ["compare", "table"], ["predict"], ["fit"], ["--help"]):
        assert tool.stopped(argv) == "stopped; nothing was left behind"
    assert set(tool.TOLD) <= {command.__name__.rpartition(".")[2] for command in tool.COMMANDS}


def test_a_log_that_cannot_be_written_costs_no_figure(tool, monkeypatch, capsys, tmp_path):
    command = ["measure", "prunet_p0", "--backend", "torch", "--input-size", "32", "--seconds", "0", "--attempts", "1"]
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(latency, "measure", lambda *args, **options: pytest.fail("measured before"))
        assert status(tool, [*command, "--log", str(tmp_path / "file" / "log.jsonl")]) == 2
    assert "cannot write latency log" in capsys.readouterr().err

    def full(path, record):
        raise WriteError("cannot append to latency log: No space left")

    monkeypatch.setattr(measure, "append_record", full)
    for archs in (["prunet_p0"], ["prunet_p0", "prunet_p0"]):
        assert status(tool, ["measure", *archs, *command[2:], "--log", str(tmp_path / "log.jsonl")]) == 2
        streams = capsys.readouterr()
        assert streams.out.count("prunet_p0: ") == len(archs)
        assert "error: cannot append to latency log" in streams.err


def test_backends_are_listed_in_files_of_their_own():
    folder = Path(backends.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} >= {"base", "torch_eager", "onnxruntime"}
