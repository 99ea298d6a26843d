from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS as ROOT_MODELS

from prunet_zoo import create_model, load_space, save_weights
from prunet_zoo.errors import CheckpointError
from prunet_zoo.mm.classifier import PruNetClassifier
from prunet_zoo.mm.metrics import TopKAccuracy

SPACE = load_space("prunet_cpu_small")
ARCH = SPACE.decode([(0, layer.widths[1]) for layer in SPACE.layers], name="small").to_dict()
BATCH = {"inputs": torch.randn(4, 3, 32, 32), "label": torch.tensor([0, 1, 2, 3])}


def build(**options: object) -> PruNetClassifier:
    return ROOT_MODELS.build(dict(type="PruNetClassifier", arch=ARCH, **options))


def test_modes() -> None:
    model = build().eval()
    logits = model(**BATCH)
    assert logits.shape == (4, 10)
    loss = model(**BATCH, mode="loss")["loss"]
    assert torch.isclose(loss, torch.nn.functional.cross_entropy(logits, BATCH["label"]))
    predictions = model(**BATCH, mode="predict")
    assert [p["gt_label"] for p in predictions] == [0, 1, 2, 3]
    assert [p["pred_label"] for p in predictions] == logits.argmax(1).tolist()
    assert torch.isclose(predictions[0]["pred_scores"].sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="mode must be"):
        model(**BATCH, mode="train")
    with pytest.raises(ValueError, match="labels"):
        model(BATCH["inputs"], mode="loss")


def test_options_reach_the_network() -> None:
    model = build(num_classes=7, drop_rate=0.3, drop_path_rate=0.2, norm_cfg=dict(type="GN", num_groups=4))
    assert model.net.classifier.out_features == 7 and model.net.drop_rate == 0.3
    assert isinstance(model.net.tail.norm, torch.nn.GroupNorm)
    smooth, plain = build(label_smoothing=0.2).eval(), build().eval()
    plain.load_state_dict(smooth.state_dict())
    assert not torch.isclose(smooth(**BATCH, mode="loss")["loss"], plain(**BATCH, mode="loss")["loss"])


@pytest.mark.parametrize("mixup", [None, dict(mixup_alpha=0.2, cutmix_alpha=1.0)])
def test_training_step_moves_every_parameter(mixup: dict | None) -> None:
    torch.manual_seed(0)
    model = build(mixup=mixup).train()
    before = copy.deepcopy(model.state_dict())
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = model.train_step(BATCH, optim)
    assert torch.isfinite(losses["loss"])
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_init_cfg_loads_everything(tmp_path: Path, suffix: str) -> None:
    source = create_model(ARCH)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_weights(path, source.state_dict(), source.spec)
    else:  # as a run of the classifier leaves it
        torch.save({"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}, "meta": {}}, path)
    model = build(init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    model.init_weights()
    assert all(torch.equal(v, model.net.state_dict()[k]) for k, v in source.state_dict().items())
    other = build(num_classes=3, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    head = other.net.classifier.weight.clone()
    other.init_weights()
    assert torch.equal(other.net.tail.conv.weight, source.tail.conv.weight)
    assert torch.equal(other.net.classifier.weight, head)  # another number of classes: starts fresh


def test_init_cfg_refuses_what_does_not_fit(tmp_path: Path) -> None:
    state = create_model(ARCH).state_dict()
    missing = {k: v for k, v in state.items() if k != "stages.1.0.project.conv.weight"}
    torch.save(missing, tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match=r"missing\.pth lacks 1 of .*stages\.1\.0\.project\.conv\.weight"):
        build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "missing.pth"))).init_weights()
    with pytest.raises(CheckpointError, match="does not exist"):
        build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "none.pth"))).init_weights()


def test_ddp_and_mixed_precision(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(build(drop_path_rate=0.1).train())
        optim = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.module(BATCH["inputs"])
        for _ in range(2):  # a parameter without gradient in the first step would end the second
            losses = model.train_step(BATCH, optim)
        assert logits.dtype == torch.bfloat16 and losses["loss"].dtype == torch.float32
        assert torch.isfinite(losses["loss"])
        assert len(model.val_step(BATCH)) == 4
    finally:
        torch.distributed.destroy_process_group()


def test_accuracy() -> None:
    metric = TopKAccuracy(topk=(1, 2, 5))
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    samples = [{"pred_scores": s, "gt_label": t} for s, t in zip(scores, (1, 1, 0, 0), strict=True)]
    metric.process(None, samples)
    # right, second, third, and a tie, which counts for nothing; top-5 of three classes does not exist
    assert metric.evaluate(4) == {"top1": 25.0, "top2": 50.0}
    metric.process(None, [{"pred_scores": torch.tensor([float("nan"), 1.0]), "gt_label": 1}])
    assert metric.evaluate(1)["top1"] == 0.0


def test_optimiser_of_the_published_recipe() -> None:
    from mmengine.optim import build_optim_wrapper

    wrapper = build_optim_wrapper(
        build(), dict(type="OptimWrapper", optimizer=dict(type="RMSpropTF", lr=0.1, eps=1e-3))
    )
    assert type(wrapper.optimizer).__name__ == "RMSpropTF"
