"""tools/search.py as a user runs it: results, exact resume after kill -9, signals, bad input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from prunet_zoo import create_model, load_space, load_spec
from prunet_zoo.data.digits import CLASSES as DIGITS
from prunet_zoo.latency.predictor import Predictor
from prunet_zoo.mm.predict import preprocess_of
from prunet_zoo.models import read_weights_spec
from prunet_zoo.search import MacsCost, cost_range
from prunet_zoo.space import SearchSpace
from prunet_zoo.zoo.predict import load_classifier

ROOT = Path(__file__).resolve().parents[2]
SPACE = {
    "name": "tiny",
    "input_size": 16,
    "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "stages": [
        {
            "out_channels": 16,
            "layers": [
                {"stride": 2, "kernel_sizes": [3, 5], "hidden": {"step": 4, "max_expansion": 6}},
                {"repeat": 2, "kernel_sizes": [3, 5], "hidden": {"step": 4, "max_expansion": 6}, "skip": True},
            ],
        }
    ],
    "tail": {"out_channels": 16},
    "num_classes": 10,
}
CONFIG = """
_base_ = ["{root}/configs/search/tiered_prunet-cpu-small_digits.py"]
custom_imports = dict(imports=["prunet_zoo", "stop_hook"])
custom_hooks = [dict(type="StopAt")]
model = dict(space="{space}")
small = dict(max_per_class=20)
train_dataloader = dict(batch_size=16, dataset=small)
train_cfg = dict(
    max_epochs=6,
    arch_dataloader=dict(batch_size=16, dataset=small),
    val_dataloader=dict(dataset=small),
    recalibration_batches=4,
    strategy=dict(target=0.12, warmup=0.2, settle=0.0, block_kappa=0.9),
    latency=dict(_delete_=True, type="macs"),
)
param_scheduler = dict(T_max=6)
randomness = dict(seed=3)
"""
STOP_HOOK = """
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class StopAt(Hook):
    priority = "VERY_HIGH"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        at, number = map(int, os.environ.get("STOP_AT", "-1:0").split(":"))
        if runner.iter == at:
            os.kill(os.getpid(), number)
"""
SHORT = ("train_cfg.max_epochs=2", "param_scheduler.T_max=2")
STEPS = 10  # weight steps of an epoch: 20 images a class, 80% of them, batches of 16


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    path = tmp_path / "search.py"
    path.write_text(CONFIG.format(root=ROOT, space=tmp_path / "space.json"))
    (tmp_path / "stop_hook.py").write_text(STOP_HOOK)
    return path


def run(
    config: Path, out: Path, *more: str, stop_at: str = "-1:0", file_limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the tool; ``stop_at`` is "iteration:signal number", sent by the process to itself; no file over the limit."""
    paths = os.pathsep.join([str(config.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "STOP_AT": stop_at}
    command = [sys.executable, str(ROOT / "tools" / "search.py"), str(config), "--work-dir", str(out), *more]

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, preexec_fn=limit)


def test_result_files_and_exact_resume_after_kill_9_and_sigterm(config: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    done = run(config, whole)
    assert done.returncode == 0, done.stderr
    spec = read_weights_spec(whole / "weights.safetensors")
    report = json.loads((whole / "report.json").read_text())
    assert json.loads((whole / "spec.json").read_text())["name"] == spec.name == "tiny-0.12MMACs"
    assert 0.97 * 0.12 < MacsCost()(spec) <= 0.12 == report["target"] and report["predicted"] == MacsCost()(spec)
    assert load_space(str(tmp_path / "space.json")).contains(spec)
    assert create_model(str(whole / "weights.safetensors"))(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    alone = load_classifier(whole / "weights.safetensors", device="cpu")  # as tools/predict.py --model does
    loop = Config.fromfile(ROOT / "configs" / "search" / "tiered_prunet-cpu-small_digits.py").train_cfg
    assert alone.classes == DIGITS and alone.preprocess == preprocess_of(
        Config({"val_dataloader": loop.val_dataloader})
    )
    assert len(report["history"]) == 6 and report["events"], "nothing was pruned, so the test would show less"
    held = [row["state_mb"] for row in report["history"]]
    assert held[-1] < held[0] and held == sorted(held, reverse=True), "pruning gave no memory back"
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page
    assert list(whole.glob("*/vis_data/events.out.tfevents*")), "no TensorBoard file"

    killed = tmp_path / "killed"
    assert run(config, killed, stop_at=f"{3 * STEPS + 4}:{signal.SIGKILL}").returncode == -signal.SIGKILL
    assert (killed / "epoch_3.pth").is_file() and not (killed / "spec.json").exists()
    stopped = run(config, killed, "--resume", stop_at=f"{4 * STEPS + 6}:{signal.SIGTERM}")
    assert stopped.returncode == 143 and "--resume" in stopped.stderr and "saved in" in stopped.stderr, stopped.stderr
    assert (killed / "interrupted.pth").is_file()
    again = run(config, killed, "--resume")
    assert again.returncode == 0, again.stderr
    for name in ("spec.json", "weights.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    same = ("loss", "expected", "candidates", "depth", "widths", "dual", "arch_acc")
    both = [json.loads((folder / "report.json").read_text())["history"] for folder in (whole, killed)]
    assert [[row.get(k) for k in same] for row in both[0]] == [[row.get(k) for k in same] for row in both[1]]

    (killed / "spec.json").unlink()  # as if it had been killed while it wrote its results
    assert run(config, killed, "--resume").returncode == 0
    for name in ("spec.json", "weights.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), f"{name}, resumed after the last epoch"
    before = {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()}
    finished = run(config, killed, "--resume")  # a finished search is not run again
    assert finished.returncode == 0
    for refused in (("--target-ms", "99"), ("--cfg-options", "train_dataloader.batch_size=100000")):
        assert run(config, killed, *refused).returncode == 2  # nor do its results go when a command is refused
    other = run(config, killed, "--resume", "--target-ms", "0.1")
    assert other.returncode == 2 and "strategy.target: 0.12 there, 0.1 here" in other.stderr
    assert {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()} == before


def test_two_processes_search_together_on_cpu(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(config.parent), str(ROOT)])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tool = [str(ROOT / "tools" / "search.py"), str(config), "--work-dir", str(out), "--launcher", "pytorch"]
    done = subprocess.run([*launch, *tool], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert 0.97 * 0.12 < report["predicted"] <= 0.12 and done.stdout.count("report.html") == 1
    checkpoint = torch.load(out / "epoch_6.pth", weights_only=True)
    assert checkpoint["meta"]["iter"] == 6 * STEPS // 2  # each process has half of the batches


def test_resume_with_other_latencies_is_refused(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run(config, out, stop_at=f"{STEPS + 2}:{signal.SIGKILL}").returncode == -signal.SIGKILL
    checkpoint = torch.load(out / "epoch_1.pth", weights_only=True)
    checkpoint["search"]["cost"] = "another table"
    torch.save(checkpoint, out / "epoch_1.pth")
    done = run(config, out, "--resume")
    assert done.returncode == 2 and "other latencies" in done.stderr


def test_results_of_an_earlier_search_do_not_survive_a_new_one(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "spec.json").write_text("{}")
    assert run(config, out, stop_at=f"2:{signal.SIGKILL}").returncode == -signal.SIGKILL
    assert not (out / "spec.json").exists()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(config: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = run(config, out, file_limit=100_000)  # log and config fit, a checkpoint does not
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "epoch_1.pth" in errors[0] and "Traceback" not in done.stderr
    assert not list(out.glob("*.pth")) and not list(out.glob(".*.tmp"))
    again = run(config, out, "--resume")
    assert again.returncode == 0 and (out / "spec.json").is_file(), again.stderr


def test_a_search_for_a_v100_needs_none(config: Path, tmp_path: Path):
    space, cost = SearchSpace.from_dict(SPACE), Predictor.load("v100-tensorrt-fp16")
    (low, _), (high, _) = cost_range(cost, space)
    target, out = f"{(low + high) / 2:.5f}", tmp_path / "out"
    done = run(config, out, "--device", "v100-tensorrt-fp16", "--target-ms", target, "--cfg-options", *SHORT)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "predicted" and report["measured"] is None and "V100" in report["reason"]
    assert 0.97 * float(target) < report["predicted"] == cost(load_spec(out / "spec.json")) <= float(target)
    assert report["cost"]["predictor"] == "v100-tensorrt-fp16" and report["cost"]["fit"]["worst"] > 0
    line = done.stdout.splitlines()[-1]
    assert f"predicted {report['predicted']:.4g}, not measured: the latencies are of" in line
    page = (out / "report.html").read_text()
    assert "predictor v100-tensorrt-fp16" in page and "each network left out" in page
    before = (out / "report.json").read_bytes()
    asked = ("--target-ms", target, "--resume", "--cfg-options", *SHORT)
    again = run(config, out, "--device", "v100-tensorrt-fp16", *asked)
    assert again.returncode == 0 and (out / "report.json").read_bytes() == before  # finished: not run again
    other = run(config, out, "--device", "a100-tensorrt-fp16", *asked)
    assert other.returncode == 2 and "train_cfg.latency.device" in other.stderr


def test_search_on_an_image_folder_needs_only_another_config(cifar10: Path, tmp_path: Path):
    base = ROOT / "configs" / "search" / "tiered_prunet-cpu-small_cifar10.py"
    few = f"dict(data_root={str(cifar10)!r}, max_per_class=20)"
    config = tmp_path / "cifar.py"
    config.write_text(
        f"_base_ = [{str(base)!r}]\n"
        f"train_dataloader = dict(batch_size=16, num_workers=0, dataset={few})\n"
        "train_cfg = dict(max_epochs=2, strategy=dict(target=4.0), latency=dict(_delete_=True, type='macs'),\n"
        f"    arch_dataloader=dict(batch_size=16, num_workers=0, dataset={few}),\n"
        f"    val_dataloader=dict(num_workers=0, dataset={few}))\n"
    )
    done = run(config, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 3.88 < report["predicted"] <= 4.0 and 0 <= report["top1_inherited"] <= 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target-ms", "0.0001"), "below the fastest"),
        (("--target-ms", "99"), "above the slowest"),
        (("--target-ms", "-1"), "positive"),
        (("--table", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--cfg-options", "model.space=prunet_cpu_smal"), "prunet_cpu_small"),
        (("--cfg-options", "train_cfg.latency.type=watts"), "'latency', 'scaled', 'predictor' or 'macs'"),
        (("--device", "v100-tensorrt-fp16", "--target-ms", "99"), "choose between 0.0"),
        (("--cfg-options", "train_cfg.latency.thread=2"), "does not take thread; it takes type, table"),
        (("--cfg-options", "train_cfg.strategy.warmup=2"), "warmup must be between 0.0 and 0.9"),
        (("--cfg-options", "train_cfg.strategy.foo=2"), "TieredPruning takes active"),
        (("--cfg-options", "model.foo=2"), "model does not take foo; SuperNetClassifier takes"),
        (("--target-ms", "1", "--cfg-options", "train_cfg.strategy=DDPNAS"), "train_cfg.strategy must be a dict"),
        (("--data-root", ".", "--cfg-options", "model=x"), "model must be a dict, got 'x'"),
    ],
)
def test_bad_input_is_one_clear_line(config: Path, tmp_path: Path, options: tuple[str, ...], words: str):
    done = run(config, tmp_path / "out", *options)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "spec.json").exists()


def test_a_config_that_is_no_search_is_refused(tmp_path: Path):
    done = run(ROOT / "configs" / "classification" / "prunet-cpu-small_digits.py", tmp_path / "out")
    assert done.returncode == 2 and "not a search config" in done.stderr
