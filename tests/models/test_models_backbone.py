"""The backbone: a classifier's intermediate maps, mmdet's argument meanings, nothing behind the last level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunet_zoo import create_model, list_models, load_weights, save_weights
from prunet_zoo.errors import CheckpointError, SpecError, UnknownNameError
from prunet_zoo.models import PruNetBackbone

SMALL: dict[str, Any] = {
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}, {"type": "conv", "out_channels": 12}]},
        {
            "blocks": [
                {"type": "irb", "out_channels": 16, "stride": 2, "hidden": 24},
                {"type": "fused_irb", "out_channels": 16, "hidden": 32, "se_ratio": 0.25},
            ]
        },
        {"blocks": [{"type": "irb", "out_channels": 24, "stride": 2, "hidden": 32, "act": "silu"}]},
    ],
    "tail": {"out_channels": 32},
    "num_classes": 5,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def with_statistics(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics that are not 0 and 1, so that they count."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("arch", [*list_models(), SMALL], ids=[*list_models(), "small"])
def test_maps_are_the_classifiers(arch: Any) -> None:
    classifier = with_statistics(create_model(arch, num_classes=3)).eval()
    levels = classifier.spec.feature_levels
    maps: dict[str, torch.Tensor] = {}
    modules = dict(classifier.named_modules())
    for info in classifier.feature_info:
        modules[info["module"]].register_forward_hook(lambda _m, _i, out, n=info["module"]: maps.update({n: out}))
    x = torch.randn(2, 3, 96, 64)
    sizes = {p.name: p.out_size for p in classifier.spec.placed((96, 64))}
    with torch.no_grad():
        classifier(x)
        for indices in (tuple(range(len(levels))), (1, 2), (len(levels) - 1,)):
            backbone = PruNetBackbone(arch, out_indices=indices).eval()
            assert load_weights(backbone, classifier.state_dict()) == list(backbone.state_dict())
            outs = backbone(x)
            assert isinstance(outs, tuple)
            assert len(outs) == len(indices)
            for index, out, info in zip(indices, outs, backbone.feature_info, strict=True):
                assert torch.equal(out, maps[levels[index].module])
                assert info == classifier.feature_info[index]
                assert out.shape == (2, info["num_chs"], *sizes[info["module"]])
            assert backbone.out_channels == [levels[i].channels for i in indices]


def test_prunet_p0_as_detectors_use_it() -> None:
    backbone = PruNetBackbone("prunet_p0", out_indices=(1, 2, 3, 4))
    assert [(i["reduction"], i["num_chs"]) for i in backbone.feature_info] == [(4, 64), (8, 96), (16, 256), (32, 704)]
    outs = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(o.shape[1:]) for o in outs] == [(64, 16, 24), (96, 8, 12), (256, 4, 6), (704, 2, 3)]


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1), (1, 2), (0, 1, 2)])
def test_nothing_is_built_that_gets_no_gradient(indices: tuple[int, ...]) -> None:
    backbone = PruNetBackbone(SMALL, out_indices=indices).train()
    sum(out.square().mean() for out in backbone(torch.randn(4, 3, 32, 32))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
    # only the last level is needed: the maps before it take part all the same
    last = PruNetBackbone(SMALL, out_indices=indices)
    last(torch.randn(4, 3, 32, 32))[-1].square().mean().backward()
    assert all(p.grad is not None for p in last.parameters())


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_frozen_stages(frozen: int) -> None:
    backbone = with_statistics(PruNetBackbone(SMALL, out_indices=(0, 1, 2), frozen_stages=frozen))
    level_of = {"stages.0.0": 0, "stages.0.1": 0, "stages.1.0": 1, "stages.1.1": 1, "stages.2.0": 2}
    backbone.eval()
    backbone.train()  # what a runner does between epochs must not thaw anything
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.1)
    loss = sum(out.square().mean() for out in backbone(torch.randn(4, 3, 32, 32)))
    if frozen < 2:
        loss.backward()
        optimizer.step()
    for name, module in backbone.named_modules():
        if name in level_of:
            held = level_of[name] <= frozen
            assert module.training is not held
            assert all(p.requires_grad is not held for p in module.parameters())
    for name, value in backbone.state_dict().items():
        held = level_of[".".join(name.split(".")[:3])] <= frozen
        assert torch.equal(value, before[name]) is held, name


def test_norm_eval_keeps_statistics_and_still_learns() -> None:
    backbone = with_statistics(PruNetBackbone(SMALL, out_indices=(2,), norm_eval=True))
    backbone.train()
    assert backbone.training
    assert not any(m.training for m in norms(backbone))
    before = [m.running_mean.clone() for m in norms(backbone)]
    backbone(torch.randn(4, 3, 32, 32))[0].square().mean().backward()
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms(backbone), before, strict=True))
    assert all(m.weight.grad is not None for m in norms(backbone))
    plain = with_statistics(PruNetBackbone(SMALL, out_indices=(2,))).train()
    assert all(m.training for m in norms(plain))


def test_checkpointing_changes_memory_only() -> None:
    plain = PruNetBackbone(SMALL, out_indices=(0, 2)).train()
    saving = PruNetBackbone(SMALL, out_indices=(0, 2), with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 32, 32)
    kept: dict[str, int] = {}
    for name, model in (("plain", plain), ("saving", saving)):
        count = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs = model(x)
        kept[name] = count
        sum(out.square().mean() for out in outs).backward()
    assert all(torch.equal(a, b) for a, b in zip(plain(x), saving(x), strict=True))
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert kept["saving"] < kept["plain"] / 2


def test_drop_path_grows_towards_the_end() -> None:
    backbone = PruNetBackbone(SMALL, out_indices=(2,), drop_path_rate=0.4)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in backbone.modules() if hasattr(m, "drop_path")]
    assert rates == [0.0, pytest.approx(0.3), 0.0]  # only the block with a residual connection can be dropped


@pytest.mark.parametrize("cfg", [{"type": "GN", "num_groups": 4}, {"type": "SyncBN", "momentum": 0.02}])
def test_norm_cfg_reaches_every_norm(cfg: dict[str, Any]) -> None:
    backbone = PruNetBackbone(SMALL, out_indices=(2,), norm_cfg=cfg)
    kind = nn.GroupNorm if cfg["type"] == "GN" else nn.SyncBatchNorm
    assert sum(isinstance(m, kind) for m in backbone.modules()) == 2 + 3 + 2 + 3
    assert not norms(backbone)
    if cfg["type"] == "GN":
        assert backbone(torch.randn(1, 3, 32, 32))[0].shape == (1, 24, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out_indices": ()}, SpecError, r"out_indices must be increasing and not empty, got \(\)"),
        ({"out_indices": (2, 1)}, SpecError, r"out_indices must be increasing .* got \(2, 1\)"),
        ({"out_indices": (1, 1)}, SpecError, r"out_indices must be increasing"),
        (
            {"out_indices": (1, 3)},
            SpecError,
            r"out_indices .* does not exist; levels are 0: stride 2, 1: stride 4, 2: stride 8",
        ),
        (
            {"out_indices": (-1,)},
            SpecError,
            r"out_indices .* does not exist; levels are 0: stride 2, 1: stride 4, 2: stride 8",
        ),
        ({"out_indices": (1,), "frozen_stages": 2}, SpecError, "frozen_stages must be from -1 to"),
        ({"out_indices": (1,), "frozen_stages": -2}, SpecError, "frozen_stages must be from -1 to"),
        ({"out_indices": 3}, SpecError, "^out_indices must be a list of integers.* got 3$"),
        ({"out_indices": "123"}, SpecError, "^out_indices must be a list of integers.* got '123'$"),
        ({"out_indices": (1, "2")}, SpecError, "^out_indices must be a list of integers"),
        ({"out_indices": (False, True)}, SpecError, "^out_indices must be a list of integers"),
        ({"out_indices": None}, SpecError, "^out_indices must be a list of integers"),
        ({"out_indices": (1,), "frozen_stages": 1.5}, SpecError, r"^frozen_stages must be an integer.* got 1\.5$"),
        ({"out_indices": (1,), "frozen_stages": True}, SpecError, "^frozen_stages must be an integer"),
        ({"out_indices": (1,), "frozen_stages": None}, SpecError, "^frozen_stages must be an integer"),
        ({"out_indices": (1,), "norm_cfg": "BN"}, SpecError, "^norm_cfg must be None or a dict.* got 'BN'$"),
        ({"out_indices": (1,), "drop_path_rate": 2.0}, SpecError, "^drop_path_rate must be a number from 0 to below 1"),
        ({"out_indices": (1,), "drop_path_rate": -1.0}, SpecError, "^drop_path_rate must be a number"),
        ({"out_indices": (1,), "drop_path_rate": float("nan")}, SpecError, "^drop_path_rate must be a number"),
        ({"out_indices": (1,), "drop_path_rate": "0.1"}, SpecError, "^drop_path_rate must be a number"),
        ({"arch": "prunet_p2"}, UnknownNameError, "did you mean .*prunet_p"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PruNetBackbone(**{"arch": SMALL, **options})


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_weights_file_as_arch_brings_its_weights(tmp_path: Path, as_path: Any) -> None:
    classifier = with_statistics(create_model(SMALL))
    path = tmp_path / "w.safetensors"
    save_weights(path, classifier.state_dict(), classifier.spec)
    torch.manual_seed(1)
    backbone = PruNetBackbone(as_path(path), out_indices=(0, 1), frozen_stages=0)
    state = classifier.state_dict()
    assert backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())
    assert not any(p.requires_grad for p in backbone.stages[0].parameters())


def test_a_weights_file_as_arch_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    classifier = create_model(SMALL)
    lacking = {k: v for k, v in classifier.state_dict().items() if not k.startswith("stages.1.0")}
    save_weights(tmp_path / "w.safetensors", lacking, classifier.spec)
    with pytest.raises(CheckpointError, match=r"lacks .* stages\.1\.0"):
        PruNetBackbone(tmp_path / "w.safetensors", out_indices=(0, 1))


@pytest.mark.parametrize("name", list_models())
def test_usual_padding_gives_maps_of_the_usual_size_with_the_same_weights(name: str) -> None:
    plain, padded = PruNetBackbone(name), PruNetBackbone(name, usual_padding=True)
    load_weights(padded, with_statistics(plain).state_dict())
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        outs, others = padded.eval()(x), plain.eval()(x)
    assert [tuple(o.shape[2:]) for o in outs] == [(128 // s, 96 // s) for s in (4, 8, 16, 32)]
    quirk = any(p.block.padding is not None for p in plain.spec.placed())
    assert quirk == (name in ("gpunet_0", "gpunet_1", "gpunet_2"))
    assert all(torch.equal(a, b) for a, b in zip(outs, others, strict=True)) is not quirk
