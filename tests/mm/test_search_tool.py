"""tools/search.py as a user runs it: results, exact resume after kill -9, signals, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prunet_zoo import create_model, load_space
from prunet_zoo.models import read_weights_spec
from prunet_zoo.search import MacsCost

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
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    path = tmp_path / "search.py"
    path.write_text(CONFIG.format(root=ROOT, space=tmp_path / "space.json"))
    return path


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "search.py"), str(config), "--work-dir", str(out), *more]


def run(config: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(config, out, *more), capture_output=True, text=True, env=env, timeout=300)


def kill_when(config: Path, out: Path, ready, signum: int) -> subprocess.Popen[str]:
    """Start a search, send it a signal once ``ready()``, and wait for its end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(config, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    process.out, process.err = process.communicate(timeout=100)  # type: ignore[attr-defined]
    return process


def test_result_files_and_exact_resume_after_kill_9_and_sigterm(config: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    done = run(config, whole, "--seed", "3")
    assert done.returncode == 0, done.stderr
    spec = read_weights_spec(whole / "weights.safetensors")
    report = json.loads((whole / "report.json").read_text())
    assert json.loads((whole / "spec.json").read_text())["name"] == spec.name == "tiny-0.12MMACs"
    assert 0.97 * 0.12 < MacsCost()(spec) <= 0.12 == report["target"] and report["predicted"] == MacsCost()(spec)
    assert load_space(str(tmp_path / "space.json")).contains(spec)
    assert create_model(str(whole / "weights.safetensors"))(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert len(report["history"]) == 6 and report["events"], "nothing was pruned, so the test would show less"
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page
    assert list(whole.glob("*/vis_data/events.out.tfevents*")), "no TensorBoard file"

    killed = tmp_path / "killed"
    config_seed = ("--seed", "3", "--resume")
    config.write_text(config.read_text() + "randomness = dict(seed=3)\n")
    kill_when(config, killed, lambda: (killed / "epoch_3.pth").is_file(), signal.SIGKILL)
    assert not (killed / "spec.json").exists()
    stopped = kill_when_resumed(config, killed, config_seed)
    assert stopped.returncode == 143 and "--resume" in stopped.err and "saved in" in stopped.err
    again = run(config, killed, *config_seed)
    assert again.returncode == 0, again.stderr
    for name in ("spec.json", "weights.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    same = {"loss", "expected", "candidates", "depth", "widths", "dual", "arch_acc"}
    rows = [[{k: r.get(k) for k in same} for r in json.loads((d / "report.json").read_text())["history"]] for d in (whole, killed)]
    assert rows[0] == rows[1]

    before = (killed / "report.json").stat().st_mtime_ns
    finished = run(config, killed, *config_seed)  # a finished search is not run again
    assert finished.returncode == 0 and (killed / "report.json").stat().st_mtime_ns == before


def kill_when_resumed(config: Path, out: Path, options: tuple[str, ...]) -> subprocess.Popen[str]:
    """Resume a search and stop it by SIGTERM within an epoch."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(config, out, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    deadline = time.monotonic() + 200
    while not (out / "epoch_4.pth").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    time.sleep(0.3)  # into the next epoch
    process.send_signal(signal.SIGTERM)
    process.out, process.err = process.communicate(timeout=100)  # type: ignore[attr-defined]
    return process


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target-ms", "0.0001"), "below the fastest"),
        (("--target-ms", "99"), "above the slowest"),
        (("--target-ms", "-1"), "positive"),
        (("--table", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--cfg-options", "model.space=prunet_cpu_smal"), "prunet_cpu_small"),
        (("--cfg-options", "train_cfg.latency.type=watts"), "'latency' or 'macs'"),
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
