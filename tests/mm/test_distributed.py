"""Several processes over gloo on CPU: the same weights and figures as one, resume, and what happens when one dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch import nn

from prunet_zoo.mm.distributed import (
    CpuDistributedDataParallel,
    LaunchError,
    SyncStatisticsHook,
    full_precision_on_cpu,
    processes,
)
from prunet_zoo.mm.interrupts import COMMAND, resume_command

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
    return [str(CONFIGS / config), "--work-dir", str(work_dir), "--cfg-options", "val_cfg=None", *options]


NO_VAL = ("val_dataloader=None", "val_evaluator=None")


def test_two_processes_learn_what_one_does_with_the_same_batches(run: Run, scenes: Path, tmp_path: Path) -> None:
    ended(run("train", train("atss.py", tmp_path / "one", *NO_VAL)), 0)
    halves = train("atss.py", tmp_path / "two", *NO_VAL, "train_dataloader.batch_size=1")
    ended(run("train", halves, count=2), 0, 0)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    start = torch.load(tmp_path / "one" / "epoch_1.pth", weights_only=True)["state_dict"]
    assert distance(one, two) < 1e-4 < 1e-2 < distance(one, start)
    record = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert record["processes"] == 2


def test_a_detector_that_counts_for_itself_learns_something_else(run: Run, scenes: Path, tmp_path: Path) -> None:
    """What docs/scale.md says of RetinaNet: if mmdet changes that, the page has to."""
    ended(run("train", train("retinanet.py", tmp_path / "one", *NO_VAL)), 0)
    halves = train("retinanet.py", tmp_path / "two", *NO_VAL, "train_dataloader.batch_size=1")
    ended(run("train", halves, count=2), 0, 0)
    assert 1e-3 < distance(state(tmp_path / "one"), state(tmp_path / "two")) < 1


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


def test_statistics_are_averaged(free_port: int) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=statistics_of_two, args=(number, free_port)) for number in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]


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
