"""The predictor: kernels of a block, what they cost, monotone and additive; its files; the command."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.console import run_plain_tool
from prunet_zoo.cost import cost_range, space_cost
from prunet_zoo.errors import PrunetError, SpecError, UnknownNameError
from prunet_zoo.latency import Predictor, list_devices
from prunet_zoo.latency.kernels import Runtime, block_kernels, network_kernels
from prunet_zoo.latency.roofline import Peaks, Rates, demand, kernel_ms
from prunet_zoo.space import list_spaces, load_space
from prunet_zoo.spec import BlockSpec, NetSpec, list_models, load_spec

ROOT = Path(__file__).parents[2]
DEVICES = ["a100-pytorch-fp16", "a100-tensorrt-fp16", "v100-pytorch-fp16", "v100-tensorrt-fp16"]
EAGER = Runtime(fuses=False, fused_activations=())


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("latency_tool_predictor", ROOT / "tools" / "latency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status(tool, argv):
    with pytest.raises(SystemExit) as ended:
        run_plain_tool(tool.main, argv, stopped=tool.STOPPED)
    return ended.value.code


def names(block, runtime, channels=16, size=(8, 8)):
    return [kernel.name for kernel in block_kernels(block, channels, size, runtime)]


def test_kernels_of_a_fusing_runtime():
    irb = BlockSpec(type="irb", out_channels=16, hidden=32, act="silu", se_ratio=0.25)
    assert names(irb, Runtime()) == [
        "expand", "expand.silu", "depthwise", "depthwise.silu",
        "se.pool", "se.reduce", "se.reduce.silu", "se.expand", "se.gate", "project",
    ]  # fmt: skip
    relu = irb.model_copy(update={"act": "relu", "se_ratio": 0.0})
    assert names(relu, Runtime()) == ["expand", "depthwise", "project"]
    assert names(irb.model_copy(update={"se_ratio": 0.0}), Runtime(fused_activations=("silu",))) == names(
        relu, Runtime()
    )
    assert names(BlockSpec(type="conv", out_channels=8), Runtime()) == ["conv"]


def test_a_rep_block_is_one_convolution():
    block = BlockSpec(type="rep", out_channels=16, act="silu")
    for channels in (8, 16):
        assert names(block, Runtime(fused_activations=("silu",)), channels=channels) == ["conv"]
        assert names(block, EAGER, channels=channels) == ["conv", "conv.silu"]
        (kernel,) = block_kernels(block, channels, (8, 8), Runtime(fused_activations=("silu",)))
        assert (kernel.macs, kernel.weights) == (block.macs(channels, (8, 8)), channels * 16 * 9)
    spec = load_space("rep_vgg_small").decode(load_space("rep_vgg_small").largest())
    kernels = [k for _, ks in network_kernels(spec, EAGER) for k in ks]
    assert sum(k.macs for k in kernels) == spec.macs()


def test_kernels_of_eager_pytorch():
    fused = BlockSpec(type="fused_irb", out_channels=16, hidden=32)
    assert names(fused, EAGER) == ["expand", "expand.norm", "expand.relu", "project", "project.norm", "project.add"]
    assert "project.add" not in names(fused, EAGER, channels=8)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("runtime", [Runtime(), EAGER], ids=["fused", "eager"])
def test_kernels_have_the_macs_and_weights_of_the_spec(name, runtime):
    spec = load_spec(name)
    kernels = [k for _, ks in network_kernels(spec, runtime) for k in ks]
    assert sum(k.macs for k in kernels) == spec.macs()
    assert sum(k.weights for k in kernels) <= spec.params()


def test_a_kernel_costs_what_the_roofline_says():
    """A 1×1 convolution of 64 → 64 channels on 64 pixels: one 64×64 tile on one of four units."""
    peaks = Peaks(matrix_tflops=4.0, vector_tflops=1.0, bandwidth_gbs=1.0, units=4, align=8, tiles=((64, 64),))
    kernels = block_kernels(BlockSpec(type="conv", out_channels=64, kernel_size=1), 64, (8, 8), Runtime())
    wanted = demand(kernels, peaks, "fp16", 1)
    assert wanted.matrix[0] == pytest.approx(2 * 64 * 64 * 64 / 1e9)  # 1 TFLOP/s a unit
    assert wanted.memory[0] == pytest.approx(2 * (64 * 64 * 2 + 64 * 64) / 1e6)
    rates = Rates(overhead_us=3.0, matrix=0.5, depthwise=0.5, memory=0.5)
    assert kernel_ms(wanted, rates, Runtime())[0] == pytest.approx(3e-3 + 2 * wanted.memory[0])
    busy = demand(kernels, peaks, "fp16", 8)
    assert busy.matrix[0] == pytest.approx(2 * wanted.matrix[0])  # eight tiles, four units
    overlapping = Runtime(asynchronous=True)
    assert kernel_ms(wanted, rates, overlapping)[0] == pytest.approx(2 * wanted.memory[0])
    assert kernel_ms(wanted, rates.model_copy(update={"overhead_us": 1e3}), overlapping)[0] == 1.0


def test_channels_are_padded():
    peaks = Peaks(matrix_tflops=1.0, vector_tflops=1.0, bandwidth_gbs=1.0, align=8)

    def matrix(channels):
        block = BlockSpec(type="conv", out_channels=64, kernel_size=3)
        return demand(block_kernels(block, channels, (8, 8), Runtime()), peaks, "fp16", 1).matrix[0]

    assert matrix(33) == matrix(40) < matrix(48)


def test_four_devices_are_shipped_with_their_errors():
    assert list_devices() == DEVICES
    for name in DEVICES:
        about = Predictor.load(name).describe()
        assert (about["predictor"], about["dtype"], about["batch"], about["unit"]) == (name, "fp16", 1, "ms")
        assert about["fit"]["networks"] == 7
        assert about["fit"]["worst"] == pytest.approx(max(abs(e) for e in about["fit"]["errors"].values()), abs=1e-4)
        if "tensorrt" in name:
            assert about["fit"]["mean_abs"] <= 0.08
            assert about["fit"]["worst"] <= 0.15
        assert {"latencies", "peaks", "rates"} <= set(about["sources"])
    assert len({Predictor.load(name).hash for name in DEVICES}) == 4


@pytest.mark.parametrize("name", DEVICES)
def test_it_predicts_the_networks_of_its_fit(name):
    predictor = Predictor.load(name)
    for network in predictor.model.fit.networks:
        spec = load_spec(network.name)
        assert (spec.hash, (spec.input_size,) * 2) == (network.hash, network.input_size)
        assert predictor(spec) == pytest.approx(network.measured_ms, rel=0.25)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("space_name", [name for name in list_spaces() if load_space(name).additive])
def test_it_is_additive_over_blocks(name, space_name):
    predictor, space = Predictor.load(name), load_space(space_name)
    rng = random.Random(0)
    for _ in range(3):
        encoding = space.sample(rng)
        spec = space.decode(encoding)
        assert predictor(spec) == pytest.approx(space_cost(predictor, space, encoding), rel=1e-9)
        rows = predictor.kernels(spec)
        assert sum(row.ms for row in rows) == pytest.approx(predictor(spec), rel=1e-9)
        blocks = [p.name for p in spec.placed()]
        assert list(dict.fromkeys(row.block for row in rows if row.block not in ("input", "tail"))) == blocks
    (low, _), (high, _) = cost_range(predictor, space)
    assert 0 < low < high


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DEVICES),
    kind=st.sampled_from(["irb", "fused_irb"]),
    kernel=st.sampled_from([3, 5]),
    act=st.sampled_from(["relu", "silu"]),
    se=st.sampled_from([0.0, 0.25]),
    stride=st.sampled_from([1, 2]),
    channels=st.integers(1, 200),
    hidden=st.integers(1, 2000),
    out=st.integers(201, 400),  # no residual on either side of a comparison
    side=st.integers(7, 120),
    more=st.integers(1, 100),
)
def test_no_cost_falls_when_something_grows(name, kind, kernel, act, se, stride, channels, hidden, out, side, more):
    predictor = Predictor.load(name)
    block = BlockSpec(
        type=kind, out_channels=out, hidden=hidden, kernel_size=kernel, act=act, se_ratio=se, stride=stride
    )
    ms = predictor.block(block, channels, (side, side))
    assert ms > 0
    wider = block.model_copy(update={"hidden": hidden + more})
    grown = [
        predictor.block(wider, channels, (side, side)),
        predictor.block(block.model_copy(update={"out_channels": out + more}), channels, (side, side)),
        predictor.block(block.model_copy(update={"kernel_size": kernel + 2}), channels, (side, side)),
        predictor.block(block, min(channels + more, out - 1), (side, side)),
        predictor.block(block, channels, (side + more, side)),
    ]
    assert min(grown) >= ms * (1 - 1e-12)


@pytest.mark.parametrize("name", DEVICES)
def test_deeper_and_larger_networks_take_longer(name):
    predictor, spec = Predictor.load(name), load_spec("prunet_p0")
    data = spec.to_dict()
    data["stages"][-1]["blocks"].append({"type": "irb", "out_channels": 704, "hidden": 704})
    assert predictor(NetSpec.from_dict(data)) > predictor(spec)
    sizes = [predictor.predict(spec, side) for side in (64, 128, 224, 225, 448, 1024)]
    assert sizes == sorted(sizes)
    assert predictor.predict(spec, 224) == predictor(spec)


def test_the_smallest_block_still_costs_its_launches():
    """A 1×1 input and one channel: still a kernel each."""
    predictor = Predictor.load("v100-tensorrt-fp16")
    block = BlockSpec(type="irb", out_channels=1, hidden=1, kernel_size=1)
    assert predictor.block(block, 1, (1, 1)) >= 3 * predictor.model.rates.overhead_us * 1e-3


def test_a_block_is_computed_once(monkeypatch):
    predictor = Predictor.load("v100-tensorrt-fp16")
    block = BlockSpec(type="irb", out_channels=8, hidden=16)
    first = predictor.block(block, 8, (8, 8))
    monkeypatch.setattr(predictor, "_ms", None)
    assert predictor.block(BlockSpec(type="irb", out_channels=8, hidden=16), 8, (8, 8)) == first


def test_an_unknown_name_is_refused_with_suggestions():
    with pytest.raises(UnknownNameError, match=r"did you mean .*v100-tensorrt-fp16"):
        Predictor.load("v100-tensorrt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": {"overhead_us": -1, "matrix": 1, "depthwise": 1, "memory": 1}}, "rates.overhead_us"),
        ({"kind": "header"}, "kind"),
        ({"format": 2}, "format"),
        ({"peaks": {}}, "peaks.matrix_tflops"),
        ({"dtype": "int4"}, "dtype"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, change, message):
    data = {**Predictor.load("v100-tensorrt-fp16").model.to_dict(), **change}
    path = tmp_path / "device.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=message):
        Predictor.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"kind": "predictor"}', b'{"a": 1}\n{"b": 2}\n'])
def test_a_file_of_something_else_is_one_clear_error(tmp_path, content):
    path = tmp_path / "device.json"
    path.write_bytes(content)
    with pytest.raises(PrunetError, match=r"device\.json"):
        Predictor.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"no such file: .*gone\.json"):
        Predictor.load(tmp_path / "gone.json")


def test_the_file_gives_the_predictor_back(tmp_path):
    shipped = Predictor.load("a100-pytorch-fp16")
    path = tmp_path / "copy.json"
    path.write_text(json.dumps(shipped.model.to_dict()))
    again = Predictor.load(path)
    assert again.model == shipped.model
    assert again.hash == shipped.hash


def test_predict_prints_a_line(tool, capsys):
    assert tool.main(["predict", "prunet_p0", "--device", "v100-tensorrt-fp16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("prunet_p0: 0.6")
    assert "1×224×224 px, fp16, Tesla V100-SXM2" in out
    assert "not measured" in out


def test_predict_prints_json_alone(tool, capsys):
    argv = ["predict", "gpunet_0", "--device", "a100-tensorrt-fp16", "--input-size", "128", "256", "--json"]
    assert tool.main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["input_size"], data["predictor"]) == ([128, 256], "a100-tensorrt-fp16")
    assert sum(k["ms"] for k in data["kernels"]) == pytest.approx(data["predicted_ms"])
    assert data["kernels"][0]["block"] == "input"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "h100"], "unknown latency predictor 'h100'"),
        (["--device", "v100-tensorrt-fp16", "--input-size", "1", "2", "3"], "one side or height and width"),
        (["--device", "v100-tensorrt-fp16", "--input-size", "0"], "must be positive"),
        (["--table", "t.jsonl", "--input-size", "64"], "--input-size goes with --device"),
        (["--table", "t.jsonl", "--device", "v100-tensorrt-fp16"], "not allowed with"),
        ([], "one of the arguments --table --device is required"),
    ],
)
def test_predict_refuses_in_one_line(tool, capsys, argv, message):
    assert status(tool, ["predict", "prunet_p0", *argv]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
