"""Published checkpoints to ours: every tensor consumed, every shape checked; safetensors with the spec inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from prunet_zoo.errors import CheckpointError, few
from prunet_zoo.files import sha256_of
from prunet_zoo.metadata import read_metadata
from prunet_zoo.models import PruNetClassifier, save_weights
from prunet_zoo.models.weights import compare, shapes
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.zoo.archive import has_member
from prunet_zoo.zoo.checkpoint import read_checkpoint
from prunet_zoo.zoo.index import ModelEntry, find_model
from prunet_zoo.zoo.names import STAGES, published_names
from prunet_zoo.zoo.ready import archive_path
from prunet_zoo.zoo.records import read_record

_DDP = "module."
_COUNTER = ".num_batches_tracked"  # BatchNorm's; not in files of torch before 0.4.1
_HEAD = ("classifier.weight", "classifier.bias")


class _Network(NamedTuple):
    """A published network: what its checkpoint must hold."""

    spec: NetSpec
    published: dict[str, str]  # our name → published name
    shapes: dict[str, tuple[int, ...]]  # by our names, in our order


@cache
def _network(name: str) -> _Network:
    entry = find_model(name)
    if entry.name not in STAGES:
        raise CheckpointError(
            f"{entry.name!r} comes with prunet_zoo in its own format and needs no conversion; networks with published "
            f"weights: {', '.join(STAGES)}"
        )
    spec = load_spec(entry.arch or entry.name)
    with torch.device("meta"):
        state = PruNetClassifier(spec).state_dict()
    return _Network(spec, published_names(spec, STAGES[entry.name]), shapes(state))


def convert_checkpoint(
    source: str | Path,
    name: str,
    out: str | Path,
    *,
    published: bool = False,
    licence: str | None = None,
    origin: str | None = None,
) -> Path:
    """Convert a published (or a timm training's) checkpoint of a zoo network to safetensors in our names.

    The metadata holds the spec, name, licence, origin, preprocessing, and the source's file name and sha256. A
    fine-tuned head of another number of classes is taken, and its spec says so. ``out`` is replaced if it exists; on
    any error it stays as it was.

    The index's licence and origin are those of the published file only, with all classes: of the zip or the checkpoint
    in it under their published names, or of a file whose sha256 is listed or recorded. A safetensors file of ours keeps
    those that it tells. Weights from elsewhere have the licence that is given here, else none.

    Args:
        source: see `prunet_zoo.zoo.checkpoint.read_checkpoint`.
        name: of the network in the zoo.
        out: path of the new file, ending in ``.safetensors``.
        published: it is known to be the published file, whatever its name.
        licence: of the weights, such as ``Apache-2.0``.
        origin: where they are from, in words.

    Raises:
        UnknownNameError: no such network.
        CheckpointError: the file is damaged, hostile, or not of this network; or another licence is given for a
            published one.
        WriteError: ``out`` cannot be written.
    """
    entry, network, out = find_model(name), _network(name), Path(out)
    if out.suffix != ".safetensors":
        raise CheckpointError(f"the converted file must end in .safetensors (that is how it is recognised), got {out}")
    state = read_checkpoint(source, entry.weights.member)
    try:
        own = to_own_names(state, name)
        del state  # not needed while the file is written
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    spec = network.spec.replace(num_classes=len(own["classifier.bias"]))
    has_all_classes = spec.num_classes == network.spec.num_classes
    digest = sha256_of(Path(source))
    if has_all_classes and (published or _is_published(Path(source), digest, entry)):
        if licence or origin:
            raise CheckpointError(
                f"{source} is the published file of {entry.name!r} ({entry.weights.licence}; {entry.weights.origin}): "
                "leave out the licence and the origin"
            )
        licence, origin = entry.weights.licence, entry.weights.origin
    elif Path(source).suffix == ".safetensors":
        licence, origin = licence or _tells(source, "licence"), origin or _tells(source, "origin")
    save_weights(
        out,
        own,
        spec,
        name=entry.name,
        licence=licence,
        origin=origin or f"converted from {Path(source).name}, architecture {entry.arch}",
        preprocess=None if entry.preprocess is None else entry.preprocess.model_dump(mode="json"),
        classes=entry.classes if has_all_classes else None,
        source=Path(source).name.removesuffix(".part"),  # of a download that is not yet named
        source_sha256=digest,
    )
    return out


def _is_published(source: Path, digest: str, entry: ModelEntry) -> bool:
    """Whether a file is the published one, as far as can be told of one whose sha256 is not published."""
    recorded = read_record(archive_path(entry))
    if digest == entry.weights.sha256 or (recorded is not None and digest in recorded):
        return True
    if source.name == entry.weights.file:
        return has_member(source, entry.weights.member)
    return source.name == entry.weights.member


def _tells(source: str | Path, key: str) -> str | None:
    """What a safetensors file says of itself, where it is of ours; another's has no such key, or no JSON there."""
    try:
        value = json.loads(read_metadata(source).get(key, "null"))
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, str) else None


def to_own_names(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Rename the tensors of a published network to ours, strictly.

    Args:
        state: published names or our own, all of them with or without ``module.`` before them. The classifier may have
            another number of classes, if its weight and bias agree.
        name: of the network in the zoo.

    Returns:
        Copies in our names and order: float32, and BatchNorm's counters as int64 (0 where an old file has none).

    Raises:
        CheckpointError: something is missing, left over, of another shape or kind, or not finite; the first are named.
    """
    bare = _without_prefix(state)
    problems = _misfits(bare, name)
    if problems:
        fits = [other for other in STAGES if other != find_model(name).name and not _misfits(bare, other)]
        hint = f". They fit {fits[0]}: give that as the arch" if fits else ""
        raise CheckpointError(f"the tensors do not fit {name}: {'; '.join(problems)}{hint}")
    network = _network(name)
    given = _given_names(bare, network)
    own: dict[str, torch.Tensor] = {}
    for ours in network.shapes:
        if ours.endswith(_COUNTER):
            counter = bare.get(given[ours], torch.zeros((), dtype=torch.int64))
            own[ours] = counter.detach().to("cpu", torch.int64, copy=True)
        else:
            own[ours] = bare[given[ours]].detach().to("cpu", torch.float32, copy=True).contiguous()
    _check_values(own, given)
    return own


def _without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wrapped = bool(state) and all(key.startswith(_DDP) for key in state)
    return {key.removeprefix(_DDP) if wrapped else key: value for key, value in state.items()}


def _given_names(state: Mapping[str, torch.Tensor], network: _Network) -> dict[str, str]:
    """Our name → the name in ``state``, for the naming that has more names in common with it."""
    own = {ours: ours for ours in network.shapes}
    return max((network.published, own), key=lambda names: sum(n in state for n in names.values()))


def _misfits(state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """What keeps ``state`` from being of network ``name``; empty: it is."""
    network = _network(name)
    given = _given_names(state, network)
    own = {**network.shapes, **_head_shapes(state, given, network)}
    wanted = {n: own[ours] for ours, n in given.items()}
    missing, left_over, wrong = compare(wanted, shapes(state))
    missing = [n for n in missing if not n.endswith(_COUNTER)]  # ends so in both namings
    kinds = [n for ours, n in given.items() if n in state and not _is_kind(state[n], ours.endswith(_COUNTER))]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(given)} missing ({few(map(repr, missing))})")
    if left_over:
        problems.append(f"{len(left_over)} left over ({few(map(repr, sorted(left_over)))})")
    if wrong:
        shown = [f"{n!r} {list(state[n].shape)}, not {list(wanted[n])}" for n in wrong]
        problems.append(f"{len(wrong)} of another shape ({few(shown)})")
    if kinds:
        shown = [f"{n!r} {state[n].dtype}, {state[n].layout}, {state[n].device}" for n in kinds]
        problems.append(f"{len(kinds)} of another kind than plain numbers ({few(shown)})")
    return problems


def _head_shapes(
    state: Mapping[str, torch.Tensor], given: Mapping[str, str], network: _Network
) -> dict[str, tuple[int, ...]]:
    """Shapes of a classifier with the number of classes that its bias has; none if the bias is not one."""
    bias = state.get(given[_HEAD[1]])
    if bias is None or bias.dim() != 1 or not len(bias):
        return {}
    return {_HEAD[0]: (len(bias), network.spec.tail.features), _HEAD[1]: (len(bias),)}


def _is_kind(tensor: torch.Tensor, counter: bool) -> bool:
    """Whether a tensor holds plain numbers of the expected kind: floating point, or integers for a counter."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return False
    if counter:
        return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.is_floating_point()


def _check_values(own: Mapping[str, torch.Tensor], given: Mapping[str, str]) -> None:
    """Raise `CheckpointError` for values that would make every output NaN."""
    broken = [given[ours] for ours, value in own.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{len(broken)} tensors hold NaN or infinite values (as float32): {few(map(repr, broken))}"
        )
    negative = [given[ours] for ours, value in own.items() if ours.endswith("running_var") and (value < 0).any()]
    if negative:
        raise CheckpointError(f"{len(negative)} tensors hold negative variances: {few(map(repr, negative))}")
