"""All methods by tools/search.py: the same files, and exact resume after kill -9 in every phase."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunet_zoo import create_model, load_space
from prunet_zoo.models import read_weights_spec
from prunet_zoo.search import MacsCost

ROOT = Path(__file__).resolve().parents[2]
ALL = {"kernel_sizes": [3], "hidden": {"step": 4, "max_expansion": 6}}
SPACE = {
    "name": "tiny",
    "input_size": 16,
    "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "stages": [{"out_channels": 12, "layers": [{"stride": 2, **ALL}, {"repeat": 2, "skip": True, **ALL}]}],
    "tail": {"out_channels": 16},
    "num_classes": 10,
}
CONFIG = """
_base_ = ["{root}/configs/search/{base}_prunet-cpu-small_digits.py"]
custom_imports = dict(imports=["prunet_zoo", "stop_hook"], allow_failed_imports=False)
custom_hooks = [dict(type="StopAt")]
model = dict(space="{space}")
small = dict(max_per_class=20, transform=dict(type="digits", size=16))
train_dataloader = dict(batch_size=16, dataset=small)
train_cfg = dict(
    max_epochs={epochs},
    arch_dataloader=dict(batch_size=16, dataset=small),
    val_dataloader=dict(dataset=small),
    recalibration_batches=4,
    strategy=dict(_delete_=True, type="{method}", target=0.1, {options}),
    latency=dict(_delete_=True, type="macs"),
)
param_scheduler = dict(T_max={epochs})
randomness = dict(seed=3)
"""
# kills this process before a step, or when the method speaks for the nth time
STOP_HOOK = """
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from prunet_zoo.mm.search_loop import SearchLoop

kind, at, number = os.environ.get("STOP_AT", "none:0:0").split(":")
told = SearchLoop._tell
heard = []

def tell(loop, line):
    heard.append(line)
    if kind == "told" and len(heard) == int(at):
        os.kill(os.getpid(), int(number))
    told(loop, line)

SearchLoop._tell = tell

@HOOKS.register_module(force=True)
class StopAt(Hook):
    priority = "VERY_HIGH"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if kind == "step" and runner.iter == int(at):
            os.kill(os.getpid(), int(number))
"""
STEPS = 10  # weight steps of an epoch
METHODS = {
    "tiered": ("TieredPruning", 3, "warmup=0.2, settle=0.0, block_kappa=0.9"),
    "ddpnas": ("DDPNAS", 3, "passes=3, widths=3"),
    "pas": ("PruningAsSearch", 4, "pretrain=0.25, finetune=0.25"),
    "archtree": ("Archtree", 3, "pretrain=0.34, beam=2, children=2, rounds=3, recovery_steps=2"),
}
KILL, STOP = int(signal.SIGKILL), int(signal.SIGTERM)
KILLS = {
    "tiered": [f"step:14:{KILL}", f"step:26:{STOP}"],
    "ddpnas": [f"step:14:{KILL}", f"step:26:{STOP}"],
    "pas": [f"step:14:{STOP}", f"step:23:{KILL}", f"step:34:{STOP}"],
    "archtree": [f"told:2:{KILL}", f"told:2:{STOP}", f"step:22:{KILL}"],
}
Run = Callable[..., list[tuple[int, str]]]


@pytest.fixture
def search(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the tool on a method's config: ``search("pas", out, "--resume", stop="step:3:9")``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    (tmp_path / "stop_hook.py").write_text(STOP_HOOK)

    def call(base: str, out: Path, *more: str, stop: str = "none:0:0", count: int = 1) -> tuple[int, str]:
        method, epochs, options = METHODS[base]
        config = tmp_path / f"{base}.py"
        given: dict[str, Any] = {"root": ROOT, "base": base, "space": tmp_path / "space.json", "epochs": epochs}
        config.write_text(CONFIG.format(method=method, options=options, **given))
        monkeypatch.setenv("STOP_AT", stop)
        done = run("search", [str(config), "--work-dir", str(out), *more], count)
        return next((result for result in done if result[0]), done[0])

    return call


def figures(folder: Path) -> dict[str, Any]:
    """What does not depend on the clock."""
    report = json.loads((folder / "report.json").read_text())
    for row in report["history"]:
        for key in ("seconds", "steps_per_s", "peak_mb", "state_mb"):
            row.pop(key)
    report["details"].pop("seconds", None)
    return {k: v for k, v in report.items() if k not in ("seconds", "search_seconds", "peak_mb")}


@pytest.mark.parametrize(
    "base", ["pas", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tiered", "ddpnas", "archtree"))]
)
def test_results_and_exact_resume_in_every_phase(search, tmp_path: Path, base: str):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, output = search(base, whole)
    assert status == 0, output
    report = json.loads((whole / "report.json").read_text())
    spec = read_weights_spec(whole / "weights.safetensors")
    assert report["method"] == METHODS[base][0] and report["predicted"] == MacsCost()(spec) <= report["target"] == 0.1
    assert load_space(str(tmp_path / "space.json")).contains(spec) and report["predicted"] > 0.095
    assert create_model(str(whole / "weights.safetensors"))(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert len(report["history"]) == METHODS[base][1] and report["search_seconds"] >= report["seconds"] > 0
    assert report["peak_mb"] > 0 and report["status"] == "predicted" and report["top1_inherited"] >= 0
    assert report["config"] == json.loads((whole / "config_fingerprint.json").read_text())
    page = (whole / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 and "<script" not in page
    tuned = report["epochs"] - report["decided_epoch"]
    assert ("since the decision" in page) == (tuned > 0) and (base not in ("pas", "archtree") or tuned > 0)
    assert not tuned or f"trained since the decision (epochs: {tuned})" in page

    for i, stop in enumerate(KILLS[base]):
        status, output = search(base, killed, *(["--resume"] if i else []), stop=stop)
        number = int(stop.rpartition(":")[2])
        assert status == (-number if number == signal.SIGKILL else 128 + number), output
        assert not (killed / "spec.json").exists()
    status, output = search(base, killed, "--resume")
    assert status == 0, output
    assert figures(killed) == figures(whole)
    for name in ("spec.json", "weights.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_tree_from_given_weights_goes_on_although_no_epoch_was_over(search, tmp_path: Path, monkeypatch):
    start = tmp_path / "start"
    monkeypatch.setitem(METHODS, "archtree", ("Archtree", 2, "pretrain=0.5, beam=1, children=1, rounds=2"))
    assert search("archtree", start)[0] == 0
    given = ("--cfg-options", f"model.arch={start / 'weights.safetensors'}", "model.space=None")
    monkeypatch.setitem(
        METHODS, "archtree", ("Archtree", 1, "pretrain=0.0, beam=2, children=2, rounds=3, recovery_steps=2")
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    target = ("train_cfg.strategy.target=0.08",)
    status, output = search("archtree", whole, *given, *target)
    assert status == 0, output
    assert search("archtree", killed, *given, *target, stop=f"told:3:{KILL}")[0] == -KILL
    assert (killed / "interrupted.pth").is_file() and list((killed / "method").rglob("round_*.pt"))
    status, output = search("archtree", killed, *given, *target, "--resume")
    assert status == 0 and "goes on after round" in output, output
    assert figures(killed) == figures(whole)
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    status, output = search("archtree", whole, *given, *target)  # a new search: nothing of the old tree is used
    assert status == 0 and "goes on after round" not in output


@pytest.mark.slow
@pytest.mark.parametrize("base", ["ddpnas", "pas", "archtree"])
def test_two_processes_come_to_the_same_network(search, tmp_path: Path, base: str, monkeypatch):
    monkeypatch.setitem(METHODS, "ddpnas", ("DDPNAS", 6, "passes=3, widths=2"))  # an epoch has half of the steps
    status, output = search(base, tmp_path / "out", count=2)
    assert status == 0, output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.095 < report["predicted"] <= 0.1
    spec = read_weights_spec(tmp_path / "out" / "weights.safetensors")
    assert spec.hash == report["spec_hash"]
