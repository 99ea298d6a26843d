"""Networks of timm through tools/search.py, and what it finds in further training: a small run of each method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_pruning", reason="networks that are no specs need torch-pruning: pip install '.[prune]'")

from prunet_zoo.errors import SpecError
from prunet_zoo.mm.classifier import PruNetClassifier
from prunet_zoo.mm.masked_model import MaskedClassifier
from prunet_zoo.mm.timm_backbone import timm_channels
from prunet_zoo.models import PrunedSpec, load_pruned, save_weights
from prunet_zoo.models.pruned import load_pruned_spec
from prunet_zoo.supernet.traced import TracedNet

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_base_ = ["{root}/configs/search/{base}_prunet-cpu-small_digits.py"]
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)
model = dict(
    _delete_=True, type="MaskedClassifier", timm="resnet10t", input_size=16, num_classes=10, step=4,
    options=dict(channels=[8, 8, 12, 12], stem_width=8),
)
small = dict(max_per_class=20, transform=dict(type="digits", size=16))
train_dataloader = dict(batch_size=16, dataset=small)
train_cfg = dict(
    max_epochs=3,
    arch_dataloader=dict(batch_size=16, dataset=small),
    val_dataloader=dict(dataset=small),
    recalibration_batches=4,
    verify=0,
    strategy=dict(_delete_=True, {strategy}),
    latency=dict(_delete_=True, {latency}),
)
param_scheduler = dict(T_max=3)
randomness = dict(seed=3)
"""
METHODS = {
    "pas": ('type="PruningAsSearch", pretrain=0.34, finetune=0.34', 'type="latency", backend="torch"', "ms"),
    "archtree": (
        'type="Archtree", pretrain=0.34, beam=1, children=1, rounds=2, recovery_steps=1', 'type="macs"', "MMACs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("base", [pytest.param("pas", marks=pytest.mark.slow), "archtree"])
def test_a_network_of_timm_becomes_cheaper(
    run: Callable[..., list[tuple[int, str]]], tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, out = tmp_path / "config.py", tmp_path / "out"
    strategy, latency, unit = METHODS[base]
    config.write_text(CONFIG.format(root=ROOT, base=base, strategy=strategy, latency=latency))
    status, output = run("search", [str(config), "--work-dir", str(out)], 1)[0]
    assert status == 0, output
    report = json.loads((out / "report.json").read_text())
    assert report["unit"] == unit and 0 < report["predicted"] <= report["target"]
    spec = load_pruned_spec(out)
    assert spec.timm == "resnet10t" and spec.options["channels"] == (8, 8, 12, 12) and spec.shapes
    assert report["spec_hash"] == spec.hash
    net = load_pruned(out).eval()
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == spec.params()
    assert len(timm_channels(arch=out / "spec.json", out_indices=(1, 2, 3))) == 3


@pytest.mark.parametrize("given", [{"options": {"channels": [8]}}, {"in_channels": 1}, {"input_size": 32}])
def test_what_goes_with_timm_alone(given: dict):
    with pytest.raises(SpecError, match="input_size, in_channels and options go with timm"):
        MaskedClassifier(space="prunet_cpu_small", **given)


def test_images_of_one_channel():
    model = MaskedClassifier(timm="resnet10t", input_size=16, num_classes=3, in_channels=1)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


def cut(folder: Path) -> PrunedSpec:
    """What a search leaves behind: a network of timm with a head of fewer inputs, and its weights."""
    net = TracedNet("resnet10t", 16, 5, step=4, options={"channels": [8, 8, 12, 12], "stem_width": 8})
    spec, small = net.remove(net.ranked(net.space.smallest()), "least")
    assert spec.shapes["fc"] == (5, 4)
    folder.mkdir()
    (folder / "spec.json").write_text(spec.to_json())
    save_weights(folder / "weights.safetensors", small.state_dict(), spec)
    return spec


@pytest.mark.parametrize("classes", [5, 10])
def test_a_cut_network_of_timm_is_trained_on(
    run: Callable[..., list[tuple[int, str]]], tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = cut(tmp_path / "search")
    found = tmp_path / "search" / "weights.safetensors"
    arch = ["--arch", str(tmp_path / "search" / "spec.json"), "--weights", str(found)]
    if classes == 5:
        init_cfg = {"type": "Pretrained", "checkpoint": str(found)}
        model = PruNetClassifier(spec, init_cfg=init_cfg, drop_path_rate=0.2, norm_cfg={"type": "BN", "eps": 0.5})
        model.init_weights()
        state = load_pruned(found).state_dict()
        assert model.spec == spec and all(torch.equal(v, state[k]) for k, v in model.net.state_dict().items())
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.5}
        assert any(type(m).__name__ == "DropPath" for m in model.modules())
        return
    config = tmp_path / "config.py"
    small = "dict(batch_size=32, dataset=dict(max_per_class=20, transform=dict(type='digits', size=16)))"
    config.write_text(
        f"_base_ = ['{ROOT}/configs/classification/prunet-cpu-small_digits.py']\n"
        f"custom_imports = dict(imports=['prunet_zoo'], allow_failed_imports=False)\n"
        f"train_dataloader = {small}\nval_dataloader = {small}\n"
        "train_cfg = dict(max_epochs=1, val_begin=1, val_interval=1)\nparam_scheduler = []\n"
    )
    status, output = run("train", [str(config), "--work-dir", str(tmp_path / "cls"), *arch], 1)[0]
    assert status == 0, output
    trained = load_pruned(tmp_path / "cls" / "best.safetensors")
    assert trained.spec.num_classes == 10 and trained.spec.shapes["fc"] == (10, 4)
    record = json.loads((tmp_path / "cls" / "metrics.json").read_text())
    assert record["arch"]["hash"] == trained.spec.hash and record["macs"] == trained.spec.macs(record["input_size"])
