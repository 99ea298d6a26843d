"""TimmBackbone: levels, frozen parts, norms, recomputation, weights; the necks behind it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.mm import timm_backbone
from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.mm.timm_backbone import TimmBackbone, pretrained_state, timm_channels
from prunet_zoo.models import PrunedSpec, build_pruned, save_weights

# timm's small networks for tests (of each way in which it makes a feature network), with a level each has not
TINY = "test_efficientnet"
FAMILIES = ["test_efficientnet", "test_resnet", "test_convnext", "test_byobnet", "mobilenetv3_small_050", "regnetx_002"]
TAKEN = {"test_convnext": (1, 2, 3)}  # ConvNeXt begins at stride 4
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def image(size: int = 64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, size, size)


def loss(backbone: nn.Module) -> torch.Tensor:
    return sum((m**2).mean() for m in backbone(image()))  # type: ignore[return-value]


def levels_of(name: str) -> tuple[int, ...]:
    return TAKEN.get(name, (0, 1, 2, 3))


@pytest.mark.parametrize("kind", ["TimmBackbone", "prunet_zoo.TimmBackbone", TimmBackbone])
def test_registered_in_the_root_and_in_our_scope(kind: Any) -> None:
    config = ConfigDict(type=kind, model_name=TINY, out_indices=(1, 3))
    kept = copy.deepcopy(config)
    backbone = ROOT_MODELS.build(config)
    assert config == kept
    backbone.init_weights()
    maps = backbone(image())
    assert isinstance(maps, tuple)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (4, 4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_levels_are_strides_and_known_without_building(name: str) -> None:
    levels = levels_of(name)
    for chosen in (levels, levels[1:2], levels[:-1]):
        backbone = TimmBackbone(name, chosen).train()
        maps = backbone(image())
        assert [m.shape[1] for m in maps] == backbone.out_channels == timm_channels(name, chosen)
        strides = [2 << level for level in chosen]
        assert [64 // m.shape[2] for m in maps] == strides
        assert [info["reduction"] for info in backbone.feature_info] == strides
        assert [info["num_chs"] for info in backbone.feature_info] == backbone.out_channels
        sum(m.sum() for m in maps).backward()  # what lies behind the last level is not there
        assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_looking_channels_up_draws_nothing_at_random() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    timm_backbone._LEVELS.clear()
    timm_channels("regnetx_004", (1, 2))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_is_exactly_what_the_level_depends_on(name: str) -> None:
    """Found by autograd: level n's map has a gradient in just those parameters that frozen_stages=n freezes."""
    levels = levels_of(name)
    for level in levels[:-1]:
        probe = TimmBackbone(name, (level,))
        needed = {n for n, p in probe.named_parameters()}
        frozen = TimmBackbone(name, levels, frozen_stages=level).train()
        assert {n for n, p in frozen.named_parameters() if not p.requires_grad} == needed
        before = {n: b.clone() for n, b in frozen.named_buffers() if n.endswith("running_mean")}
        loss(frozen).backward()
        for n, buffer in frozen.named_buffers():
            if n in before:
                assert torch.equal(buffer, before[n]) == (n.replace("running_mean", "weight") in needed), n
        assert {n for n, p in frozen.named_parameters() if p.grad is None} == needed
        frozen.eval().train()
        assert not any(m.training for n, m in frozen.named_modules() if n and f"{n}.weight" in needed)


def test_frozen_stages_beside_later_levels() -> None:
    """As the DETRs have it: stride 4 is frozen, but not among the levels."""
    backbone = TimmBackbone(TINY, (2, 3), frozen_stages=1).train()
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in TimmBackbone(TINY, (1,)).named_parameters()}
    loss(backbone).backward()


def norms(backbone: nn.Module) -> list[Any]:
    return [m for m in backbone.modules() if isinstance(m, NORMS)]


def test_norm_eval() -> None:
    backbone = TimmBackbone(TINY, (1, 2), norm_eval=True).train()
    assert backbone.training and norms(backbone)
    assert not any(m.training for m in norms(backbone))


def test_norm_cfg_changes_what_it_names() -> None:
    plain = TimmBackbone(TINY, (1, 2)).eval()
    eps, momentum = norms(plain)[0].eps, norms(plain)[0].momentum
    synced = TimmBackbone(TINY, (1, 2), norm_cfg={"type": "SyncBN", "requires_grad": False, "momentum": 0.03}).eval()
    found = norms(synced)
    assert len(found) == len(norms(plain))
    assert all(isinstance(m, nn.SyncBatchNorm) and (m.eps, m.momentum) == (eps, 0.03) for m in found)
    assert not any(p.requires_grad for m in found for p in m.parameters())
    frozen = TimmBackbone(TINY, (1, 2), norm_cfg={"type": "BN", "requires_grad": False, "eps": 0.5})
    assert all(
        type(m).__name__.startswith("BatchNorm") and (m.eps, m.momentum) == (0.5, momentum) for m in norms(frozen)
    )
    grouped = TimmBackbone(TINY, (1, 2), norm_cfg={"type": "GN", "num_groups": 4})
    assert not norms(grouped)
    assert any(isinstance(m, nn.GroupNorm) and m.num_groups == 4 and m.eps == eps for m in grouped.modules())
    # names and activations stay: with the same weights SyncBN gives the same maps; GN differs but in its statistics
    synced.load_state_dict(plain.state_dict())
    for a, b in zip(plain(image()), synced(image()), strict=True):
        torch.testing.assert_close(a, b)
    assert {n for n, _ in grouped.named_parameters()} == {n for n, _ in plain.named_parameters()}
    with_act = [n for n, m in plain.named_modules() if n.endswith(".act") and not isinstance(m, nn.Identity)]
    assert with_act and all(type(grouped.get_submodule(n)) is type(plain.get_submodule(n)) for n in with_act)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_with_cp_gives_the_same_gradients(name: str) -> None:
    levels = levels_of(name)
    plain, recomputing = TimmBackbone(name, levels), TimmBackbone(name, levels, with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    calls = []
    for module in recomputing.modules():
        module.register_forward_hook(lambda *args: calls.append(1))
    counts = []
    for backbone in (plain, recomputing):
        value = loss(backbone.train())
        forward = len(calls)
        value.backward()
        counts.append(len(calls) - forward)
    assert counts[0] == 0 < counts[1]  # it did recompute
    for (n, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=n)


def test_drop_path() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("efficientnet_b0", (1, 2, 3), drop_path_rate=0.9).train()
    assert any(type(m).__name__ == "DropPath" and m.drop_prob > 0 for m in backbone.modules())
    assert not any(type(m).__name__ == "DropPath" for m in TimmBackbone("efficientnet_b0", (1, 2, 3)).modules())


def test_maps_with_channels_last_are_turned() -> None:
    name = "swin_tiny_patch4_window7_224"
    backbone = TimmBackbone(name, (1, 2), img_size=64, depths=(1, 1, 1, 1))
    assert [tuple(m.shape) for m in backbone(image())] == [(2, 96, 16, 16), (2, 192, 8, 8)]


# ---- weights


def classifier_state(name: str) -> dict[str, torch.Tensor]:
    model = timm.create_model(name)
    for buffer in model.buffers():  # statistics that differ from a fresh network's
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return dict(model.state_dict())


def has_taken(backbone: TimmBackbone, state: dict[str, torch.Tensor], begin: str = "") -> bool:
    """Whether all values are those of timm's classifier, whose names differ in dots at most."""
    theirs = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    own = backbone.net.state_dict()
    return bool(own) and all(torch.equal(t, theirs[(begin + name).replace(".", "_")]) for name, t in own.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_timms_own_file(tmp_path: Path, name: str, prefix: str) -> None:
    state = classifier_state(name)
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / "w.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "w.pth")}
    backbone = TimmBackbone(name, levels_of(name), init_cfg=init_cfg)
    assert not has_taken(backbone, state)
    backbone.init_weights()
    assert has_taken(backbone, state)


@pytest.mark.parametrize(
    ("prefix", "given"), [("", None), ("backbone.", None), ("backbone.", "backbone"), ("a.b.", "a.b.")]
)
def test_a_detectors_file(tmp_path: Path, prefix: str, given: str | None) -> None:
    torch.manual_seed(0)
    source = TimmBackbone(TINY, (1, 2, 3))
    state = {prefix + k: v for k, v in source.state_dict().items()} | {"bbox_head.x": torch.ones(1)}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "w.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "w.pth"), "prefix": given}
    backbone = TimmBackbone(TINY, (1, 2), init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in backbone.state_dict().items())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = classifier_state(TINY)
    last = next(n for n, _ in reversed(list(TimmBackbone(TINY, (1,)).net.named_parameters())))
    cases = [
        ({k: v for k, v in state.items() if k != last}, re.escape("lacks 1 of")),
        (state | {"conv_stem.weight": torch.ones(9, 3, 3, 3)}, "another shape"),
        ({"x": torch.ones(1)}, "no tensor"),
    ]
    for number, (content, message) in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        backbone = TimmBackbone(TINY, (1,), init_cfg={"type": "Pretrained", "checkpoint": str(path)})
        before = {n: t.clone() for n, t in backbone.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            backbone.init_weights()
        assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())  # nothing half loaded


def test_old_files_without_the_norms_counter(tmp_path: Path) -> None:
    state = {k: v for k, v in classifier_state(TINY).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "w.pth")}
    backbone = TimmBackbone(TINY, (1, 2), init_cfg=init_cfg)
    backbone.init_weights()
    assert torch.equal(backbone.net.conv_stem.weight, state["conv_stem.weight"])


def test_pretrained_is_loaded_in_init_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    state = classifier_state(TINY)
    asked = []

    def published(name: str, **options: Any) -> dict[str, torch.Tensor]:
        asked.append((name, options))
        return state

    monkeypatch.setattr(timm_backbone, "pretrained_state", published)
    backbone = TimmBackbone(TINY, (1, 2), pretrained=True, frozen_stages=1)
    assert asked == []
    backbone.init_weights()
    assert has_taken(backbone, state) and asked == [(TINY, {})]
    state.pop("conv_stem.weight")
    with pytest.raises(CheckpointError, match=f"timm's {TINY} lacks 1 of"):
        TimmBackbone(TINY, (1, 2), pretrained=True).init_weights()
    both = TimmBackbone(TINY, (1,), pretrained=True, init_cfg={"type": "Pretrained", "checkpoint": "x.pth"})
    with pytest.raises(CheckpointError, match="not both"):
        both.init_weights()


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="timm has no weights of darknet17"):
        pretrained_state("darknet17")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError) as caught:
        TimmBackbone("efficientnet_b0.ra_in1k", (1,), pretrained=True).init_weights()
    told = str(caught.value)
    assert "\n" not in told and "efficientnet_b0.ra_in1k" in told and "no route to host" in told and "init_cfg" in told


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "efficientnet_b99"}, "unknown model_name 'efficientnet_b99'; did you mean 'efficientnet_b"),
        ({"model_name": 3}, "model_name must be a name"),
        ({"out_indices": (1, 9)}, r"has the levels 0 \(stride 2\)"),
        ({"out_indices": ()}, "increasing and not empty"),
        ({"out_indices": (2, 1)}, "increasing and not empty"),
        ({"out_indices": 3}, "^out_indices must be a list of integers"),
        ({"frozen_stages": 4}, r"frozen_stages of test_efficientnet must be one of \[-1, 0, 1\], got 4"),
        ({"model_name": "test_convnext", "out_indices": (0, 1)}, r"has the levels 1 \(stride 4\)"),
        ({"model_name": "test_convnext", "frozen_stages": 0}, r"must be one of \[-1, 1\]"),
        ({"model_name": "test_vit", "out_indices": (1,)}, "has the levels"),
        ({"norm_cfg": "BN"}, "^norm_cfg must be None or a dict"),
        ({"norm_cfg": {"type": "LN"}}, "use BN, SyncBN or GN"),
        ({"norm_cfg": {"type": "GN", "num_groups": 7}}, "does not divide"),
        ({"norm_cfg": {"type": "BN", "affine": False}}, "does not take"),
        ({"model_name": "test_convnext", "norm_cfg": {"type": "BN"}}, "has no BatchNorm"),
        ({"drop_path_rate": 2.0}, "^drop_path_rate must be a number"),
        ({"wings": 2}, "timm cannot build test_efficientnet .*wings"),
        ({"model_name": "hrnet_w18_small", "frozen_stages": 1}, "cannot be told apart"),
        ({"model_name": "hrnet_w18_small", "with_cp": True}, "cannot recompute"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrunetError, match=message):
        TimmBackbone(**{"model_name": TINY, "out_indices": (1,), **options})


# ---- networks that a search has cut


def cut_spec(name: str, size: int = 64) -> PrunedSpec:
    """Half of the channels, in every set that can lose some."""
    from prunet_zoo.supernet.traced import TracedNet

    space = TracedNet(name, size, 5, step=4).space
    return space.at([layer.widths[len(layer.widths) // 2 - 1] for layer in space.layers])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "test_byobnet"])
def test_a_cut_network_gives_the_classifiers_maps(tmp_path: Path, name: str) -> None:
    spec = cut_spec(name)
    torch.manual_seed(0)
    net = build_pruned(spec).eval()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_weights(tmp_path / "weights.safetensors", net.state_dict(), spec)
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.safetensors")}
    backbone = TimmBackbone(arch=str(tmp_path / "weights.safetensors"), out_indices=(1, 2, 3), init_cfg=init_cfg).eval()
    backbone.init_weights()
    whole = timm_channels(name, (1, 2, 3))
    assert backbone.out_channels == timm_channels(arch=spec, out_indices=(1, 2, 3)) != whole
    with torch.no_grad():
        maps = backbone(image())
        wanted = {m.shape[2]: m for m in net.forward_intermediates(image(), intermediates_only=True)}
    assert [m.shape[1] for m in maps] == backbone.out_channels
    for m in maps:
        if m.shape == wanted[m.shape[2]].shape:  # of EfficientNets timm's last stage has a convolution more
            torch.testing.assert_close(m, wanted[m.shape[2]])
    backbone.train()
    loss(backbone).backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": TINY}, "either model_name"),
        ({"arch": None}, "either model_name"),
        ({"pretrained": True}, "give the found ones as init_cfg"),
        ({"wings": 2}, "leave wings out"),
        ({"arch": {"timm": "test_resnet", "shapes": {"nothing": [2]}}}, "no module nothing"),
        ({"arch": {"timm": "test_resnet", "shapes": {"conv1.0": [3, 3, 1]}}}, "do not fit each other"),
        ({"arch": {"timm": None, "shapes": {}}}, "not timm's"),
    ],
)
def test_bad_cut_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrunetError, match=message):
        TimmBackbone(**{"arch": {"timm": "test_resnet", "shapes": {}}, "out_indices": (1,), **options})


# ---- in_channels of the neck


@pytest.mark.parametrize(
    ("neck", "form"),
    [
        ({"type": "mmdet.FPN", "out_channels": 8, "num_outs": 3}, list),
        ({"type": "FPN", "in_channels": [256, 512, 1024, 2048]}, list),
        ({"type": "mmdet.DilatedEncoder", "in_channels": 2048}, lambda channels: channels[-1]),
        ({"type": "YOLOV3Neck", "in_channels": [1024, 512, 256]}, lambda channels: channels[::-1]),
    ],
)
@pytest.mark.parametrize("kind", ["TimmBackbone", "prunet_zoo.TimmBackbone", TimmBackbone])
def test_neck_follows(neck: dict[str, Any], form: Any, kind: Any) -> None:
    config = ConfigDict(
        type="Any", backbone={"type": kind, "model_name": TINY, "out_indices": (1, 2, 3), "pretrained": True}, neck=neck
    )
    kept = copy.deepcopy(config)
    filled = follow_spec(config)
    assert config == kept  # never in place
    assert filled.neck.in_channels == form(timm_channels(TINY, (1, 2, 3)))
    assert follow_spec(filled) == filled


def test_neck_follows_timms_options() -> None:
    backbone = {"type": "TimmBackbone", "model_name": "regnetx_002", "out_indices": (2, 3), "output_stride": 16}
    with pytest.raises(PrunetError, match="has the levels"):  # of stride 32 there is no map then
        follow_spec(ConfigDict(backbone={**backbone, "out_indices": (4,)}, neck={"type": "FPN", "in_channels": [1]}))
    filled = follow_spec(ConfigDict(backbone=backbone, neck={"type": "FPN", "in_channels": [1]}))
    assert filled.neck.in_channels == TimmBackbone("regnetx_002", (2, 3), output_stride=16).out_channels
    unfit = ConfigDict(backbone={"type": "TimmBackbone"}, neck={"type": "FPN", "in_channels": [1]})
    assert follow_spec(unfit) == unfit  # the backbone says what is missing
