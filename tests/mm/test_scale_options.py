"""What makes big training fit: bfloat16, gradient checkpointing, SyncBN, frozen stages; in a detector, on CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

CONFIGS = Path(__file__).parent / "scale_configs"


@pytest.fixture(autouse=True)
def _mmdet_scope() -> Iterator[None]:
    kept = dict(DefaultScope._instance_dict)
    init_default_scope("mmdet")
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(kept)


def detector(config: str = "atss.py", **backbone: Any) -> nn.Module:
    """The config's model with random weights of seed 0 and other arguments of its backbone."""
    from mmdet.registry import MODELS

    cfg = Config.fromfile(CONFIGS / config)
    cfg.model.backbone.update(norm_eval=False, **backbone)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.train()


def batch() -> dict[str, Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    random = torch.Generator().manual_seed(0)
    samples = []
    for number in range(2):
        sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), img_id=number))
        boxes = torch.tensor([[8.0, 8, 40, 44], [20, 20, 60, 60]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([number, 3]))
        samples.append(sample)
    images = [torch.randint(0, 255, (3, 64, 64), generator=random, dtype=torch.uint8) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def learn(model: nn.Module) -> dict[str, torch.Tensor]:
    """One forward and backward pass; returns the losses."""
    data = model.data_preprocessor(batch(), True)
    losses = model(**data, mode="loss")
    total, shown = model.parse_losses(losses)
    total.backward()
    return {name: value.detach() for name, value in shown.items()}


@pytest.mark.parametrize("config", ["atss.py", "retinanet.py"])
def test_bfloat16_gives_finite_losses_and_gradients_everywhere(config: str) -> None:
    model, exact = detector(config), detector(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = learn(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    reference = learn(exact)
    for name, value in reference.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=0.05), name
    assert any(float(losses[name]) != float(reference[name]) for name in reference)  # it did calculate otherwise


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    usual, saving = detector(drop_path_rate=0.5), detector(drop_path_rate=0.5, with_cp=True)
    seen = []
    for model in (usual, saving):
        torch.manual_seed(7)  # stochastic depth draws the same when a block is calculated again
        seen.append((learn(model), {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    for one, two in zip(*seen, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7, msg=name)


def test_sync_bn_has_the_names_of_bn_and_runs_on_cpu_once_reverted() -> None:
    usual, synced = detector(), detector(norm_cfg=dict(type="SyncBN"))
    norms = [m for m in synced.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert {k: v.shape for k, v in usual.state_dict().items()} == {k: v.shape for k, v in synced.state_dict().items()}
    synced.load_state_dict(usual.state_dict())
    reverted = revert_sync_batchnorm(synced)
    assert learn(usual) == learn(reverted)


@pytest.mark.parametrize("level", [0, 2, 3])
def test_frozen_levels_stay_as_they_are(level: int) -> None:
    model = detector(frozen_stages=level)
    before = copy.deepcopy(model.backbone.state_dict())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        learn(model.train())
        optimiser.step()
    after = model.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen and not changed & frozen
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    fixed = {name for name in statistics if name.rpartition(".")[0] + ".weight" in frozen}
    assert not changed & fixed and (fixed == statistics) == (level == 3)
    assert bool(changed) == (level < 3)  # the last of its levels: the whole backbone stands still
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert not held & {id(p) for n, p in model.backbone.named_parameters() if n in frozen}


def test_mmengines_optimiser_leaves_frozen_weights_alone() -> None:
    """MMEngine's optimiser holds frozen parameters too; they get no gradient and so no weight decay."""
    from mmengine.optim import build_optim_wrapper

    model = detector(frozen_stages=2)
    wrapper = build_optim_wrapper(
        model, dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.5))
    )
    before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    model.train_step(batch(), wrapper)
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
