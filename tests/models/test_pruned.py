"""PrunedSpec: JSON, counts in closed form, building again, and what is malformed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunet_zoo.errors import CheckpointError, LatencyError, SpecError, UnknownNameError
from prunet_zoo.latency import measure
from prunet_zoo.latency.own_device import read_measurements
from prunet_zoo.latency.record import append_record
from prunet_zoo.latency.subject import find_arch
from prunet_zoo.models import PrunedSpec, build_pruned, load_pruned, read_weights_spec, save_weights
from prunet_zoo.models.channels import is_depthwise, layer_shape, select_channels, take_profile
from prunet_zoo.models.export import ExportError
from prunet_zoo.models.pruned import create_start, is_pruned_file, load_pruned_spec, with_classes
from prunet_zoo.spec import load_spec
from prunet_zoo.zoo.export import classifier_network

SMALL: dict[str, Any] = {
    "name": "small",
    "timm": "resnet18",
    "options": {"channels": [8, 16, 16, 24], "zero_init_last": False},
    "input_size": 32,
    "num_classes": 5,
    "shapes": {
        "layer1.0.conv1": [5, 64, 1], "layer1.0.bn1": [5], "layer1.0.conv2": [8, 5, 1], "layer4.0.conv1": [7, 16, 1],
        "layer4.0.bn1": [7], "layer4.0.conv2": [24, 7, 1],
    },
}  # fmt: skip


def counted(net: nn.Module, size: int) -> tuple[int, int]:
    """Parameters and MACs of a built network, by counting what it executes."""
    macs = 0

    def hook(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal macs
        weight: Any = layer.weight
        macs += output.numel() * weight[0].numel()

    handles = [m.register_forward_hook(hook) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return sum(p.numel() for p in net.parameters()), macs


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SMALL), **changes}


def test_json_round_trip_and_hash():
    spec = PrunedSpec.from_dict(SMALL)
    again = PrunedSpec.from_dict(json.loads(spec.to_json()))
    assert again == spec and again.hash == spec.hash
    assert PrunedSpec.from_dict(dict(reversed(changed(name="other").items()))).hash == spec.hash
    assert spec.replace(timm="resnet18.a1_in1k").hash == spec.hash, "the tag names weights, not an architecture"
    assert spec.replace(num_classes=6).hash != spec.hash
    assert spec.replace(shapes={}).hash != spec.hash


def test_counts_are_those_of_the_network():
    spec = PrunedSpec.from_dict(SMALL)
    assert (spec.params(), spec.macs()) == counted(build_pruned(spec), 32)
    assert spec.macs(64) == spec.macs((64, 64)) == counted(build_pruned(spec), 64)[1]


def test_counting_draws_nothing():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    PrunedSpec.from_dict(changed(num_classes=17)).params()
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnetx_002"])
def test_counts_of_start_networks(name: str):
    spec = PrunedSpec.from_dict({"timm": name, "input_size": 32, "num_classes": 3, "shapes": {}})
    assert (spec.params(), spec.macs()) == counted(timm.create_model(name, num_classes=3), 32)


def test_folder_weights_file_and_spec_load_the_same(tmp_path: Path):
    torch.manual_seed(0)
    spec = PrunedSpec.from_dict(SMALL)
    net, x = build_pruned(spec).eval(), torch.randn(2, 3, 32, 32)
    (tmp_path / "spec.json").write_text(spec.to_json())
    save_weights(tmp_path / "weights.safetensors", net.state_dict(), spec)
    for source in (tmp_path, tmp_path / "weights.safetensors"):
        loaded = load_pruned(source).eval()
        assert loaded.spec == spec  # type: ignore[comparison-overlap]
        assert torch.equal(loaded(x), net(x))
    assert torch.equal(load_pruned(tmp_path / "spec.json", tmp_path / "weights.safetensors").eval()(x), net(x))
    assert is_pruned_file(tmp_path / "spec.json") and is_pruned_file(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pruned(spec.replace(shapes={}), tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"timm": 3}, "timm"),
        ({"timm": "hf-hub:someone/something"}, "timm"),
        ({"timm": "local-dir:/somewhere"}, "timm"),
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"num_classes": "5"}, "num_classes"),
        ({"num_classes": -1}, "num_classes"),
        ({"input_size": 0}, "input_size"),
        ({"shapes": [1]}, "shapes"),
        ({"shapes": {"layer1.0.conv1": [0, 8, 1]}}, r"shapes.layer1.0.conv1\[0\]"),
        ({"shapes": {"layer1.0.conv1": ["5", 8, 1]}}, r"shapes.layer1.0.conv1\[0\]"),
        ({"shapes": {"layer1.0.conv1": [5.0, 8, 1]}}, r"shapes.layer1.0.conv1\[0\]"),
        ({"shapes": {"layer1.0.conv1": [5, 8, 1, 1]}}, "shapes.layer1.0.conv1"),
        ({"shapes": {"layer1.0.conv1": []}}, "shapes"),
        ({"shapes": {"__class__ x": [1]}}, "shapes"),
        ({"options": {"pretrained": True}}, "options"),
        ({"options": {"checkpoint_path": "/etc/passwd"}}, "options"),
        ({"options": {"pretrained_cfg": "x"}}, "options"),
        ({"options": {"a": {"b": 1}}}, "options"),
        ({"options": {"not a name": 1}}, "options"),
        ({"extra": 1}, "extra"),
    ],
)
def test_malformed_data_names_the_field(change: dict[str, Any], field: str):
    with pytest.raises(SpecError, match=field):
        PrunedSpec.from_dict(changed(**change))


@pytest.mark.parametrize("missing", ["timm", "shapes"])
def test_required_fields(missing: str):
    with pytest.raises(SpecError, match=f"{missing}: Field required"):
        PrunedSpec.from_dict({k: v for k, v in SMALL.items() if k != missing})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"layer9.0.conv1": [5, 8, 1]}, "no module layer9.0.conv1"),
        ({"layer1": [5]}, "is no convolution"),
        ({"layer1.0.conv1": [9, 64, 1]}, "cannot become"),
        ({"layer1.0.conv1": [5, 64]}, "cannot become"),
        ({"layer1.0.conv1": [4, 4, 4]}, "cannot become"),
        ({"layer1.0.conv1": [5, 64, 1]}, "do not fit each other"),
        ({"fc": [5, 20]}, "do not fit each other"),
        ({"fc": [4, 24]}, "lead to 4 outputs, but num_classes is 5"),
    ],
)
def test_shapes_that_cannot_be(shapes: dict[str, list[int]], message: str):
    spec = PrunedSpec.from_dict(changed(shapes=shapes))
    for refused in (lambda: build_pruned(spec), spec.macs, spec.params, lambda: spec.macs(64)):
        with pytest.raises(SpecError, match=message):
            refused()


def test_a_head_for_other_classes():
    spec = PrunedSpec.from_dict(changed(shapes={"fc": [5, 24]}))
    assert with_classes(spec, 5) is spec
    other = with_classes(PrunedSpec.from_dict(SMALL), 3)
    assert other.num_classes == 3 and other.shapes == PrunedSpec.from_dict(SMALL).shapes
    assert build_pruned(with_classes(spec, 3)).fc.out_features == 3  # type: ignore[union-attr]


def test_start_networks_that_cannot_be():
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        build_pruned(PrunedSpec.from_dict(changed(timm="resnet_18")))
    with pytest.raises(SpecError, match="options"):
        build_pruned(PrunedSpec.from_dict(changed(options={"no_such_argument": 1})))
    with pytest.raises(SpecError, match="give that network as start"):
        build_pruned(PrunedSpec.from_dict(changed(timm=None)))
    with pytest.raises(SpecError, match="does not run on input of"):
        PrunedSpec.from_dict({"timm": "vit_tiny_patch16_224", "shapes": {}}).macs(100)


def test_a_module_of_ones_own_as_start():
    named = PrunedSpec.from_dict(SMALL)
    start = create_start(named)
    own = named.replace(timm=None, options={})
    built = build_pruned(own, start)
    assert counted(built, 32) == counted(build_pruned(named), 32)
    assert layer_shape(start.get_submodule("layer1.0.conv1")) == (8, 64, 1), "the given network was changed"


def test_files_that_are_none(tmp_path: Path):
    with pytest.raises(SpecError, match="no such file"):
        load_pruned_spec(tmp_path / "spec.json")
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(SpecError, match="is not JSON"):
        load_pruned_spec(tmp_path)
    assert not is_pruned_file(tmp_path / "spec.json") and not is_pruned_file(tmp_path / "nothing.safetensors")
    with pytest.raises(SpecError, match=r"a folder, a \.json or a \.safetensors"):
        load_pruned_spec("resnet18")
    save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, load_spec("gpunet_0"))
    with pytest.raises(CheckpointError, match="damaged spec"):
        load_pruned_spec(tmp_path / "w.safetensors")


def test_where_a_network_of_blocks_is_wanted_the_message_says_what_it_is(tmp_path: Path):
    spec = PrunedSpec.from_dict(SMALL)
    (tmp_path / "spec.json").write_text(spec.to_json())
    save_weights(tmp_path / "w.safetensors", build_pruned(spec).state_dict(), spec)
    with pytest.raises(SpecError, match="network with channels taken out"):
        load_spec(tmp_path / "spec.json")
    with pytest.raises(CheckpointError, match="network with channels taken out"):
        read_weights_spec(tmp_path / "w.safetensors")


def test_latency_and_export_take_it(tmp_path: Path):
    spec = PrunedSpec.from_dict(SMALL)
    net = build_pruned(spec).eval()
    (tmp_path / "spec.json").write_text(spec.to_json())
    save_weights(tmp_path / "w.safetensors", net.state_dict(), spec)
    for arch in (tmp_path / "spec.json", tmp_path / "w.safetensors", spec, spec.to_dict(), net):
        record = measure(arch, backend="torch", seconds=0.0, attempts=1)
        assert (record.spec_name, record.spec_hash, record.input_size) == ("small", spec.hash, (32, 32))
        append_record(tmp_path / "log.jsonl", record)
    (tmp_path / "found").mkdir()
    with pytest.raises(LatencyError, match=r"a folder without spec\.json"):
        measure(str(tmp_path / "found"), backend="torch", seconds=0.0, attempts=1)
    (tmp_path / "found" / "spec.json").write_text(spec.to_json())
    (tmp_path / "w.safetensors").rename(tmp_path / "found" / "weights.safetensors")
    assert find_arch(str(tmp_path / "found")).endswith("weights.safetensors")
    assert find_arch(str(tmp_path / "found"), with_weights=False).endswith("spec.json")
    assert measure(str(tmp_path / "found"), backend="torch", seconds=0.0, attempts=1).spec_hash == spec.hash
    (tmp_path / "found" / "weights.safetensors").rename(tmp_path / "w.safetensors")
    with pytest.raises(Exception, match="no record to fit to"):
        read_measurements(tmp_path / "log.jsonl")
    network = classifier_network(str(tmp_path / "spec.json"), weights=str(tmp_path / "w.safetensors"))
    x = torch.randn(1, 3, 32, 32)
    assert network.input_size == (32, 32) and torch.equal(network.module(x), net(x))
    assert classifier_network(str(tmp_path / "w.safetensors")).weights == str(tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="is a pruned network"):
        classifier_network(str(tmp_path / "spec.json"), pretrained=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_selecting_channels_is_indexing(seed: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, out = rng.randint(2, 6), rng.randint(2, 6)
    pick = lambda n: torch.tensor(sorted(rng.sample(range(n), rng.randint(1, n))))  # noqa: E731
    keep, rows = pick(channels), pick(out)
    x = torch.randn(2, channels, 5, 5)
    dense = nn.Conv2d(channels, out, 3, bias=rng.random() < 0.5)
    wanted = dense(x * torch.zeros(channels).index_fill(0, keep, 1.0).view(1, -1, 1, 1))[:, rows]
    select_channels(dense, rows, keep)
    torch.testing.assert_close(dense(x[:, keep]), wanted)
    assert layer_shape(dense) == (len(rows), len(keep), 1)
    depthwise = nn.Conv2d(channels, channels, 3, groups=channels)
    assert is_depthwise(depthwise)
    wanted = depthwise(x)[:, keep]
    select_channels(depthwise, keep, None)
    torch.testing.assert_close(depthwise(x[:, keep]), wanted)
    norm = nn.BatchNorm2d(channels).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    wanted = norm(x)[:, keep]
    select_channels(norm, keep, None)
    torch.testing.assert_close(norm(x[:, keep]), wanted)
    assert all(not p.is_inference() and p.requires_grad for m in (dense, depthwise, norm) for p in m.parameters())


def test_a_profile_leaves_the_network_as_it_is():
    net = timm.create_model("resnet10t", num_classes=2)
    net.layer1.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    take_profile(net, 3, (32, 32))
    assert net.training and not net.layer1.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
