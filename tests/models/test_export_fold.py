"""Folding by what a run shows: exact for any network of a spec, for timm's, and nothing else is touched."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunet_zoo.models import create_model
from prunet_zoo.models.export import count_batchnorms, fold_batchnorm

ACTS = ("relu", "silu", "hard_swish")


def random_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, scales and eps of an ordinary range, drawn anew for each layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.eps = 10.0 ** float(torch.empty(1).uniform_(-5, -2, generator=generator))
            layer.running_mean.uniform_(-1, 1, generator=generator)
            layer.running_var.uniform_(0.25, 2, generator=generator)
            if layer.affine:
                layer.weight.data.uniform_(-1.5, 1.5, generator=generator)
                layer.bias.data.uniform_(-1, 1, generator=generator)
    return module.eval()


def difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of their outputs, as a share of the largest value."""
    with torch.no_grad():
        right, got = a(x), b(x)
    return float((right - got).abs().max() / right.abs().max())


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, object]:
    kind = draw(st.sampled_from(("conv", "irb", "fused_irb", "rep")))
    kernel = draw(st.sampled_from((1, 3, 5)))
    block: dict[str, object] = {
        "type": kind, "out_channels": draw(st.sampled_from((8, 12))), "stride": draw(st.sampled_from((1, 2))),
        "kernel_size": kernel, "act": draw(st.sampled_from(ACTS)),
        "padding": None if kind == "rep" else draw(st.integers(0, kernel // 2)),
    }  # fmt: skip
    if kind in ("irb", "fused_irb"):
        block |= {"hidden": draw(st.sampled_from((16, 24))), "se_ratio": draw(st.sampled_from((0.0, 0.25, 0.5)))}
    return block


@settings(max_examples=15, deadline=None)
@given(
    middle=st.lists(blocks(), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    eps=st.sampled_from((1e-5, 1e-3)),
    hidden=st.sampled_from((None, 16)),
)
def test_any_network_of_a_spec_folds_wholly_and_computes_the_same(middle, seed, eps, hidden):
    stem = {"type": "conv", "out_channels": 8, "stride": 2}
    spec = {
        "input_size": 160, "stages": [{"blocks": [stem]}, {"blocks": middle}], "bn_eps": eps, "num_classes": 5,
        "tail": {"out_channels": 16, "head_hidden": hidden},
    }  # fmt: skip
    torch.manual_seed(seed)
    model = random_norms(create_model(spec), seed).double()  # in float32 rounding alone is 1e-6 a layer
    x = torch.randn(2, 3, 160, 160, dtype=torch.double)
    for folded in (fold_batchnorm(model), fold_batchnorm(model, torch.zeros(1, 3, 160, 160, dtype=torch.double))):
        assert count_batchnorms(folded) == 0
        assert difference(model, folded, x) < 1e-12
    assert difference(model.float(), fold_batchnorm(model, torch.zeros(1, 3, 64, 64)), x.float()) < 1e-5


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("resnet18", 0),
        ("mobilenetv3_small_050", 0),
        pytest.param("tf_efficientnetv2_b0", 0, marks=pytest.mark.slow),
        pytest.param("regnety_002", 0, marks=pytest.mark.slow),
        ("resnetv2_50", 17),  # normalises before the convolution, behind a sum
        pytest.param("densenet121", 62, marks=pytest.mark.slow),
        pytest.param("ghostnet_100", 0, marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm(name, kept):
    torch.manual_seed(0)
    model = random_norms(timm.create_model(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batchnorm(model, torch.zeros(1, 3, 64, 64))
    assert count_batchnorms(folded) == kept
    assert difference(model, folded, torch.randn(2, 3, 64, 64)) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Net(nn.Module):
    """Convolution and BatchNorm, wired by ``forward``."""

    def __init__(self, wire, norm: type[nn.Module] = nn.BatchNorm2d, **options) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(4, 4, 3, padding=1, **options), nn.Conv2d(4, 4, 1)
        self.norm, self.norm2 = norm(4), norm(4)
        self.wire = wire

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wire(self, x)


CASES = {
    "conv then norm": (lambda n, x: n.norm(n.conv(x)), 1),
    "the other order": (lambda n, x: n.conv(n.norm(x)), 2),
    "the map is used twice": (lambda n, x: (lambda y: n.norm(y) + y)(n.conv(x)), 2),
    "used in place before": (lambda n, x: n.norm(n.conv(x).relu_()), 2),
    "used in place after": (lambda n, x: n.norm(n.conv(x)).relu_(), 1),
    "a shared convolution, two norms": (lambda n, x: n.norm(n.conv(x)) + n.norm2(n.conv(2 * x)), 2),
    "two convolutions, a shared norm": (lambda n, x: n.norm(n.conv(x)) + n.norm(n.conv2(x)), 2),
    "both shared, called twice": (lambda n, x: n.norm(n.conv(x)) + n.norm(n.conv(2 * x)), 1),
    "the norm also sees another map": (lambda n, x: n.norm(n.conv(x)) + n.norm(x), 2),
    "a view lies between": (lambda n, x: n.norm(n.conv(x).flip(1)), 2),
    "two pairs in a row": (lambda n, x: n.norm2(n.conv2(n.norm(n.conv(x)))), 0),
    "the convolution is also called without": (lambda n, x: n.norm(n.conv(x)) + n.conv(2 * x), 2),
    "the weight is used elsewhere": (lambda n, x: n.norm(n.conv(x)) * n.conv.weight.sum(), 2),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
@pytest.mark.parametrize("bias", [False, True])
def test_only_what_is_exact_is_folded(case, bias):
    wire, left = CASES[case]
    torch.manual_seed(0)
    net = random_norms(Net(wire, bias=bias))
    folded = fold_batchnorm(net, torch.zeros(1, 4, 8, 8))
    assert count_batchnorms(folded) == left
    assert difference(net, folded, torch.randn(3, 4, 8, 8)) < 1e-5


def test_a_map_that_is_also_returned_keeps_its_norm():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
            y = self.conv(x)
            return self.norm(y), [y]

    assert count_batchnorms(fold_batchnorm(random_norms(Both()), torch.zeros(1, 4, 8, 8))) == 1


def test_unknown_norms_and_batch_statistics_stay():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x = torch.zeros(1, 4, 8, 8)
    for norm in (Doubling, lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)):
        net = Net(CASES["conv then norm"][0], norm)
        assert count_batchnorms(fold_batchnorm(net, x)) == 2
    assert count_batchnorms(fold_batchnorm(Net(CASES["conv then norm"][0], lambda c: nn.GroupNorm(2, c)), x)) == 0


def test_other_kinds_of_convolution():
    for conv, norm, shape in (
        (nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), (2, 4, 8)),
        (nn.Conv2d(4, 4, 3, groups=2, padding="same"), nn.SyncBatchNorm(4), (2, 4, 8, 8)),
        (nn.Conv2d(4, 4, 3), type("Own", (nn.BatchNorm2d,), {})(4), (2, 4, 8, 8)),
        (nn.Conv3d(4, 2, 1), nn.BatchNorm3d(2, affine=False), (2, 4, 4, 4, 4)),
    ):
        net = random_norms(nn.Sequential(conv, norm, nn.SiLU()))
        folded = fold_batchnorm(net, torch.zeros(shape))
        assert count_batchnorms(folded) == 0
        assert difference(net, folded, torch.randn(shape)) < 1e-5
    transposed = random_norms(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4)))
    assert count_batchnorms(fold_batchnorm(transposed, torch.zeros(1, 4, 8, 8))) == 1
