"""Conversion: every form that a checkpoint comes in, and nothing that does not fit exactly."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import NAMES, State, published
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from synthetic import random_state, saved, synthetic_state, training_checkpoint, write_zip

from prunet_zoo import create_model, load_spec
from prunet_zoo.errors import CheckpointError, UnknownNameError
from prunet_zoo.files import WriteError, sha256_of
from prunet_zoo.metadata import read_metadata
from prunet_zoo.models import load_state, read_weights_spec
from prunet_zoo.zoo.convert import convert_checkpoint, to_own_names
from prunet_zoo.zoo.index import find_model, load_index
from prunet_zoo.zoo.names import STAGES, published_names
from prunet_zoo.zoo.records import Recorded, write_record

NAME = "gpunet_0"  # the fewest tensors
HEAD = "network. layer15.net.6"


@pytest.fixture(scope="module")
def state() -> State:
    return synthetic_state(NAME)


@pytest.fixture(scope="module")
def own(state: State) -> State:
    return {ours: state[theirs] for ours, theirs in published_names(load_spec(NAME), STAGES[NAME]).items()}


@pytest.fixture(autouse=True)
def nothing_allowed_by_others() -> Iterator[None]:
    """Where MMEngine is installed, ``import prunet_zoo`` lets torch load more classes; here it must not help."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    yield
    assert torch.serialization.get_safe_globals() == []
    torch.serialization.add_safe_globals(before)


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def under_ddp(state: State) -> State:
    return {f"module.{k}": v for k, v in state.items()}


FORMS: dict[str, Callable[[State, State], Any]] = {
    "state dict": lambda state, own: state,
    "state dict under DDP": lambda state, own: under_ddp(state),
    "our names": lambda state, own: own,
    "our names under DDP": lambda state, own: under_ddp(own),
    "timm, averaged weights first": lambda state, own: training_checkpoint(state),
    "timm, numpy's numbers": lambda state, own: training_checkpoint(
        state, metric=np.float64(78.9), best=np.float32(1), epoch=np.int64(3), ok=np.bool_(True)
    ),
    "timm without averaged weights": lambda state, own: {"state_dict": state, "state_dict_ema": None, "epoch": 3},
    "key model": lambda state, own: {"model": under_ddp(state), "epoch": 3},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip format", "legacy format"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_torch_save(form: str, legacy: bool, state: State, own: State, tmp_path: Path) -> None:
    source = tmp_path / "any.name"
    source.write_bytes(saved(FORMS[form](state, own), legacy))
    assert same(load_state(convert_checkpoint(source, NAME, tmp_path / "out.safetensors")), dict(sorted(own.items())))


@pytest.mark.parametrize("form", ["state dict", "our names"])
def test_safetensors_are_taken(form: str, state: State, own: State, tmp_path: Path) -> None:
    source = tmp_path / "x.bin"
    source.write_bytes(safetensors_bytes(FORMS[form](state, own)))
    out = convert_checkpoint(source, NAME, tmp_path / "out.safetensors")
    assert same(load_state(out), dict(sorted(own.items())))
    again = convert_checkpoint(out, NAME, tmp_path / "again.safetensors")  # converting ours changes nothing
    assert same(load_state(again), load_state(out))


@pytest.mark.parametrize("content", ["legacy", "safetensors"])
def test_what_lies_in_the_zip_may_be_of_any_form(content: str, state: State, own: State, tmp_path: Path) -> None:
    source, data = tmp_path / "x.zip", saved(training_checkpoint(state), legacy=True)
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/notes.txt", "x")
        archive.writestr("folder/0.65ms.pth.tar", data if content == "legacy" else safetensors_bytes(own))
    out = convert_checkpoint(source, NAME, tmp_path / "new" / "folder" / "out.safetensors")
    assert same(load_state(out), dict(sorted(own.items())))


def metadata(path: Path) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in read_metadata(path).items() if key != "format"}


def test_metadata(state: State, tmp_path: Path) -> None:
    entry = find_model(NAME)
    source = write_zip(NAME, state, tmp_path / entry.weights.file)
    out = convert_checkpoint(source, NAME, tmp_path / "out.safetensors")
    meta = metadata(out)
    assert meta["name"] == NAME
    assert meta["licence"] == "Apache-2.0"
    assert "NVIDIA" in meta["origin"] and meta["origin"] == entry.weights.origin
    assert meta["source"] == entry.weights.file
    assert meta["source_sha256"] == sha256_of(source)
    assert meta["classes"] == "imagenet-1k"
    assert (meta["preprocess"]["input_size"], meta["preprocess"]["crop_pct"]) == (320, 1.0)
    assert read_weights_spec(out) == load_spec(NAME)
    assert convert_checkpoint(source, NAME, tmp_path / "b.safetensors").read_bytes() == out.read_bytes()


def test_only_the_published_file_has_the_published_licence(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name and member, by a recorded sha256, or because it was downloaded; and not with another head."""
    weights, out = find_model(NAME).weights, tmp_path / "out.safetensors"
    monkeypatch.setenv("PRUNET_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()

    def provenance(source: Path, **options: Any) -> tuple[str | None, str]:
        meta = metadata(convert_checkpoint(source, NAME, out, **options))
        return meta["licence"], meta["origin"]

    theirs = (weights.licence, weights.origin)
    right = write_zip(NAME, state, tmp_path / weights.file)
    mine = right.rename(tmp_path / "mine.zip")
    own = (None, "converted from mine.zip, architecture gpunet_0")
    assert provenance(mine) == own
    assert provenance(mine, published=True) == theirs
    assert provenance(mine, licence="MIT", origin="a run") == ("MIT", "a run")
    write_record(tmp_path / "home" / weights.file, Recorded("0" * 64))
    assert provenance(mine) == own
    write_record(tmp_path / "home" / weights.file, Recorded(sha256_of(mine)))
    assert provenance(mine) == theirs
    write_record(tmp_path / "home" / weights.file, Recorded("0" * 64))
    member = tmp_path / "bare.pth"
    member.write_bytes(saved(state))
    assert provenance(member)[0] is None
    write_record(tmp_path / "home" / weights.file, Recorded("0" * 64, sha256_of(member)))
    assert provenance(member) == theirs
    write_record(tmp_path / "home" / weights.file, Recorded("0" * 64))
    assert provenance(member.rename(tmp_path / str(weights.member))) == theirs
    with pytest.raises(CheckpointError, match=r"published file of 'gpunet_0' \(Apache-2\.0; .*leave out the licence"):
        provenance(tmp_path / str(weights.member), licence="MIT")
    kept = convert_checkpoint(mine, NAME, tmp_path / "kept.safetensors", licence="MIT", origin="a run")
    assert provenance(kept) == ("MIT", "a run")
    assert provenance(kept, licence="BSD-3-Clause") == ("BSD-3-Clause", "a run")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(safetensors_bytes(dict(state), {"licence": "not JSON"}))
    assert provenance(foreign)[0] is None
    named = tmp_path / weights.file
    with zipfile.ZipFile(named, "w") as archive:
        archive.writestr("another.pth", saved(state))
    assert provenance(named)[0] is None
    named.write_bytes(saved(state))
    assert provenance(named)[0] is None
    tuned = {**state, f"{HEAD}.weight": torch.randn(7, 1280), f"{HEAD}.bias": torch.randn(7)}
    assert provenance(write_zip(NAME, tuned, named))[0] is None
    assert provenance(named, published=True)[0] is None
    assert provenance(write_zip(NAME, state, named)) == theirs


def test_a_fine_tuned_head_is_taken_with_its_number_of_classes(state: State, tmp_path: Path) -> None:
    tuned = {**state, f"{HEAD}.weight": torch.randn(7, 1280), f"{HEAD}.bias": torch.randn(7)}
    (tmp_path / "x.pth").write_bytes(saved(tuned))
    out = convert_checkpoint(tmp_path / "x.pth", NAME, tmp_path / "out.safetensors")
    model = create_model(out)
    assert (model.num_classes, model.spec.num_classes) == (7, 7)
    assert torch.equal(model.classifier.bias, tuned[f"{HEAD}.bias"])
    with safe_open(str(out), framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) is None


@pytest.mark.parametrize(("rows", "biases"), [(7, 8), (1000, 7), (7, 1000), (0, 0)])
def test_a_head_that_disagrees_with_itself_is_refused(state: State, rows: int, biases: int) -> None:
    tuned = {**state, f"{HEAD}.weight": torch.randn(rows, 1280), f"{HEAD}.bias": torch.randn(biases)}
    with pytest.raises(CheckpointError, match=re.escape(f"'{HEAD}.weight' [{rows}, 1280], not [")):
        to_own_names(tuned, NAME)


def test_old_files_have_no_counters(state: State, own: State) -> None:
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    converted = to_own_names(old, NAME)
    assert list(converted) == list(own)
    for key, value in converted.items():
        assert torch.equal(value, torch.tensor(0) if key.endswith("num_batches_tracked") else own[key])


def test_kinds_are_unified(state: State, own: State) -> None:
    half = {k: v.half() if v.is_floating_point() else v.int() for k, v in state.items()}
    converted = to_own_names(half, NAME)
    assert {v.dtype for v in converted.values()} == {torch.float32, torch.int64}
    key = "classifier.weight"
    assert torch.equal(converted[key], own[key].half().float())
    parameters = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}
    converted = to_own_names(parameters, NAME)
    assert not any(v.requires_grad for v in converted.values())
    converted[key].zero_()  # a copy
    assert parameters[f"{HEAD}.weight"].abs().sum() > 0


@cache
def hollow(name: str) -> State:
    """Tensors of the published names and shapes that take no memory."""
    facts = published(name)["state_dict"]
    return {k: torch.zeros((), dtype=getattr(torch, kind)).expand(shape) for k, (kind, shape) in facts.items()}


names = st.sampled_from(sorted(NAMES))
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EXAMPLES
@given(names, st.data())
def test_a_dropped_tensor_is_named(name: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([k for k in hollow(name) if not k.endswith("num_batches_tracked")]))
    rest = {k: v for k, v in hollow(name).items() if k != key}
    with pytest.raises(CheckpointError, match=re.escape(f"1 of {len(rest) + 1} missing ({key!r})")):
        to_own_names(rest, name)


@EXAMPLES
@given(names, st.data(), st.sampled_from(["{}x", "x{}", "network.{}", " {}"]))
def test_a_renamed_tensor_is_named_twice(name: str, data: st.DataObject, pattern: str) -> None:
    key = data.draw(st.sampled_from([k for k in hollow(name) if not k.endswith("num_batches_tracked")]))
    other = pattern.format(key)
    renamed = {other if k == key else k: v for k, v in hollow(name).items()}
    with pytest.raises(CheckpointError) as caught:
        to_own_names(renamed, name)
    assert f"missing ({key!r})" in str(caught.value)
    assert f"1 left over ({other!r})" in str(caught.value)


@EXAMPLES
@given(names, st.data())
def test_a_tensor_too_many_is_named(name: str, data: st.DataObject) -> None:
    key = data.draw(st.text(min_size=1, max_size=40).filter(lambda k: k not in hollow(name)))
    with pytest.raises(CheckpointError, match=re.escape(f"1 left over ({key!r})")):
        to_own_names({**hollow(name), key: torch.zeros(1)}, name)


@EXAMPLES
@given(names, st.data())
def test_another_shape_is_named(name: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(hollow(name))))
    tensor = hollow(name)[key]
    reshaped = data.draw(
        st.sampled_from([tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.unsqueeze(-1).expand(*tensor.shape, 2)])
    )
    with pytest.raises(CheckpointError, match="1 of another shape") as caught:
        to_own_names({**hollow(name), key: reshaped}, name)
    assert repr(key) in str(caught.value)
    assert str(list(reshaped.shape)) in str(caught.value)


@EXAMPLES
@given(names, st.data())
def test_another_kind_is_named(name: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(hollow(name))))
    tensor = hollow(name)[key]
    kinds = (torch.bool, torch.complex64, torch.int32 if tensor.is_floating_point() else torch.float32)
    others = [torch.zeros((), dtype=kind).expand(tensor.shape) for kind in kinds]
    others.append(torch.empty(tensor.shape, device="meta"))
    with pytest.raises(CheckpointError, match="1 of another kind") as caught:
        to_own_names({**hollow(name), key: data.draw(st.sampled_from(others))}, name)
    assert repr(key) in str(caught.value)


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_values_that_are_not_finite_are_named(data: st.DataObject, value: float) -> None:
    key = data.draw(st.sampled_from([k for k, v in hollow(NAME).items() if v.is_floating_point()]))
    broken = hollow(NAME)[key].clone()
    broken.view(-1)[data.draw(st.integers(0, broken.numel() - 1))] = value
    with pytest.raises(
        CheckpointError, match=re.escape(f"1 tensors hold NaN or infinite values (as float32): {key!r}")
    ):
        to_own_names({**hollow(NAME), key: broken}, NAME)


def test_numbers_beyond_float32_and_negative_variances_are_named(state: State) -> None:
    key = f"{HEAD}.bias"
    with pytest.raises(CheckpointError, match=re.escape(repr(key))):
        to_own_names({**state, key: torch.full((1000,), 1e300, dtype=torch.float64)}, NAME)
    key = "network.head: 2.net.1.running_var"
    with pytest.raises(CheckpointError, match=re.escape(f"negative variances: {key!r}")):
        to_own_names({**state, key: -state[key]}, NAME)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_right_name_fits_and_another_is_told(name: str) -> None:
    for other in NAMES:
        if other != name:
            with pytest.raises(
                CheckpointError, match=rf"do not fit {other}: .* They fit {name}: give that as the arch"
            ):
                to_own_names(hollow(name), other)
    with pytest.raises(CheckpointError) as caught:
        to_own_names({"a": torch.zeros(1), "b": torch.zeros(1)}, name)
    assert "They fit" not in str(caught.value)
    assert "2 left over ('a', 'b')" in str(caught.value)


def test_mixed_names_are_refused(state: State, own: State) -> None:
    with pytest.raises(CheckpointError, match="2 left over"):
        to_own_names({**state, **dict(list(own.items())[:2])}, NAME)
    half = {k if i % 2 else f"module.{k}": v for i, (k, v) in enumerate(state.items())}
    with pytest.raises(CheckpointError, match="left over"):
        to_own_names(half, NAME)
    with pytest.raises(CheckpointError, match="missing"):
        to_own_names({}, NAME)


def test_names_without_published_weights() -> None:
    for name in set(load_index()) - set(NAMES):
        with pytest.raises(CheckpointError, match=f"{name}.* needs no conversion; .*prunet_p0"):
            to_own_names({}, name)
    with pytest.raises(UnknownNameError, match="did you mean 'gpunet_0'"):
        to_own_names({}, "gpunet0")


@pytest.fixture
def damaged(state: State, tmp_path: Path) -> Path:
    source = tmp_path / "source.pth"
    source.write_bytes(saved({k: v for k, v in state.items() if not k.startswith(HEAD)}))
    return source


def test_the_old_file_stays_on_an_error(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(
        CheckpointError, match=rf"source\.pth: the tensors do not fit gpunet_0: 2 of 184 missing \('{HEAD}"
    ):
        convert_checkpoint(damaged, NAME, out)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.pth"]


def test_where_the_result_may_go(state: State, tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(saved(state))
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        convert_checkpoint(source, NAME, tmp_path / "out.pth")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        convert_checkpoint(source, NAME, tmp_path / "folder.safetensors")
    with pytest.raises(WriteError, match="cannot write"):
        convert_checkpoint(source, NAME, source / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "source.pth"]


def test_random_states_are_not_degenerate() -> None:
    shapes = {"a.weight": (8, 4, 3, 3), "n.weight": (8,), "n.running_var": (8,), "n.bias": (8,)}
    state = random_state(shapes)
    assert all(float(v.std()) > 0 for v in state.values())
    assert float(state["n.running_var"].min()) < 0.05
