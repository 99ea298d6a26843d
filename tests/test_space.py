"""SearchSpace: every encoding is a network of the space and comes back; malformed spaces name the field."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo import SearchSpace, list_spaces, load_space, load_spec
from prunet_zoo.errors import SpecError, UnknownNameError

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
    assert {"prunet_gpu", "prunet_cpu_small"} <= set(SPACES)
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
    golden = {"prunet_cpu_small": "1e29998de6ed", "prunet_gpu": "e91726d28e06"}
    assert {name: load_space(name).hash for name in golden} == golden


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
