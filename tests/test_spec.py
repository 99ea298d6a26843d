"""NetSpec: round trips, hashes, errors that name the field, and counts against the published figures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import NetSpec, list_models, load_spec
from prunet_zoo.errors import SpecError, UnknownNameError
from prunet_zoo.spec import BlockSpec, StageSpec, TailSpec


@st.composite
def net_specs(draw: st.DrawFn) -> NetSpec:
    """Small valid networks with every block type, activation, kernel, stride, SE and padding."""
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        blocks = []
        for _ in range(draw(st.integers(1, 3))):
            kind = draw(st.sampled_from(["conv", "irb", "fused_irb", "rep"]))
            plain = kind in ("conv", "rep")
            kernel = draw(st.sampled_from([1, 3, 5]))
            blocks.append(
                BlockSpec(
                    type=kind,
                    out_channels=draw(st.integers(1, 12)),
                    kernel_size=kernel,
                    stride=draw(st.sampled_from([1, 1, 2])),
                    hidden=None if plain else draw(st.integers(1, 24)),
                    act=draw(st.sampled_from(["relu", "silu", "hard_swish"])),
                    se_ratio=0.0 if plain else draw(st.sampled_from([0.0, 0.25, 1.0])),
                    padding=None if kind == "rep" else draw(st.sampled_from([None, kernel // 2, kernel // 2 + 1])),
                    bn_eps=draw(st.sampled_from([None, 1e-5])),
                )
            )
        stages.append(StageSpec(blocks=tuple(blocks)))
    return NetSpec(
        name=draw(st.text(min_size=1, max_size=8)),
        input_size=draw(st.integers(16, 40)),
        in_channels=draw(st.sampled_from([1, 3])),
        stages=tuple(stages),
        tail=TailSpec(out_channels=draw(st.integers(1, 16))),
        num_classes=draw(st.integers(0, 9)),
    )


def tiny(**changes: object) -> dict[str, object]:
    """JSON data of a small network, with changes."""
    blocks = [
        {"type": "conv", "out_channels": 8, "stride": 2},
        {"type": "irb", "out_channels": 8, "hidden": 16, "kernel_size": 5},
    ]
    return {"input_size": 32, "stages": [{"blocks": blocks}], "tail": {"out_channels": 16}, "num_classes": 4, **changes}


@settings(max_examples=100, deadline=None)
@given(net_specs())
def test_json_round_trip(spec: NetSpec) -> None:
    again = NetSpec.from_dict(json.loads(spec.to_json()))
    assert again == spec
    assert again.hash == spec.hash
    assert again.to_json() == spec.to_json()


@settings(max_examples=50, deadline=None)
@given(net_specs(), st.randoms(use_true_random=False))
def test_hash_ignores_name_and_key_order(spec: NetSpec, rng: random.Random) -> None:
    def shuffled(value: object) -> object:
        if isinstance(value, dict):
            items = [(k, shuffled(v)) for k, v in value.items()]
            rng.shuffle(items)
            return dict(items)
        return [shuffled(v) for v in value] if isinstance(value, list) else value

    assert NetSpec.from_dict(shuffled(spec.to_dict())).hash == spec.hash
    assert spec.replace(name="another").hash == spec.hash


def test_hash_depends_on_every_field_of_the_architecture() -> None:
    base = NetSpec.from_dict(tiny())
    blocks = tiny()["stages"][0]["blocks"]  # type: ignore[index]
    changed = [
        tiny(input_size=64),
        tiny(in_channels=1),
        tiny(num_classes=5),
        tiny(bn_eps=1e-5),
        tiny(tail={"out_channels": 17}),
        tiny(tail={"out_channels": 16, "act": "silu"}),
        tiny(tail={"out_channels": 16, "head_hidden": 16}),
        *(
            tiny(stages=[{"blocks": [blocks[0], {**blocks[1], **change}]}])
            for change in (
                {"out_channels": 9},
                {"hidden": 17},
                {"kernel_size": 3},
                {"stride": 2},
                {"act": "silu"},
                {"se_ratio": 0.25},
                {"padding": 1},
                {"bn_eps": 1e-4},
                {"type": "fused_irb"},
            )
        ),
        tiny(stages=[{"blocks": [blocks[0]]}, {"blocks": [blocks[1]]}]),
    ]
    hashes = {NetSpec.from_dict(data).hash for data in changed}
    assert len(hashes) == len(changed)
    assert base.hash not in hashes


def test_hash_is_stable_across_versions() -> None:
    """Hashes are written into tables, checkpoints and work directories: they must never change."""
    golden = {"prunet_p0": "727b11622a7c", "prunet_p1": "54b0bbd8993d"}
    assert {name: load_spec(name).hash for name in golden} == golden
    assert NetSpec.from_dict(tiny()).hash == "269e77efb0ab"


# DESIGN's table: kernel and hidden width of each inverted residual block, stage by stage
PUBLISHED = {
    "prunet_p0": {
        "params": 22_815_080,
        "macs": 1_870_345_792,
        "first": ("conv", 3),
        "irbs": [
            [],
            [(3, 512), (3, 736), (3, 736)],
            [(3, 736), (5, 1088), (3, 1216)],
            [(3, 2048), (5, 2688), (3, 2368), (3, 1792)],
            [(3, 4032)],
        ],
    },
    "prunet_p1": {
        "params": 39_905_672,
        "macs": 3_241_678_272,
        "first": ("conv", 5),
        "irbs": [
            [(3, 512), (3, 512)],
            [(5, 512), (5, 768)],
            [(5, 768), (5, 1920), (3, 2016)],
            [(5, 2016), (5, 5632), (3, 5216), (5, 5632)],
            [(5, 5600)],
        ],
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name: str) -> None:
    spec, expected = load_spec(name), PUBLISHED[name]
    assert name in list_models()
    assert (spec.name, spec.input_size, spec.num_classes, spec.bn_eps) == (name, 224, 1000, 1e-3)
    assert spec.params() == expected["params"]
    assert spec.macs(224) == spec.macs() == expected["macs"]
    assert spec.tail.out_channels == 1984
    stem = [block for stage in spec.stages[:2] for block in stage.blocks]
    assert [(b.type, b.out_channels, b.kernel_size, b.stride) for b in stem] == [
        ("conv", 32, 3, 2),
        ("conv", 32, 3, 1),
        ("conv", 32, 3, 1),
    ]
    first = spec.stages[2].blocks[0]
    assert (first.type, first.kernel_size, first.stride) == (*expected["first"], 2)
    for stage, irbs, channels in zip(spec.stages[2:], expected["irbs"], (64, 96, 256, 704, 704), strict=True):
        assert {b.out_channels for b in stage.blocks} == {channels}
        assert [b.stride for b in stage.blocks] == [2] + [1] * (len(stage.blocks) - 1)
        assert [(b.kernel_size, b.hidden) for b in stage.blocks if b.type == "irb"] == irbs
    assert {b.act for stage in spec.stages for b in stage.blocks} == {"relu"}
    assert not any(b.se_ratio for stage in spec.stages for b in stage.blocks)


def test_feature_levels_count_strides() -> None:
    spec = load_spec("prunet_p0")
    assert [(level.index, level.stride) for level in spec.feature_levels] == [(i, 2 << i) for i in range(6)]
    assert spec.channels((1, 2, 3, 4)) == [64, 96, 256, 704]
    assert spec.channels() == [32, 64, 96, 256, 704, 704]
    with pytest.raises(SpecError, match=r"out_indices \(1, 6\) of 'prunet_p0': 6 does not exist; .*5: stride 64"):
        spec.channels((1, 6))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "must be a JSON object, got list"),
        ({}, r"stages: Field required.*tail: Field required"),
        (tiny(stages=[]), "stages: .*at least 1"),
        (tiny(stages=[{"blocks": []}]), r"stages\[0\]\.blocks: .*at least 1"),
        (tiny(input_size=0), r"input_size: .*greater than or equal to 1 \(given: 0\)"),
        (tiny(input_size="big"), r"input_size: .*\(given: 'big'\)"),
        (tiny(bn_eps=float("nan")), "bn_eps: "),
        (tiny(num_clases=10), "num_clases: .*not permitted"),
        (tiny(num_classes=True), r"num_classes: .*integer \(given: True\)"),
        (tiny(num_classes="64"), r"num_classes: .*integer \(given: '64'\)"),
        (tiny(num_classes=4.0), r"num_classes: .*integer \(given: 4\.0\)"),
        (tiny(bn_eps="1e-3"), r"bn_eps: .*number \(given: '1e-3'\)"),
        (tiny(name=5), r"name: .*string \(given: 5\)"),
        (tiny(version=True), r"version: .*integer \(given: True\)"),
        (
            tiny(stages=[{"blocks": [{"type": "conv", "out_channels": True}]}]),
            r"stages\[0\]\.blocks\[0\]\.out_channels: .*integer \(given: True\)",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "conv", "out_channels": 8, "se_ratio": False}]}]),
            r"stages\[0\]\.blocks\[0\]\.se_ratio: .*number \(given: False\)",
        ),
        (tiny(num_classes={4}), r"must be plain JSON data: set \(\{4\}\) is neither"),
        (tiny(name="\ud800"), "Invalid JSON: .{,80}$"),
        (tiny(version=2), r"version: .*1.*\(given: 2\)"),
        (tiny(tail={"out_channels": 8, "act": "gelu"}), r"tail\.act: .*'relu', 'silu' or 'hard_swish'.*'gelu'"),
        (
            tiny(stages=[{"blocks": [{"type": "conv", "out_channels": 8, "kernel_size": 4}]}]),
            r"stages\[0\]\.blocks\[0\]\.kernel_size: kernel_size must be odd.*\(given: 4\)",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "irb", "out_channels": 8}]}]),
            r"stages\[0\]\.blocks\[0\]: 'hidden' is required",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "conv", "out_channels": 8, "hidden": 8}]}]),
            r"stages\[0\]\.blocks\[0\]: a conv block has no hidden width",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "conv", "out_channels": 8, "se_ratio": 0.5}]}]),
            "a conv block has no squeeze-and-excite",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "mbconv", "out_channels": 8}]}]),
            r"stages\[0\]\.blocks\[0\]\.type: .*'conv', 'irb', 'fused_irb' or 'rep'.*'mbconv'",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "rep", "out_channels": 8, "hidden": 8}]}]),
            "a rep block has no hidden width; remove 'hidden'",
        ),
        (
            tiny(stages=[{"blocks": [{"type": "rep", "out_channels": 8, "padding": 0}]}]),
            r"a rep block pads by kernel_size // 2.*remove 'padding'",
        ),
        (
            tiny(
                input_size=2, stages=[{"blocks": [{"type": "conv", "out_channels": 8, "kernel_size": 7, "padding": 0}]}]
            ),
            r"is malformed: input of 2×2 px is too small for a block with kernel 7",
        ),
    ],
)
def test_malformed_names_the_field(data: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec(data) if isinstance(data, dict) else NetSpec.from_dict(data)


def test_json_lists_and_whole_numbers_for_ratios_are_taken() -> None:
    block = {"type": "irb", "out_channels": 8, "hidden": 16, "se_ratio": 1}
    spec = NetSpec.from_dict(tiny(stages=[{"blocks": [block]}]))
    assert spec.stages == (StageSpec(blocks=(BlockSpec(**block),)),)
    assert isinstance(spec.stages[0].blocks[0].se_ratio, float)
    assert NetSpec.from_dict(tiny(stages=({"blocks": (block,)},))) == spec


def test_data_that_contains_itself_is_refused() -> None:
    data = tiny()
    data["name"] = data
    with pytest.raises(SpecError, match="must be plain JSON data: Circular"):
        load_spec(data)


def test_python_code_builds_specs_as_before() -> None:
    spec = NetSpec.from_dict(tiny())
    assert spec.replace(stages=spec.stages, tail=TailSpec(out_channels=7)).tail.out_channels == 7
    assert spec.replace(stages=[spec.stages[0].model_dump()]) == spec
    assert StageSpec(blocks=[{"type": "conv", "out_channels": 8}]).blocks[0] == BlockSpec(type="conv", out_channels=8)
    assert spec.model_copy(update={"name": "b"}).name == "b"


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_usual_padding_is_the_default_however_it_is_given(kernel: int) -> None:
    def net(**padding: int) -> NetSpec:
        blocks = [{"type": "conv", "out_channels": 8, "kernel_size": kernel, **padding}]
        return NetSpec.from_dict(tiny(stages=[{"blocks": blocks}]))

    assert net(padding=kernel // 2) == net()
    assert net(padding=kernel // 2).hash == net().hash
    assert net(padding=kernel // 2 + 1).hash != net().hash
    assert BlockSpec(type="conv", out_channels=8, kernel_size=kernel, padding=kernel // 2).padding is None


def test_padding_of_a_bad_kernel_names_the_kernel() -> None:
    block = {"type": "conv", "out_channels": 8, "kernel_size": "3", "padding": 1}
    with pytest.raises(SpecError, match=r"malformed: stages\[0\]\.blocks\[0\]\.kernel_size: [^;]*$"):
        load_spec(tiny(stages=[{"blocks": [block]}]))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown arch 'prunet-p0'; did you mean 'prunet_p0'"):
        load_spec("prunet-p0")
    with pytest.raises(UnknownNameError, match=r"known: .*prunet_p0, prunet_p1"):
        load_spec("zzz")


def test_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "net.json", tmp_path / "bad.json"
    good.write_text(NetSpec.from_dict(tiny(name="mine")).to_json())
    assert load_spec(good) == load_spec(str(good)) == NetSpec.from_dict(tiny(name="mine"))
    with pytest.raises(SpecError, match=r"no such file: .*none\.json"):
        load_spec(tmp_path / "none.json")
    bad.write_text('{"stages": [\n}')
    with pytest.raises(SpecError, match=r"bad\.json is not JSON \(line 2"):
        load_spec(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"cannot read .*bad\.json"):
        load_spec(bad)
    bad.write_text("[]")
    with pytest.raises(SpecError, match=r"bad\.json must be a JSON object, got list"):
        load_spec(bad)


def test_a_spec_is_immutable_and_passes_through() -> None:
    spec = load_spec("prunet_p0")
    assert load_spec(spec) is spec
    with pytest.raises(ValueError, match="frozen"):
        spec.num_classes = 5  # type: ignore[misc]


def test_listed_files_carry_their_name() -> None:
    folder = Path(__file__).parents[1] / "prunet_zoo" / "archs"
    assert list_models() == sorted(path.stem for path in folder.glob("*.json"))
    assert {name: load_spec(name).name for name in list_models()} == {name: name for name in list_models()}
