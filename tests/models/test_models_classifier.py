"""The classifier of every listed model: shapes, gradients, the face that timm's models have, determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunet_zoo import NetSpec, create_model, list_models, save_weights
from prunet_zoo.errors import SpecError, UnknownNameError
from prunet_zoo.models.layers import make_norm_factory

SMALL: dict[str, Any] = {
    "input_size": 32,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]},
        {
            "blocks": [
                {"type": "fused_irb", "out_channels": 16, "stride": 2, "hidden": 24, "act": "silu", "se_ratio": 0.25},
                {"type": "irb", "out_channels": 16, "hidden": 32, "kernel_size": 5, "act": "hard_swish"},
                {"type": "irb", "out_channels": 16, "hidden": 24, "se_ratio": 0.5},
            ]
        },
    ],
    "tail": {"out_channels": 32},
    "num_classes": 5,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("arch", [*list_models(), SMALL], ids=[*list_models(), "small"])
def test_every_parameter_gets_a_gradient_in_a_training_step(arch: Any) -> None:
    model = create_model(arch, num_classes=7).train()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 6, 1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(images)
    assert logits.shape == (4, 7)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    optimizer.step()
    # fp32 may round a tiny update of a large weight away, but not of a whole tensor
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", list_models())
def test_uniform_face(name: str) -> None:
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
        assert torch.equal(logits, model(x))
    assert features.shape[:2] == (2, model.num_features)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), logits)
    assert [i["reduction"] for i in model.feature_info] == [level.stride for level in model.spec.feature_levels]
    assert all(i["module"] in dict(model.named_modules()) for i in model.feature_info)


def test_reset_classifier() -> None:
    model = create_model(SMALL)
    stages = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    model.reset_classifier(11)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 11)
    assert model.num_classes == model.spec.num_classes == 11
    assert sum(p.numel() for p in model.parameters()) == model.spec.params()
    model.reset_classifier(0)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    assert isinstance(model.get_classifier(), nn.Identity)
    kept = {k: v for k, v in model.state_dict().items() if "running" not in k and "batches" not in k}
    assert all(torch.equal(stages[k], v) for k, v in kept.items())


def test_num_classes_zero_gives_features() -> None:
    model = create_model(SMALL, num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 32)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert not [name for name, _ in model.named_parameters() if name.startswith("classifier")]


def test_num_classes_defaults_to_the_spec() -> None:
    assert create_model(SMALL).num_classes == 5
    with pytest.raises(SpecError, match=r"num_classes: .*greater than or equal to 0"):
        create_model(SMALL, num_classes=-1)


@pytest.mark.parametrize("head_hidden", [None, 48])
def test_arguments_change_the_spec(head_hidden: int | None) -> None:
    data = {**SMALL, "tail": {"out_channels": 32, "head_hidden": head_hidden}}
    model = create_model(data, num_classes=7, in_chans=4).eval()
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 7)
    assert (model.spec.num_classes, model.spec.in_channels, model.in_chans) == (7, 4, 4)
    assert sum(p.numel() for p in model.parameters()) == model.spec.params()
    assert (model.num_features, model.head_hidden_size) == (32, head_hidden or 32)
    same = create_model(model.spec).eval()
    same.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 32, 32)
    assert torch.equal(same(x), model(x))


def test_what_the_spec_tells_timm() -> None:
    model = create_model(SMALL, in_chans=2)
    assert model.default_cfg is model.pretrained_cfg
    assert model.pretrained_cfg == {
        "architecture": "unnamed",
        "input_size": (2, 32, 32),
        "num_classes": 5,
        "pool_size": (8, 8),
        "first_conv": "stages.0.0.conv.conv",
        "classifier": "classifier",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1.5}, "num_classes"),
        ({"in_chans": 0}, "in_channels"),
        ({"global_pool": "mean"}, "global_pool must be one of 'avg', 'max', 'avgmax', ''; got 'mean'"),
        ({"global_pool": ""}, r"global_pool='' gives a map, which a classifier \(5 classes\) cannot take"),
        ({"drop_rate": True}, "drop_rate must be a number from 0 to below 1; got True"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be a number from 0 to below 1; got 1\.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        create_model(SMALL, **options)


def test_intermediates_of_two_levels_in_one_stage() -> None:
    two = {"type": "irb", "out_channels": 16, "stride": 2, "hidden": 24}
    data = {
        **SMALL,
        "stages": [{"blocks": [two, {**two, "out_channels": 20}, {**two, "stride": 1, "out_channels": 20}]}],
    }
    model = create_model(data).eval()
    x = torch.randn(1, 3, 32, 32)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 16), (20, 8, 8)]
    assert torch.equal(final, model.tail(maps[1]))
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.stages[0]) == 1
    assert torch.equal(model(x), maps[0])
    for options, message in (({"output_fmt": "NLC"}, "NCHW"), ({"stop_early": True}, "needs intermediates_only=True")):
        with pytest.raises(SpecError, match=message):
            model.forward_intermediates(x, **options)


def test_same_seed_same_network_same_output() -> None:
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        model = create_model(SMALL, drop_rate=0.2, drop_path_rate=0.3).train()
        outs.append(model(torch.randn(4, 3, 32, 32)))
    assert torch.equal(outs[0], outs[1])
    torch.manual_seed(8)
    assert not torch.equal(outs[0], create_model(SMALL).train()(torch.randn(4, 3, 32, 32)))


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    x = torch.randn(8, 3, 32, 32)
    for options in ({"drop_rate": 0.5}, {"drop_path_rate": 0.9}):
        model = create_model(SMALL, **options)
        for module in model.modules():  # fixed statistics, so that only the dropping differs
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_residual_is_the_identity_when_the_branch_is_zero() -> None:
    model = create_model(SMALL).eval()
    block = model.stages[1][1]
    x = torch.randn(2, 16, 8, 8)
    assert not torch.allclose(block(x), x)
    nn.init.zeros_(block.project.conv.weight)
    nn.init.zeros_(block.project.norm.bias)
    assert torch.equal(block(x), x)
    assert not model.stages[1][0].has_residual  # stride 2


def test_initial_activations_neither_vanish_nor_explode() -> None:
    for name in list_models():
        model = create_model(name).train()
        logits = model(torch.randn(4, 3, 96, 96))
        assert 1e-2 < logits.std() < 1e2


def test_batch_norm_eps_is_the_specs() -> None:
    spec = NetSpec.from_dict(SMALL)
    assert {m.eps for m in create_model(spec).modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    data = spec.to_dict()
    data["stages"][0]["blocks"][0]["bn_eps"] = 1e-5
    model = create_model(data)
    assert model.stages[0][0].conv.norm.eps == 1e-5
    assert model.tail.norm.eps == 1e-3


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        (None, nn.BatchNorm2d),
        ({"type": "BN", "momentum": 0.01, "eps": 1e-4}, nn.BatchNorm2d),
        ({"type": "SyncBN"}, nn.SyncBatchNorm),
        ({"type": "GN", "num_groups": 4}, nn.GroupNorm),
    ],
)
def test_norm_cfg(cfg: dict[str, Any] | None, kind: type[nn.Module]) -> None:
    layer = make_norm_factory(cfg)(16, 1e-3)
    assert type(layer) is kind
    assert layer.eps == (cfg or {}).get("eps", 1e-3)
    if cfg and "momentum" in cfg:
        assert layer.momentum == 0.01
    frozen = make_norm_factory({**(cfg or {"type": "BN"}), "requires_grad": False})(16, 1e-3)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"type": "LN"}, "norm_cfg.type 'LN' is not known; use BN, SyncBN or GN"),
        ({"type": "BN", "num_groups": 4}, r"type BN does not take \['num_groups'\]; it takes"),
        ({"type": "GN"}, "GN needs num_groups"),
        ({"type": "GN", "num_groups": 5}, "num_groups=5 does not divide 16 channels"),
    ],
)
def test_bad_norm_cfg(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_norm_factory(cfg)(16, 1e-3)


def test_unknown_arch_suggests() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'prunet_p1'"):
        create_model("prunet_p11")


@pytest.mark.parametrize("channels", [1, 6])
def test_weights_for_other_image_channels(tmp_path: Path, channels: int) -> None:
    """timm's rule: the weights of the colours are summed for grey, and repeated, scaled to the same total, for more."""
    model = create_model(SMALL).eval()
    save_weights(tmp_path / "w.safetensors", model.state_dict(), model.spec)
    other = create_model(tmp_path / "w.safetensors", in_chans=channels).eval()
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(grey.expand(-1, channels, -1, -1)), model(grey.expand(-1, 3, -1, -1)))
    assert other.spec.in_channels == channels
