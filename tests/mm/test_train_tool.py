"""tools/train.py and tools/test.py as a user runs them: results, kill -9, signals, bad input."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from prunet_zoo import create_model, load_spec, save_weights
from prunet_zoo.files import WriteError
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.interrupts import Interrupted
from prunet_zoo.mm.network import is_detection, set_arch, set_weights
from prunet_zoo.mm.training import make_data

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--cfg-options", "visualizer=None", "log_level=WARNING"]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, *argv: str | Path) -> int:
    """Run a tool in this process; returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        run_tool(tool(name).main, [str(a) for a in argv], resumable=name == "train")
    return int(caught.value.code or 0)


def start(config: Path, work_dir: Path, *argv: str, new_group: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools/train.py"), str(config), "--work-dir", str(work_dir), *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, start_new_session=new_group, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, f"{path} never came: {process.communicate()[1]}"
        time.sleep(0.005)


def final_state(work_dir: Path, epoch: int = 4) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(work_dir / f"epoch_{epoch}.pth", weights_only=True)
    return {**checkpoint["state_dict"], **{f"ema.{k}": v for k, v in checkpoint["ema_state_dict"].items()}}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name in ("best.safetensors", "last.safetensors"):
        one, two = (safe_open(str(d / name), framework="pt") for d in (a, b))
        assert one.metadata() == two.metadata()
        assert all(torch.equal(one.get_tensor(k), two.get_tensor(k)) for k in one.keys())  # noqa: SIM118
    records = [json.loads((d / "metrics.json").read_text()) for d in (a, b)]
    assert records[0]["metrics"] == records[1]["metrics"] and records[0]["best"] == records[1]["best"]


@pytest.fixture(scope="module")
def whole(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of an uninterrupted run; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    assert call("train", tiny_config, "--work-dir", folder, *QUIET) == 0
    return folder


def test_results_and_test_tool(
    whole: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((whole / "metrics.json").read_text())
    spec = load_spec(load_config(tiny_config).model.arch.to_dict())
    assert record["task"] == "classification" and record["seed"] == 0 and record["seconds"] > 0
    assert record["params"] == spec.params() and record["macs"] == spec.macs(32)
    assert record["arch"] == {"name": "tiny", "hash": spec.hash}
    assert record["best"]["top1"] >= record["metrics"]["top1"] and set(record["metrics"]) == {"epoch", "top1", "top5"}
    for name in ("epoch_4.pth", "last.safetensors"):
        assert (
            call("test", tiny_config, whole / name, "--work-dir", tmp_path / "test", "--json", tmp_path / "t.json") == 0
        )
        tested = json.loads((tmp_path / "t.json").read_text())["metrics"]
        assert tested == {k: record["metrics"][k] for k in ("top1", "top5")}
    assert "top1" in capsys.readouterr().out


def test_a_runs_weights_tell_how_to_predict_with_them(whole: Path, tiny_config: Path) -> None:
    from prunet_zoo.mm.cli import load_config
    from prunet_zoo.mm.predict import preprocess_of
    from prunet_zoo.zoo.predict import load_classifier

    for name in ("best.safetensors", "last.safetensors"):
        classifier = load_classifier(whole / name)
        assert classifier.classes == tuple("0123456789")
        assert classifier.preprocess == preprocess_of(load_config(tiny_config))


def test_arch_and_weights_replace_the_configs(whole: Path, tiny_config: Path, tmp_path: Path) -> None:
    arch = load_spec(load_config(tiny_config).model.arch.to_dict()).to_dict()
    arch["tail"]["out_channels"] = 48
    (tmp_path / "spec.json").write_text(json.dumps(arch))
    model = create_model(arch)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), model.spec)
    frozen = ["optim_wrapper.optimizer.lr=0.0", "optim_wrapper.optimizer.weight_decay=0.0", "train_cfg.max_epochs=1"]
    argv = ["--arch", tmp_path / "spec.json", "--weights", tmp_path / "w.safetensors", *QUIET, *frozen]
    assert call("train", tiny_config, "--work-dir", tmp_path / "run", *argv) == 0
    after = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=True)["state_dict"]
    for name, value in model.named_parameters():
        assert torch.equal(after[f"net.{name}"], value)
    # the config in the work directory holds the spec, so it needs no other file
    (tmp_path / "spec.json").unlink()
    dumped = next((tmp_path / "run").glob("*.py"))
    assert call("test", dumped, tmp_path / "run" / "epoch_1.pth", "--work-dir", tmp_path / "t") == 0
    assert call("test", tiny_config, tmp_path / "run" / "epoch_1.pth", "--work-dir", tmp_path / "t") == 2  # other tail


def test_kill_9_and_resume_give_the_same_bits(whole: Path, tiny_config: Path, tmp_path: Path) -> None:
    process = start(tiny_config, tmp_path / "killed", *QUIET)
    wait_for(tmp_path / "killed" / "epoch_2.pth", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    newest = tmp_path / "killed" / (tmp_path / "killed" / "last_checkpoint").read_text().rpartition("/")[2]
    newest.write_bytes(newest.read_bytes()[:1000])  # and on top of it the disk lost the newest checkpoint
    assert call("train", tiny_config, "--work-dir", tmp_path / "killed", "--resume", *QUIET) == 0
    assert_same_run(whole, tmp_path / "killed")


def test_sigterm_prints_the_command_that_continues(whole: Path, tiny_config: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "my run"
    process = start(tiny_config, work_dir, *QUIET)
    wait_for(work_dir / "epoch_1.pth", process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 143, message
    assert "The state is saved in" in message and "Continue with:" in message
    command = shlex.split(message.strip().splitlines()[-1])
    assert command[1] == str(ROOT / "tools/train.py") and "--resume" in command
    assert call("train", *command[2:]) == 0
    assert_same_run(whole, work_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_workers_too(tiny_config: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A terminal sends Ctrl-C, Slurm SIGTERM, to the whole group: workers must neither die of it nor speak."""
    process = start(tiny_config, tmp_path / "run", *QUIET, "train_dataloader.num_workers=2", new_group=True)
    wait_for(tmp_path / "run" / "epoch_1.pth", process)
    os.killpg(process.pid, number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, message
    assert "The state is saved in" in message and message.count(number.name) == 1 and "Traceback" not in message


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), 2, "error: the disk is full while writing x.json"),
        (WriteError("cannot write x"), 2, "error: cannot write x"),
        (KeyboardInterrupt(), 130, "stopped at once"),
    ],
)
def test_exit_status_and_command_to_go_on(
    error: BaseException,
    status: int,
    message: str,
    resumable: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(argv: object) -> int:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["tools/some.py", "CONFIG", "--anew"])
    with pytest.raises(SystemExit) as caught:
        run_tool(main, resumable=resumable, drop=("--anew",))
    signal.signal(signal.SIGTERM, before)
    shown = capsys.readouterr().err
    assert caught.value.code == status and message in shown
    expected = ["tools/some.py", "CONFIG", "--resume"] if resumable else ["tools/some.py", "CONFIG"]
    assert shlex.split(shown.strip().splitlines()[-1])[1:] == expected


def test_interruption_gives_its_own_message(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: object) -> int:
        raise Interrupted(signal.SIGTERM, "saved in y")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143 and capsys.readouterr().err == "\nsaved in y\n"


@pytest.mark.parametrize("name", ["train", "test", "search", "quickstart"])
def test_printed_command_has_resume_only_where_the_tool_has_it(name: str) -> None:
    source = (ROOT / "tools" / f"{name}.py").read_text()
    has_it = name in ("train", "search")
    assert ("run_tool(main, resumable=True)" in source) is has_it
    shown = subprocess.run([sys.executable, f"tools/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ("--resume" in shown.stdout) is has_it


def test_errors_of_the_program_keep_their_traceback() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda argv: 1 // 0)
    signal.signal(signal.SIGTERM, before)


def test_resume_without_a_checkpoint_starts_anew(whole: Path, tiny_config: Path, tmp_path: Path) -> None:
    assert call("train", tiny_config, "--work-dir", tmp_path / "run", "--resume", *QUIET) == 0
    assert_same_run(whole, tmp_path / "run")


def test_bad_input(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*argv: str | Path) -> str:
        assert call("train", *argv, "--work-dir", tmp_path / "run") == 2
        message = capsys.readouterr().err.strip()
        assert message.splitlines()[-1].startswith("error: "), message
        return message

    assert "config file nowhere.py does not exist" in fails("nowhere.py")
    (tmp_path / "broken.py").write_text("model = dict(")
    assert "broken.py is broken: SyntaxError" in fails(tmp_path / "broken.py")
    assert "did you mean 'prunet_p1' or 'prunet_p0'" in fails(tiny_config, "--arch", "prunet_p2")
    assert "none.pth does not exist" in fails(tiny_config, "--weights", "none.pth")
    assert "needs a GPU" in fails(tiny_config, "--amp") or torch.cuda.is_available()
    assert "start them with tools/dist_train.sh" in fails(tiny_config, "--launcher", "pytorch")
    assert "base_batch_size" in fails(tiny_config, "--auto-scale-lr")
    path = tmp_path / "changed.py"
    dataset = "dict(_delete_=True, type='ImageFolderDataset', data_root='/nowhere')"
    path.write_text(f"_base_ = ['{tiny_config}']\ntrain_dataloader = dict(dataset={dataset})\n")
    assert "image folder /nowhere does not exist" in fails(path)
    path.write_text(f"_base_ = ['{tiny_config}']\noptim_wrapper = dict(optimizer=dict(lr=float('inf')))\n")
    assert "is nan at iteration" in fails(path)


def test_resume_of_another_config_is_refused(
    whole: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in whole.iterdir()}
    assert call("train", tiny_config, "--work-dir", whole, "--resume", "--seed", "1", *QUIET) == 2
    assert "randomness.seed: 0 there, 1 here" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in whole.iterdir()} == before  # nothing was touched


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "classification").glob("*.py")), ids=lambda p: p.stem)
def test_every_classification_config_builds(path: Path) -> None:
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS

    cfg = load_config(path)
    set_arch(cfg, None)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    loss = model(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), mode="loss")["loss"]
    wrapper.update_params(loss)
    assert not is_detection(cfg) and cfg.auto_scale_lr.base_batch_size > 0


def test_decay_of_the_published_recipe() -> None:
    """The learning rate is timm's StepLR(decay_t=2.4, decay_rate=0.97) with 3 epochs of warm-up from 1e-6."""
    from timm.scheduler import StepLRScheduler

    cfg = load_config(ROOT / "configs/classification/prunet-p0_imagenet.py")
    milestones = cfg.param_scheduler[1].milestones
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.08)
    warmup = dict(warmup_t=3, warmup_lr_init=1e-6, warmup_prefix=False)  # timm had no prefix when it was published
    theirs = StepLRScheduler(optimizer, decay_t=2.4, decay_rate=0.97, **warmup)
    for epoch in range(3, 450):
        theirs.step(epoch)
        ours = 0.08 * 0.97 ** sum(m <= epoch for m in milestones)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert 0.08 * cfg.param_scheduler[0].start_factor == pytest.approx(1e-6)


def test_detection_configs_take_arch_weights_and_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py")
    arch = ROOT / "configs/classification/prunet-cpu-small.json"
    model = create_model(str(arch))
    save_weights(tmp_path / "w.safetensors", model.state_dict(), model.spec)
    set_arch(cfg, arch)
    set_weights(cfg, tmp_path / "w.safetensors")
    assert is_detection(cfg) and list(cfg.model.neck.in_channels) == [64, 128]
    assert cfg.model.backbone.init_cfg.checkpoint == str(tmp_path / "w.safetensors")
    made = []
    monkeypatch.setattr("prunet_zoo.data.scenes.ensure_scenes", lambda root: made.append(root))
    monkeypatch.setattr("prunet_zoo.data.scenes.write_scenes", lambda **options: made.append(options))
    make_data(cfg)
    cfg.digit_scenes = dict(root="x", train=3, val=2)
    make_data(cfg)
    assert made == ["data/digit_scenes", {"root": "x", "train": 3, "val": 2}]


def test_cifar10_config(cifar10: Path, tmp_path: Path) -> None:
    options = [
        f"{part}_dataloader.dataset.{key}" for part in ("train", "val") for key in ("data_root", "max_per_class")
    ]
    values = [str(cifar10), "20", str(cifar10), "5"]
    settings = [f"{k}={v}" for k, v in zip(options, values, strict=True)]
    config = ROOT / "configs/classification/prunet-cpu-small_cifar10.py"
    argv = [*QUIET, *settings, "train_dataloader.batch_size=50", "train_cfg.max_epochs=1"]
    assert call("train", config, "--work-dir", tmp_path / "run", *argv) == 0
    assert 0 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["top1"] <= 100
