"""The super-network: what it executes equals what is derived from it, and what is pruned is really gone."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import create_model, load_space
from prunet_zoo.errors import SpecError
from prunet_zoo.models.blocks import build_block
from prunet_zoo.search import MacsCost, space_cost
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import BlockSpec
from prunet_zoo.supernet import PrunodeBlock, SuperNet, WidthWindow, recalibrate_batchnorm
from prunet_zoo.supernet.stochastic import SKIP


def small_space() -> SearchSpace:
    """Every block type, SE, all activations, a plain convolution, skip, a convolution after pooling."""
    return SearchSpace.from_dict(
        {
            "name": "test",
            "input_size": 16,
            "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
            "stages": [
                {
                    "out_channels": 16,
                    "layers": [
                        {"stride": 2, "types": ["conv", "irb"], "hidden": {"step": 8, "max_expansion": 4}},
                        {
                            "repeat": 2, "types": ["irb", "fused_irb"], "se_ratios": [0, 0.25], "kernel_sizes": [3],
                            "acts": ["relu", "silu", "hard_swish"], "skip": True,
                            "hidden": {"step": 8, "max_expansion": 3},
                        },
                    ],
                }
            ],
            "tail": {"out_channels": 24, "head_hidden": 20},
            "num_classes": 5,
        }
    )  # fmt: skip


def trained_supernet(steps: int = 4) -> SuperNet:
    torch.manual_seed(0)
    net, generator = SuperNet(small_space()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        net.sample(1.0, generator)
        loss = F.cross_entropy(net(torch.randn(8, 3, 16, 16)), torch.randint(0, 5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("seed", range(12))
def test_hard_supernet_equals_derived_network(seed):
    net = trained_supernet(steps=1 + seed % 4)
    encoding = net.space.sample(random.Random(seed))
    net.set_hard(encoding)
    spec, state = net.derive(encoding, "derived")
    model = create_model(spec)
    model.load_state_dict(state)
    x = torch.randn(4, 3, 16, 16)
    for mode in (False, True):
        net.train(mode)
        model.train(mode)
        torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_prunode_with_p_large_1_or_0_is_the_block_at_that_width(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    spec = BlockSpec(
        type=rng.choice(["irb", "fused_irb"]), out_channels=8, hidden=32, se_ratio=rng.choice([0.0, 0.25]),
        kernel_size=rng.choice([3, 5]), stride=rng.choice([1, 2]),
    )  # fmt: skip
    grid = (8, 16, 24, 32)
    prunode = PrunodeBlock(spec, 8, grid, 1e-3, WidthWindow(grid)).eval()
    small, large = prunode.window.small, prunode.window.large
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(prunode(x, p_large=torch.tensor(1.0)), prunode(x, width=large))
    if not spec.se_ratio:  # with SE the gate sees d_L channels, so only the hard path is the narrow block
        torch.testing.assert_close(prunode(x, p_large=torch.tensor(0.0)), prunode(x, width=small), rtol=1e-4, atol=1e-5)


def test_prunode_mixes_linearly_and_reaches_its_logits_with_a_gradient():
    grid = (8, 16)
    spec = BlockSpec(type="irb", out_channels=8, hidden=16)
    prunode = PrunodeBlock(spec, 8, grid, 1e-3, WidthWindow(grid)).eval()
    x = torch.randn(2, 8, 5, 5)
    mix = prunode(x, p_large=torch.tensor(0.25))
    ends = prunode(x, p_large=torch.tensor(0.0)), prunode(x, p_large=torch.tensor(1.0))
    torch.testing.assert_close(mix, 0.75 * ends[0] + 0.25 * ends[1])
    prunode(x, p_large=prunode.p_large()).square().sum().backward()
    assert prunode.width_logits.grad.abs().min() > 0


def test_prunode_executes_d_large_channels_and_no_more():
    grid = tuple(range(8, 257, 8))
    prunode = PrunodeBlock(BlockSpec(type="irb", out_channels=8, hidden=256), 8, grid, 1e-3, WidthWindow(grid))
    seen = []
    prunode.block.depthwise.act.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    prunode(torch.randn(1, 8, 4, 4), p_large=prunode.p_large())
    assert seen == [prunode.window.large] and prunode.window.large < 256


def test_blocks_of_the_supernet_are_the_models_own():
    spec = BlockSpec(type="fused_irb", out_channels=8, hidden=24, se_ratio=0.25, act="silu")
    prunode = PrunodeBlock(spec, 8, (12, 24), 1e-3, WidthWindow((12, 24))).eval()
    block = build_block(spec, 8, 1e-3).eval()
    block.load_state_dict(prunode.block.state_dict())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(prunode(x, width=24), block(x))


def test_only_the_sampled_options_are_executed():
    net = SuperNet(small_space())
    net.sample(1.0, torch.Generator().manual_seed(3), active=2)
    ran = []
    layer = net.stochastic_layers()[1]
    for name, block in layer.blocks().items():
        block.register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    net(torch.randn(2, 3, 16, 16))
    assert len(layer.options) == 13 and 1 <= len(ran) <= 2
    assert len(layer._active) == 2 and set(ran) == set(layer._active) - {SKIP}


def test_pruning_gives_modules_parameters_and_memory_back():
    net = trained_supernet()
    before = sum(p.numel() for p in net.parameters())
    gone = net.stochastic_layers()[1].remove("0")
    assert sum(p.numel() for p in net.parameters()) == before - sum(p.numel() for p in gone) < before
    assert "0" not in net.stochastic_layers()[1].options
    net.stochastic_layers()[2].remove_layer()
    assert not list(net.stochastic_layers()[2].parameters())
    assert net.best()[2] is None and net.depth() == 1 + (net.best()[1] is not None)
    net.sample(1.0, torch.Generator().manual_seed(0))
    assert net(torch.randn(2, 3, 16, 16)).isfinite().all()
    with pytest.raises(SpecError, match="pruned"):
        net.set_hard(((0, 0), (0, 8), None))


def test_structure_can_be_given_to_a_fresh_supernet():
    net = trained_supernet()
    net.stochastic_layers()[1].remove("2")
    net.stochastic_layers()[1].remove(SKIP)
    net.stochastic_layers()[2].remove_layer()
    fresh = SuperNet(small_space())
    fresh.prune_to(net.structure())
    assert fresh.structure() == net.structure()
    fresh.load_state_dict(net.state_dict(), strict=True)


def test_a_training_step_reaches_every_parameter_of_the_supernet():
    net = SuperNet(load_space("prunet_cpu_small"))
    for layer in net.stochastic_layers():
        for block in layer.blocks().values():  # the part of the weights beyond d_L gets no gradient by design
            block.window = None if block.window is None else _FullWindow(block.widths)
    net.sample(1.0, torch.Generator().manual_seed(0))
    loss = F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.randint(0, 10, (8,)))
    (loss + net.expected_cost(MacsCost().block, 0.0)).backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


class _FullWindow(WidthWindow):
    small = property(lambda self: self.grid[0])
    large = property(lambda self: self.grid[-1])


def test_expected_cost_is_the_cost_of_a_decided_network():
    net, cost = SuperNet(small_space()), MacsCost()
    encoding = []
    with torch.no_grad():
        for layer, take_large in zip(net.stochastic_layers(), (True, False, True), strict=True):
            name = list(layer.candidates)[-1]
            layer.theta[name].fill_(60.0)
            block = layer.candidates[name]
            block.width_logits.copy_(torch.tensor([0.0, 60.0] if take_large else [60.0, 0.0]))
            encoding.append((int(name), block.window.large if take_large else block.window.small))
        expected = float(net.expected_cost(cost.block, cost.fixed(net.space)))
    assert expected == pytest.approx(space_cost(cost, net.space, encoding), rel=1e-5)
    assert expected == pytest.approx(cost(net.space.decode(encoding)), rel=1e-5)


def test_recalibration_gives_the_mean_of_batch_statistics_and_leaves_weights_alone():
    torch.manual_seed(0)
    model = create_model(small_space().decode(small_space().largest()))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    batches = [torch.randn(16, 3, 16, 16) * 3 + 1 for _ in range(4)]
    model.eval()
    assert recalibrate_batchnorm(model, batches) == 4
    conv, norm = model.stages[0][0].conv.conv, model.stages[0][0].conv.norm
    expected = torch.stack([conv(b).mean((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-4)
    assert not model.training and norm.momentum == 0.1
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    saved = norm.running_mean.clone()
    assert recalibrate_batchnorm(model, []) == 0
    assert torch.equal(norm.running_mean, saved)
