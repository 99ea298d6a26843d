"""SearchSpace: every encoding is a network of the space and comes back; malformed spaces name the field."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import SearchSpace, list_models, list_spaces, load_space, load_spec
from prunet_zoo.errors import SpecError, UnknownNameError
from prunet_zoo.space import space_around

SPACES = list_spaces()


def small(layers: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """JSON data of a small space, with changes."""
    rows = [
        {"stride": 2, "types": ["irb", "fused_irb"], "hidden": {"step": 8, "max_expansion": 4}},
        {"repeat": 2, "kernel_sizes": [3], "hidden": {"step": 8, "max_expansion": 2}, "skip": True},
    ]
    return {
        "input_size": 32,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [{"out_channels": 16, "layers": rows if layers is None else layers}],
        "tail": {"out_channels": 32},
        "num_classes": 4,
        **changes,
    }


def test_listed_spaces() -> None:
    assert {"prunet_gpu", "prunet_cpu_small", "rep_vgg_small", "rep_vgg_b1"} <= set(SPACES)
    assert [name for name in SPACES if not load_space(name).additive] == ["rep_vgg_b1", "rep_vgg_small"]
    small_space = load_space("prunet_cpu_small")
    assert (small_space.input_size, small_space.num_classes) == (32, 10)


@pytest.mark.parametrize("name", ["prunet_p0", "prunet_p1"])
def test_published_networks_are_in_prunet_gpu(name: str) -> None:
    space, spec = load_space("prunet_gpu"), load_spec(name)
    assert space.contains(spec)
    assert space.decode(space.encode(spec), name=name) == spec
    assert not load_space("prunet_cpu_small").contains(spec)


def test_contains_refuses_what_the_space_lacks() -> None:
    space, spec = load_space("prunet_gpu"), load_spec("prunet_p0")
    data = json.loads(spec.to_json())
    data["stages"][3]["blocks"][0]["hidden"] = 500  # not a multiple of 32
    other = load_spec(data)
    assert not space.contains(other)
    with pytest.raises(SpecError, match=r"layer 4 \(stage 3\) of the space cannot be .*500"):
        space.encode(other)
    assert not space.contains(spec.replace(input_size=192))
    assert not space.contains(spec.replace(bn_eps=1e-5))


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_samples_decode_and_come_back(name: str, seed: int) -> None:
    space = load_space(name)
    encoding = space.sample(random.Random(seed))
    assert encoding == space.sample(random.Random(seed))
    assert all(choice in layer.choices() for choice, layer in zip(encoding, space.layers, strict=True))
    spec = space.decode(encoding)
    assert space.contains(spec)
    assert space.decode(space.encode(spec)) == spec
    assert spec.depth == sum(len(stage.blocks) for stage in space.stem) + sum(c is not None for c in encoding)
    assert spec.params() <= space.decode(space.largest()).params()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_json_round_trip(seed: int) -> None:
    rng = random.Random(seed)
    data = small(
        [
            {"stride": rng.choice([1, 2]), "types": ["irb"], "se_ratios": [0.0, 0.25], "hidden": {"step": 4}},
            {"repeat": rng.randint(1, 4), "acts": ["relu", "silu"], "hidden": {"step": 4, "min": 8}, "skip": True},
        ],
        num_classes=rng.randint(1, 100),
    )
    space = SearchSpace.from_dict(data)
    again = SearchSpace.from_dict(json.loads(space.to_json()))
    assert again == space
    assert again.hash == space.hash == space.replace(name="another").hash
    assert space.replace(num_classes=101).hash != space.hash


def test_hash_is_stable_across_versions() -> None:
    """Latency tables are bound to a space by its hash: it must never change."""
    golden = {
        "prunet_cpu_small": "1e29998de6ed", "prunet_gpu": "e91726d28e06",
        "rep_vgg_small": "48fed6dbfeba", "rep_vgg_b1": "990868fee2a3",
    }  # fmt: skip
    assert {name: load_space(name).hash for name in golden} == golden


REP = [
    {"stride": 2, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 5, "min": 8}},
    {"repeat": 2, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 8}, "out_channels": 12},
    {"kernel_sizes": [3], "hidden": {"step": 8, "max": 20}},
    {"kernel_sizes": [3], "hidden": {"step": 8}, "skip": True},
]


def test_a_layer_with_an_output_width_of_its_own() -> None:
    space = SearchSpace.from_dict(small(REP))
    assert [layer.widths for layer in space.layers[:4]] == [(10, 15, 16), (8, 12), (8, 12), (8, 16, 20)]
    assert [layer.in_channels for layer in space.layers] == [8, 16, 12, 12, 16]
    assert [layer.additive for layer in space.layers] == [False, False, False, False, True]
    assert not space.additive and SearchSpace.from_dict(small()).additive
    assert space.count() == 3 * 2 * 2 * 3 * (16 + 1)
    encoding = ((0, 10), (0, 12), (0, 8), (0, 20), None)
    spec = space.decode(encoding)
    assert [(p.in_channels, p.block.out_channels, p.block.hidden) for p in spec.placed()][1:] == [
        (8, 10, None), (10, 12, None), (12, 8, None), (8, 16, 20)
    ]  # fmt: skip
    assert space.encode(spec) == encoding and space.contains(spec)
    with pytest.raises(SpecError, match=r"layer 0 \(stage 1\) does not offer \(0, 5\)"):
        space.decode(((0, 5), *encoding[1:]))
    with pytest.raises(SpecError, match=r"a super-network needs a cost that is a sum.*Pruning-as-Search or Archtree"):
        space.require_additive("a super-network")


def test_a_single_output_width_leaves_the_space_additive() -> None:
    row = {"stride": 2, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 16}}
    assert SearchSpace.from_dict(small([row])).additive
    mixed = {"types": ["rep", "conv", "irb"], "kernel_sizes": [3], "hidden": {"step": 8}}
    space = SearchSpace.from_dict(small([mixed]))
    assert space.additive
    assert [space.layers[0].candidate_widths(c) for c in range(3)] == [(0,), (0,), tuple(range(8, 65, 8))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"types": ["irb"], "hidden": {"step": 8}, "out": {"step": 8}}, r"'out' .* is for rep blocks"),
        ({"types": ["rep"], "out": {"step": 8}, "skip": True}, "a layer with 'out' cannot be skipped"),
        ({"types": ["rep"], "out": {"step": 8, "min": 17}}, r"layers\[0\]\.out\.min: 17 is above the layer's 16"),
        ({"hidden": {"step": 8, "max": 16, "max_expansion": 2}}, "'max' and 'max_expansion' both say"),
        ({"hidden": {"step": 8, "min": 20, "max": 16}}, "min 20 is above max 16"),
        ({"types": ["rep"], "se_ratios": [0.25]}, "a rep layer has no squeeze-and-excite"),
    ],
)
def test_what_a_layer_cannot_be(row: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SearchSpace.from_dict(small([row]))


def test_nothing_is_skipped_behind_a_width_that_varies() -> None:
    rows = [
        {"stride": 2, "types": ["rep"], "kernel_sizes": [3], "out": {"step": 8}},
        {"hidden": {"step": 8}, "skip": True},
    ]
    with pytest.raises(SpecError, match=r"layers\[1\]\.skip: .* the layer before has an output width of its own"):
        SearchSpace.from_dict(small(rows))


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize(("step", "least"), [(8, None), (7, 100)])
def test_the_space_around_a_network_has_it_as_its_largest(name: str, step: int, least: int | None) -> None:
    spec = load_spec(name)
    space = space_around(spec, step, least)
    assert space.additive and space.decode(space.largest(), name=name) == spec
    assert space.encode(spec) == space.largest()
    assert [layer.stage for layer in space.layers] == [p.stage for p in spec.placed() if p.stage]
    for layer in space.layers:
        own = layer.candidates[0].hidden
        assert len(layer.candidates) == 1 and not layer.skip
        if own is None:
            assert layer.choices() == [(0, 0)]
        else:
            wanted = [w for w in range(step, own, step) if w >= (least or step)]
            assert list(layer.widths) == [*wanted, own]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_space_around_a_rep_network(seed: int) -> None:
    rng = random.Random(seed)
    space = load_space("rep_vgg_small")
    spec = space.decode(space.sample(rng))
    around = space_around(spec, step=rng.choice([3, 8, 200]))
    assert around.decode(around.largest()).hash == spec.hash
    smaller = around.decode(around.sample(rng))
    assert around.contains(smaller) and smaller.params() <= spec.params() and smaller.macs() <= spec.macs()


def test_what_has_no_space_around_it() -> None:
    spec = load_spec("prunet_p0")
    with pytest.raises(SpecError, match="it has no stage after its stem"):
        space_around(spec.replace(stages=spec.stages[:1]))
    with pytest.raises(SpecError, match="it has no classifier"):
        space_around(spec.replace(num_classes=0))
    with pytest.raises(SpecError, match="step"):
        space_around(spec, step=0)


def test_count_is_the_number_of_encodings() -> None:
    space = SearchSpace.from_dict(small())
    # first layer: 2 types × 2 kernels × widths 8, 16, 24, 32; two layers of widths 8, 16, 24, 32 or skip
    assert space.count() == (2 * 2 * 4) * (4 + 1) ** 2
    assert [len(layer.choices()) for layer in space.layers] == [16, 5, 5]
    seen = {space.sample(random.Random(i)) for i in range(6000)}
    assert len(seen) == space.count()


def test_prunet_gpu_is_as_large_as_its_choices_say() -> None:
    space = load_space("prunet_gpu")
    assert space.count() > 10**30
    first_irb = space.layers[4]  # 64 channels in, up to 8 × 64 hidden in steps of 32, kernels 3 and 5
    assert first_irb.widths == tuple(range(32, 513, 32))
    assert len(first_irb.choices()) == 2 * 16


def test_largest_and_smallest_fit_the_grid() -> None:
    for name in SPACES:
        space = load_space(name)
        for layer in space.layers:
            top = max((w for c in range(len(layer.candidates)) for w in layer.candidate_widths(c)), default=0)
            assert top <= 8 * layer.in_channels
        assert None not in space.largest()


def test_decode_refuses_what_a_layer_does_not_offer() -> None:
    space = SearchSpace.from_dict(small())
    good = space.largest()
    with pytest.raises(SpecError, match="has 3 choices, got 2"):
        space.decode(good[:2])
    with pytest.raises(SpecError, match=r"layer 0 \(stage 1\) cannot be skipped"):
        space.decode((None, *good[1:]))
    with pytest.raises(SpecError, match=r"layer 1 \(stage 1\) does not offer \(0, 9\)"):
        space.decode((good[0], (0, 9), good[2]))
    with pytest.raises(SpecError, match=r"does not offer \(7, 8\)"):
        space.decode((good[0], (7, 8), good[2]))
    with pytest.raises(SpecError, match=r"does not offer \(-1, 8\)"):
        space.decode((good[0], (-1, 8), good[2]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "search space is malformed: .*stem: Field required"),
        (small(stages=[]), "stages: .*at least 1"),
        (small([]), r"stages\[0\]\.layers: .*at least 1"),
        (small([{"hidden": {"step": 0}}]), r"stages\[0\]\.layers\[0\]\.hidden\.step: .*greater than or equal to 1"),
        (
            small([{"hidden": {"step": 8, "max_expansion": 0.5}}]),
            r"malformed: stages\[0\]\.layers\[0\]\.hidden: no multiple of step 8 between min 8 and 4",
        ),
        (
            small([{"hidden": {"step": 8}}, {"repeat": 2, "hidden": {"step": 4096}}]),
            r"malformed: stages\[0\]\.layers\[1\]\.hidden: no multiple of step 4096",
        ),
        (
            small(
                [{"hidden": {"step": 8, "max_expansion": 64}}],
                stem=[{"blocks": [{"type": "conv", "out_channels": 65536}]}],
            ),
            r"malformed: stages\[0\]\.layers\[0\]\.hidden\.max_expansion: 64 × 65536 .* at most 262144",
        ),
        (
            small([{"se_ratios": [0, 2.0], "hidden": {"step": 8}}]),
            r"malformed: stages\[0\]\.layers\[0\]\.se_ratios\[1\]: .*less than or equal to 1 \(given: 2\.0\)",
        ),
        (small([{"se_ratios": [-0.5], "hidden": {"step": 8}}]), r"layers\[0\]\.se_ratios\[0\]: .*greater"),
        (small([{"repeat": 64, "hidden": {"step": 8}}] * 5), r"malformed: stages\[0\]: .*320 layers.* at most 256"),
        (small(stem=[{"blocks": [{"type": "conv", "out_channels": 8}]}] * 65), r"malformed: stem: .*at most 64"),
        (
            small(stem=[{"blocks": [{"type": "conv", "out_channels": 8}]}] * 64),
            "malformed: the space's largest network is malformed: stages: .*at most 64",
        ),
        (
            small(stem=[{"blocks": [{"type": "conv", "out_channels": 8, "kernel_size": 15, "padding": 0}] * 4}]),
            "malformed: stem: input of 4×4 px is too small for a block with kernel 15",
        ),
        (small(num_classes="4"), r"num_classes: .*integer \(given: '4'\)"),
        (small([{"skip": 1, "hidden": {"step": 8}}]), r"layers\[0\]\.skip: .*boolean \(given: 1\)"),
        (small([{}]), "'hidden' .* is required for irb and fused_irb"),
        (
            small([{"kernel_sizes": [2], "hidden": {"step": 8}}]),
            r"kernel_sizes: kernel sizes must be odd, from 1 to 15",
        ),
        (small([{"kernel_sizes": [3, 3], "hidden": {"step": 8}}]), "kernel_sizes lists a value twice"),
        (
            small([{"hidden": {"step": 8}, "skip": True, "stride": 2}]),
            r"malformed: stages\[0\]\.layers\[0\]\.skip: skip needs stride 1 and equal channels",
        ),
        (
            small(
                [{"hidden": {"step": 8}, "skip": True}],
                stem=[{"blocks": [{"type": "conv", "out_channels": 16, "stride": 2}]}],
            ),
            r"stages\[0\]\.layers\[0\]\.skip: the first layer of a stage cannot be skipped",
        ),
        (
            small([{"types": ["conv"], "se_ratios": [0.25]}]),
            r"malformed: stages\[0\]\.layers\[0\]\.se_ratios: a conv layer has no squeeze-and-excite",
        ),
        (small(nam="x"), "nam: .*not permitted"),
    ],
)
def test_malformed_names_the_field(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        load_space(data)
    assert "spec:" not in str(caught.value)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown search space 'prunet_gp'; did you mean 'prunet_gpu'"):
        load_space("prunet_gp")
