"""NaN loss, signals within a step, weights as safetensors, the guard of a work directory, the progress bar."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console

from prunet_zoo import create_model, load_weights
from prunet_zoo.errors import TrainingError
from prunet_zoo.mm.cli import load_config
from prunet_zoo.mm.guard import check_work_dir, claim_work_dir, fingerprint
from prunet_zoo.mm.interrupts import Interrupted, StopSignals, resume_command, run_child
from prunet_zoo.mm.progress import ProgressHook
from prunet_zoo.mm.training import build_runner, close_hooks, make_robust, prepare_resume
from prunet_zoo.models import read_weights_spec


class At(Hook):
    """Calls ``action(runner)`` before a step, or when another point of a run is reached for the n-th time."""

    priority = "HIGHEST"

    def __init__(self, step: int, action: Any, point: str = "before_train_iter") -> None:
        self.step, self.action, self.count = step, action, 0
        setattr(self, point, self._called)

    def _called(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.count += 1
        if self.count == self.step:
            self.action(runner)


def runner_of(path: Path, work_dir: Path, *hooks: Hook, resume: bool = False, **changes: object) -> Runner:
    cfg = load_config(path, changes)
    cfg.work_dir, cfg.visualizer, cfg.resume, cfg.log_level = str(work_dir), None, resume, "WARNING"
    cfg.experiment_name = uuid.uuid4().hex  # MMEngine shares state between runs of one name in one process
    make_robust(cfg)
    prepare_resume(cfg)
    runner = build_runner(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def final_state(runner: Runner) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(Path(runner.work_dir) / f"epoch_{runner.max_epochs}.pth", weights_only=True)
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema_state_dict"].items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop(runner: Runner) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """State and metrics of an uninterrupted run, by the number of threads."""
    return {}


@pytest.mark.parametrize(
    ("step", "point"),
    [
        (8, "before_train_iter"),  # within the second epoch of five steps
        (10, "before_train_iter"),  # its last step
        (1, "before_train_iter"),  # before anything was saved
        (2, "before_val_epoch"),  # the epoch is saved, its validation is still owed
        (2, "after_val_epoch"),
    ],
)
def test_stopped_anywhere_and_resumed_gives_the_same_bits(
    tiny_config: Path, tmp_path: Path, whole: dict[str, Any], step: int, point: str
) -> None:
    if not whole:
        runner = runner_of(tiny_config, tmp_path / "whole")
        runner.train()
        whole.update(state=final_state(runner), info=dict(runner.message_hub.runtime_info))
    broken = runner_of(tiny_config, tmp_path / "broken", At(step, stop, point))
    with pytest.raises(Interrupted, match=r"(?s)The state is saved in .*Continue with:\n.*--resume") as caught:
        broken.train()
    assert caught.value.status == 130
    done = {"before_train_iter": step, "before_val_epoch": 10, "after_val_epoch": 10}[point]
    assert f"after {done} of 20 iterations" in caught.value.message
    again = runner_of(tiny_config, tmp_path / "broken", resume=True)
    assert again._resume
    again.train()
    assert same(whole["state"], final_state(again))
    for key in ("best_metrics", "last_metrics"):
        assert again.message_hub.runtime_info[key] == whole["info"][key]
    assert not (tmp_path / "broken" / "interrupted.pth").exists()  # a whole epoch has taken its place


def test_validation_does_not_change_what_is_learned(tiny_config: Path, tmp_path: Path) -> None:
    often = runner_of(tiny_config, tmp_path / "often")
    often.train()
    seldom = runner_of(tiny_config, tmp_path / "seldom", **{"train_cfg.val_interval": 4})
    seldom.train()
    assert same(final_state(often), final_state(seldom))


def test_nan_loss_stops_and_keeps_the_checkpoint_before(tiny_config: Path, tmp_path: Path) -> None:
    def poison(runner: Runner) -> None:
        runner.model.net.classifier.bias.data[0] = float("nan")

    runner = runner_of(tiny_config, tmp_path / "run", At(8, poison))
    with pytest.raises(TrainingError, match=r"loss is nan at iteration 8 \(epoch 2, .*epoch_1\.pth, is from before it"):
        runner.train()
    close_hooks(runner)
    state = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() for v in state.values())
    assert {p.name for p in (tmp_path / "run").glob("*_2.pth")} == set()


def test_weights_that_became_infinite_are_not_saved(tiny_config: Path, tmp_path: Path) -> None:
    def poison(runner: Runner) -> None:
        runner.model.net.classifier.bias.data[0] = float("inf")

    runner = runner_of(tiny_config, tmp_path / "run", At(2, poison, "after_train_epoch"))
    with pytest.raises(TrainingError, match=r"classifier\.bias is not finite"):
        runner.train()
    close_hooks(runner)
    assert {p.name for p in (tmp_path / "run").glob("epoch_*")} == {"epoch_1.pth"}


def test_safetensors_hold_averaged_weights_with_spec_and_metrics(tiny_config: Path, tmp_path: Path) -> None:
    runner = runner_of(tiny_config, tmp_path / "run")
    runner.train()
    for name in ("best", "last"):
        path = tmp_path / "run" / f"{name}.safetensors"
        assert read_weights_spec(path) == runner.model.net.spec
        model = create_model(str(path))
        load_weights(model, path)
    # a checkpoint's state_dict holds the averaged weights, as MMEngine swaps them
    last = torch.load(tmp_path / "run" / "epoch_4.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(v, last[f"net.{k}"]) for k, v in model.state_dict().items())
    assert not torch.equal(model.classifier.weight, runner.model.net.classifier.weight)


def test_second_ctrl_c_ends_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Interrupted(signal.SIGTERM, "").status == 143


GROUP = """
import os, signal, sys, time
import torch
from prunet_zoo.mm.interrupts import StopSignals, calm_workers
loader = torch.utils.data.DataLoader(list(range(40)), num_workers=2, prefetch_factor=2)
with StopSignals() as signals:
    if sys.argv[1] == "calm":
        calm_workers(loader)
    seen = 0
    for batch in loader:
        seen += 1
        if seen == 2:
            os.killpg(0, signal.SIGTERM)
            until = time.monotonic() + 1
            while time.monotonic() < until:
                sum(range(1000))
    print(seen, signals.requested)
"""


@pytest.mark.parametrize(("how", "status", "told"), [("calm", 0, f"40 {int(signal.SIGTERM)}"), ("as they are", 1, "")])
def test_workers_outlive_a_signal_to_the_group(how: str, status: int, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUP, how], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (status, told), done.stderr
    assert ("DataLoader worker" in done.stderr) == bool(status)


def test_command_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["tools/train.py", "my config.py", "--work-dir", "w"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert resume_command(argv) == "python tools/train.py 'my config.py' --work-dir w --resume"
    assert resume_command([*argv, "--resume"]).count("--resume") == 1
    assert resume_command(argv, resumable=False) == "python tools/train.py 'my config.py' --work-dir w"
    assert resume_command(["x.py", "--new", "--seed", "1"], False, ("--new",)) == "python x.py --seed 1"
    monkeypatch.setenv("PATH", str(tmp_path))  # the environment is not activated: `python` would be another one
    assert resume_command(["x.py"]) == shlex.join([sys.executable, "x.py", "--resume"])


def test_a_child_stopped_by_a_signal_of_its_own(tmp_path: Path) -> None:
    for status, expected in (("0", None), ("3", None), ("130", signal.SIGINT), ("143", signal.SIGTERM)):
        code = f"print('out'); raise SystemExit({status})"
        assert run_child([sys.executable, "-c", code], tmp_path, capture=True) == (int(status), "out\n", expected)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run_child([sys.executable, "-c", kill], tmp_path) == (-signal.SIGTERM, "", signal.SIGTERM)


def test_guard_names_what_differs(tmp_path: Path) -> None:
    cfg = Config(dict(model=dict(type="A", width=3), train_cfg=dict(max_epochs=2), work_dir="a", resume=False))
    check_work_dir(tmp_path, cfg, resume=False)
    assert not list(tmp_path.iterdir())  # a check writes nothing: the command may yet be refused
    claim_work_dir(tmp_path, cfg)
    same_run = Config(dict(model=dict(type="A", width=3), train_cfg=dict(max_epochs=2), work_dir="b", resume=True))
    same_run.custom_hooks = [dict(type="ProgressHook")]
    check_work_dir(tmp_path, same_run, resume=True)
    other = Config(dict(model=dict(type="A", width=4, depth=1), train_cfg=dict(max_epochs=2)))
    with pytest.raises(TrainingError, match=r"model\.depth: nothing there, 1 here; model\.width: 3 there, 4 here"):
        check_work_dir(tmp_path, other, resume=True)
    check_work_dir(tmp_path, same_run, resume=True)  # the refused config was not noted
    check_work_dir(tmp_path, other, resume=False)  # a fresh start may have any
    (tmp_path / "config_fingerprint.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot read"):
        check_work_dir(tmp_path, other, resume=True)


def test_fingerprint_ignores_logging_but_not_other_hooks() -> None:
    plain = Config(dict(custom_hooks=[dict(type="EMAHook", momentum=0.1)]))
    more = Config(dict(custom_hooks=[dict(type="ProgressHook"), dict(type="EMAHook", momentum=0.1)], log_level="INFO"))
    assert fingerprint(plain) == fingerprint(more)
    assert fingerprint(plain) != fingerprint(Config(dict(custom_hooks=[dict(type="EMAHook", momentum=0.2)])))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_only_on_a_terminal(tiny_config: Path, tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    hook = ProgressHook(Console(file=out, force_terminal=terminal, width=120))
    runner = runner_of(tiny_config, tmp_path / "run", **{"train_cfg.max_epochs": 2})
    runner._hooks = [h for h in runner.hooks if not isinstance(h, ProgressHook)]
    runner.register_hook(hook)
    runner.train()
    text = out.getvalue()
    assert ("10/10" in text and "loss" in text and "it/s" in text) if terminal else text == ""
