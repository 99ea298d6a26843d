"""Several processes over gloo on CPU: the same weights and figures as one, resume, and what happens when one dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch import nn

from prunet_zoo.latency import LatencyTable
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.mm.distributed import (
    CpuDistributedDataParallel,
    LaunchError,
    SyncStatisticsHook,
    _first_host,
    from_first,
    full_precision_on_cpu,
    processes,
)
from prunet_zoo.mm.interrupts import COMMAND, is_first, rank, resume_command
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / "scale_configs"
WEIGHTS = ROOT / "checkpoints" / "digits_detector.safetensors"
SCRIPTS = sorted((ROOT / "tools").glob("dist_*.sh")) + sorted((ROOT / "tools").glob("slurm_*.sh"))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are to use the CPU")
Run = Callable[..., list[tuple[int, str]]]


def ended(results: Sequence[tuple[int, str]], *statuses: int) -> str:
    """See that the processes ended so, and return what they wrote."""
    text = "\n".join(output for _, output in results)
    assert tuple(status for status, _ in results) == statuses, text
    return text


def state(folder: Path, name: str = "epoch_2.pth") -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / name, weights_only=True)["state_dict"])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The greatest difference of two networks' tensors, in units of the tensor's greatest value."""
    assert a.keys() == b.keys()
    return max(
        float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)) for k in a if a[k].is_floating_point()
    )


def train(config: str, work_dir: Path, *options: str) -> list[str]:
    return [str(CONFIGS / config), "--work-dir", str(work_dir), "--cfg-options", *options]


NO_VAL = ("val_cfg=None", "val_dataloader=None", "val_evaluator=None")


def test_two_processes_learn_what_one_does_with_the_same_batches(run: Run, scenes: Path, tmp_path: Path) -> None:
    """Weights and the figures of five validation images, of which one process gets three and the other two.

    After so few steps mAP is 0; how many objects have a box at all (AR) is not.
    """
    figures = ("val_evaluator.metric=[bbox,proposal]", "train_cfg.val_interval=2", "model.test_cfg.max_per_img=100")
    ended(run("train", train("atss.py", tmp_path / "one", *figures)), 0)
    halves = train("atss.py", tmp_path / "two", *figures, "train_dataloader.batch_size=1")
    ended(run("train", halves, count=2), 0, 0)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    start = torch.load(tmp_path / "one" / "epoch_1.pth", weights_only=True)["state_dict"]
    assert distance(one, two) < 1e-4 < 1e-2 < distance(one, start)
    records = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["metrics"]["coco/AR@100"] > 0.05 and "coco/bbox_mAP" in records[0]["metrics"]
    assert records[1]["metrics"] == pytest.approx(records[0]["metrics"], abs=2e-3)


def test_each_image_counts_once_however_many_processes_test(run: Run, scenes: Path, tmp_path: Path) -> None:
    """Five images on two processes: the sampler gives one of them twice."""
    records = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        work = ["--work-dir", str(tmp_path / str(count)), "--json", str(out)]
        text = ended(run("test", [str(CONFIGS / "shipped.py"), str(WEIGHTS), *work], count=count), *[0] * count)
        assert text.count("5 images") == 1  # said once
        records.append(json.loads(out.read_text()))
    one, two = (record["metrics"] for record in records)
    assert one == two and 0.5 < one["coco/bbox_mAP"] < 1
    assert [record["processes"] for record in records] == [1, 2]


def test_accuracy_is_of_all_images_and_of_the_network_in_the_checkpoint(
    run: Run, tiny_config: Path, tmp_path: Path
) -> None:
    """Without SyncBN each process has statistics of its own; they are averaged before both validation and saving."""
    argv = [str(tiny_config), "--work-dir", str(tmp_path / "two")]
    ended(run("train", [*argv, "--cfg-options", "val_dataloader.dataset.max_per_class=3"], count=2), 0, 0)
    record = json.loads((tmp_path / "two" / "metrics.json").read_text())
    checkpoint = str(tmp_path / "two" / "last.safetensors")
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        argv = [str(tiny_config), checkpoint, "--work-dir", str(tmp_path / f"test{count}"), "--json", str(out)]
        ended(
            run("test", [*argv, "--cfg-options", "test_dataloader.dataset.max_per_class=3"], count=count), *[0] * count
        )
        tested = json.loads(out.read_text())
        for metric in ("top1", "top5"):
            assert tested["metrics"][metric] == pytest.approx(record["metrics"][metric])


def statistics_of_two(number: int, port: int) -> None:
    """In each of two processes: averaged once, buffers of the network and of its average hold the mean of both."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, number == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
    model, hook = nn.BatchNorm1d(3), EMAHook()
    hook.ema_model = nn.BatchNorm1d(3)
    model.running_mean.fill_(number)
    model.num_batches_tracked.fill_(number)
    hook.ema_model.running_var.fill_(3 * number)
    SyncStatisticsHook.average(SimpleNamespace(model=model, hooks=[hook]))
    assert model.running_mean.tolist() == [0.5] * 3 and hook.ema_model.running_var.tolist() == [1.5] * 3
    assert model.num_batches_tracked == number  # a count, not a statistic


def run_in_two(work: Callable[[int, int], None], port: int) -> None:
    """Run ``work(number, port)`` in two processes, which must end well."""
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=work, args=(number, port)) for number in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]


def test_statistics_are_averaged(free_port: int) -> None:
    run_in_two(statistics_of_two, free_port)


def long_work_of_the_first(number: int, port: int) -> None:
    """In each of two processes, whose collectives wait for one second."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, number == 0)
    limit = timedelta(seconds=1)
    torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=limit)
    made: list[int] = []

    def work() -> str:
        time.sleep(3)
        made.append(number)
        return "found"

    assert from_first(work) == "found" and made == [0][number:]


def test_others_wait_for_long_work_of_the_first(free_port: int) -> None:
    run_in_two(long_work_of_the_first, free_port)


LEAVE = """
import atexit
from prunet_zoo.mm import distributed

class Object:
    def __del__(self):
        print("Python was taken down", flush=True)

kept = Object()
atexit.register(print, "at the end")
distributed._joined = {joined}
distributed.leave(3)
"""


@pytest.mark.parametrize("joined", [True, False])
def test_a_process_of_several_ends_without_taking_python_down(joined: bool) -> None:
    """There a thread of gloo may want Python once more, which aborts the process."""
    done = subprocess.run([sys.executable, "-c", LEAVE.format(joined=joined)], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.startswith("at the end\n"), done.stderr
    assert ("taken down" in done.stdout) == (not joined)


def test_killed_in_two_processes_and_resumed(run: Run, scenes: Path, tmp_path: Path) -> None:
    """One is killed: the other ends by itself and says how to go on; the resumed run gives the same bits."""
    argv = train("random_atss.py", tmp_path / "whole", *NO_VAL, "train_dataloader.batch_size=1")
    ended(run("train", argv, count=2), 0, 0)
    argv[2] = str(tmp_path / "killed")
    results = run("train", argv, count=2, kill=(1, 7))  # five steps an epoch: within the second
    assert results[1][0] == -signal.SIGKILL and results[0][0] == 2, results
    assert "another process of this run ended" in results[0][1] and "--resume" in results[0][1]
    assert (tmp_path / "killed" / "epoch_1.pth").is_file() and not (tmp_path / "killed" / "epoch_2.pth").exists()
    other = run("train", [*argv[:3], "--resume", *argv[3:]])
    assert "was started with 2 processes, now there are 1" in ended(other, 2)
    ended(run("train", [*argv[:3], "--resume", *argv[3:]], count=2), 0, 0)
    whole, again = (torch.load(tmp_path / name / "epoch_3.pth", weights_only=True) for name in ("whole", "killed"))
    for part in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(whole[part][k], again[part][k]) for k in whole[part]), part


def test_a_mistake_is_said_once(run: Run, scenes: Path, tmp_path: Path) -> None:
    missing = "train_dataloader.dataset.ann_file=annotations/none.json"
    text = ended(run("train", train("atss.py", tmp_path / "run", missing), count=2), 2, 2)
    assert text.count("error:") == 1 and "none.json" in text


@pytest.mark.slow
@pytest.mark.parametrize("config", ["rtmdet.py", "yolox.py"])
def test_detectors_with_hooks_of_their_own(run: Run, scenes: Path, tmp_path: Path, config: str) -> None:
    text = ended(run("train", [str(CONFIGS / config), "--work-dir", str(tmp_path / "two")], count=2), 0, 0)
    assert ("SyncBN layers run as BatchNorm" in text) == (config == "rtmdet.py")
    assert (tmp_path / "two" / "epoch_4.pth").is_file() and (tmp_path / "two" / "last.safetensors").is_file()


def script(name: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    command = ["bash", str(ROOT / "tools" / name), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_dist_train_script_trains(tiny_config: Path, tmp_path: Path) -> None:
    """A run of torchrun; its record has the command that makes it again."""
    options = ("--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.max_per_class=4")
    done = script("dist_train.sh", str(tiny_config), "2", "--work-dir", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["processes"] == 2 and done.stdout.count("metrics.json") == 1
    assert record["command"].startswith(f"bash {ROOT / 'tools' / 'dist_train.sh'} {tiny_config} 2 --work-dir")


@pytest.mark.slow
def test_a_mistake_in_the_arguments_is_said_once(tmp_path: Path) -> None:
    """Before the processes know each other: nothing but the message, and its status."""
    done = script("dist_train.sh", str(tmp_path / "none.py"), "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: config file {tmp_path}/none.py does not exist; see the folder configs/ for those that come along\n"
    )
    done = script("dist_train.sh", str(tmp_path / "none.py"), "2", "--none")
    assert done.returncode == 2 and done.stderr.count("unrecognized arguments: --none") == 1


@pytest.mark.slow
def test_dist_train_script_stops_and_goes_on(tiny_config: Path, tmp_path: Path) -> None:
    """SIGTERM: the status of a signal, no traceback, and the printed command goes on."""
    config = tmp_path / "long.py"
    config.write_text(tiny_config.read_text().replace("max_epochs=4", "max_epochs=200"))
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "tools" / "dist_train.sh"), str(config), "2", "--work-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "epoch_1.pth").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and error.count("Continue with:") == 1 and "Traceback" not in error, error
    assert shlex.split(error.strip().splitlines()[-1]) == [*command, "--resume"]


@pytest.mark.slow
def test_dist_test_and_dist_search_scripts(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "test.json"
    options = ("--work-dir", str(tmp_path / "test"), "--json", str(out))
    done = script("dist_test.sh", str(CONFIGS / "shipped.py"), str(WEIGHTS), "2", *options, SCENES=str(scenes))
    assert done.returncode == 0 and done.stdout.count("5 images") == 1, done.stderr
    record = json.loads(out.read_text())
    assert record["processes"] == 2 and record["metrics"]["coco/bbox_mAP"] > 0.5
    space, latencies = "prunet_cpu_small", tmp_path / "table.jsonl"
    measure = [sys.executable, str(ROOT / "tools" / "latency.py"), "table", space, "--quick", "--out", str(latencies)]
    assert subprocess.run(measure, capture_output=True).returncode == 0
    (low, _), (high, _) = cost_range(LatencyTable.load(latencies), load_space(space))
    config = ROOT / "configs" / "search" / "tiered_prunet-cpu-small_digits.py"
    cuts = ("train_cfg.max_epochs=4", "train_dataloader.dataset.max_per_class=24", "train_dataloader.batch_size=8")
    options = ("--table", str(latencies), "--work-dir", str(tmp_path / "search"), "--cfg-options", *cuts)
    done = script("dist_search.sh", str(config), "2", "--target-ms", str((low + high) / 2), *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "search" / "spec.json").is_file() and done.stdout.count("report.html") == 1


FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "{log}"
while [ "$1" != "{python}" ]; do shift; done
export SLURM_NTASKS=2 SLURM_NODELIST=here SLURM_LOCALID
for SLURM_LOCALID in 0 1; do SLURM_PROCID=$SLURM_LOCALID "$@" & jobs+=($!); done
for job in "${{jobs[@]}}"; do wait "$job" || status=$?; done
exit ${{status:-0}}
"""


@pytest.mark.slow
def test_slurm_script_asks_for_what_mmdet_does_and_trains(tiny_config: Path, tmp_path: Path, free_port: int) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in {
        "srun": FAKE_SRUN.format(log=tmp_path / "asked", python=sys.executable),
        "scontrol": '#!/usr/bin/env bash\n[ "$*" = "show hostnames here" ] && echo 127.0.0.1\n',
    }.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GPUS": "2", "GRES": "", "SRUN_ARGS": "--time 1:00"}
    env["MASTER_PORT"] = str(free_port)
    options = ("--cfg-options", "train_cfg.max_epochs=1", "train_dataloader.dataset.max_per_class=4")
    done = script("slurm_train.sh", "cpu", "a job", str(tiny_config), str(tmp_path / "run"), *options, **env)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    head = ["--partition", "cpu", "--job-name", "a job", "--ntasks", "2", "--ntasks-per-node", "2", "--cpus-per-task"]
    assert asked[:14] == [*head, "5", "--kill-on-bad-exit", "1", "--time", "1:00"] and "--gres" not in asked
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["processes"] == 2 and record["command"].startswith("env GPUS=2 GRES= 'SRUN_ARGS=--time 1:00' bash")
    assert done.stdout.count("metrics.json") == 1


def test_slurm_script_asks_for_gpus(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("slurm_search.sh", "gpu", "job", "c.py", "out", "--target-ms", "1", PATH=path, GPUS="4")
    asked = done.stdout.splitlines()
    assert asked[asked.index("--gres") + 1] == "gpu:4" and asked[asked.index("--ntasks-per-node") + 1] == "4"
    assert asked[-8:] == [
        str(ROOT / "tools" / "search.py"),
        "c.py",
        "--work-dir",
        "out",
        "--launcher",
        "slurm",
        "--target-ms",
        "1",
    ]


def test_slurm_script_refuses_what_it_cannot_ask_for(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):  # of a machine without Slurm
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = script("slurm_train.sh", "p", "job", "c.py", "out", GPUS="abc", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "from 1 on, got: abc" in done.stderr
    done = script("slurm_train.sh", "p", "job", "c.py", "out", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "srun is not on PATH" in done.stderr


def test_the_first_host_without_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_NODELIST", "here[1-2]")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"'scontrol show hostnames here\[1-2\]' .* set MASTER_ADDR"):
        _first_host()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho here1\necho here2\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert _first_host() == "here1"


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        ([], {}, 0),
        ([], {"RANK": "3"}, 3),
        (["--launcher", "pytorch"], {"RANK": "0", "SLURM_PROCID": "2"}, 0),  # torchrun within a task of Slurm
        (["--launcher", "slurm"], {"SLURM_PROCID": "2"}, 2),
        (["--launcher=mpi"], {"OMPI_COMM_WORLD_RANK": "1"}, 1),
        ([], {"SLURM_PROCID": "2"}, 0),  # srun started runs that have nothing to do with each other
        (["--launcher"], {"SLURM_PROCID": "2"}, 0),
    ],
)
def test_the_number_of_a_process(
    monkeypatch: pytest.MonkeyPatch, words: list[str], env: dict[str, str], expected: int
) -> None:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "c.py", *words])
    assert rank() == expected and is_first() == (expected == 0)


@pytest.mark.parametrize("ended", [True, False])
def test_another_process_speaks_only_where_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended: bool
) -> None:
    """The launcher ends it when the first has said the same mistake."""

    def sleep(seconds: float) -> None:
        if ended:
            os.kill(os.getpid(), signal.SIGTERM)

    def tool(argv: Sequence[str] | None) -> int:
        raise LaunchError("no room")

    monkeypatch.setattr("prunet_zoo.mm.cli.time.sleep", sleep)
    monkeypatch.setenv("RANK", "1")
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        run_tool(tool, [])
    assert end.value.code == 2
    assert capsys.readouterr().err == ("" if ended else "error: only process 1 has this: no room\n")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_say_how_they_are_called(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = script(path.name)
    assert done.returncode == 2 and "usage: bash tools/" in done.stderr and not done.stdout


def test_launcher_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    said = r"RANK, WORLD_SIZE, LOCAL_RANK is not set; start them with tools/dist"
    with pytest.raises(LaunchError, match=said), processes(Config({"launcher": "pytorch"})):
        raise AssertionError("not reached")


def test_resume_command_is_that_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "c.py"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command().endswith(
        "-m torch.distributed.run --standalone --nproc_per_node 2 tools/train.py c.py --resume"
    )
    monkeypatch.setenv(COMMAND, "bash tools/dist_train.sh c.py 2 --work-dir 'a b' ")
    assert resume_command() == "bash tools/dist_train.sh c.py 2 --work-dir 'a b' --resume"


def test_amp_config_trains_in_float32_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("prunet_zoo.mm.distributed.print_log", lambda text, *_: said.append(text))
    wrapper = {"type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": "float16", "accumulative_counts": 2}
    cfg = Config({"optim_wrapper": wrapper})
    full_precision_on_cpu(cfg)
    assert cfg.optim_wrapper.to_dict() == {"type": "OptimWrapper", "accumulative_counts": 2}
    full_precision_on_cpu(cfg)  # and no word where nothing is changed
    assert len(said) == 1 and "training in float32" in said[0]


def test_wrapper_turns_sync_bn_into_bn(gloo: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    names = list(model.state_dict())
    wrapped = CpuDistributedDataParallel(model, device_ids=[0])
    assert list(wrapped.module.state_dict()) == names
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in wrapped.modules())
    wrapped(torch.randn(2, 3, 4, 4)).sum().backward()


@pytest.fixture
def gloo(free_port: int) -> Any:
    store = torch.distributed.TCPStore("127.0.0.1", free_port, 1, True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
