"""What is to be measured: a network of this package or, as ``timm/NAME``, of timm."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import LatencyError, unknown_name
from prunet_zoo.latency.probes import randomise
from prunet_zoo.models import create_model
from prunet_zoo.models.pruned import (
    SPEC_FILE,
    WEIGHTS_FILE,
    PrunedSpec,
    build_pruned,
    is_pruned,
    is_pruned_file,
    load_pruned,
    load_pruned_spec,
)
from prunet_zoo.spec import NetSpec, Size, as_size, load_spec

Arch = str | Path | dict[str, Any] | NetSpec | PrunedSpec | nn.Module
TIMM = "timm/"
MAX_PARAMS_TOGETHER = 60_000_000  # networks in memory at a time; a backend may keep several copies


@dataclass(frozen=True)
class Subject:
    """A network ready to be prepared by a backend. ``spec``: None for a network of timm."""

    name: str
    spec: NetSpec | PrunedSpec | None
    module: nn.Module
    channels: int
    size: tuple[int, int]

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())


def find_arch(arch: str, with_weights: bool = True) -> str:
    """The weights file of ``prunet://NAME``, of a listed network whose spec lies in its weights, and of a search's work
    directory; any other name or path as it is. Not ``with_weights``: the listed name where there is one, and nothing is
    downloaded for it; the directory's spec.

    Raises:
        UnknownNameError, DownloadError: there is no such network, or its weights could not be brought.
        LatencyError: it is a detector, or a folder without a found network.
    """
    from prunet_zoo.zoo.download import download
    from prunet_zoo.zoo.index import find_model, is_zoo, load_index

    if not is_zoo(arch) and arch not in load_index() and Path(arch).is_dir():
        return _in_folder(Path(arch), with_weights)
    if not is_zoo(arch) and (arch not in load_index() or load_index()[arch].arch is not None):
        return arch
    entry = find_model(arch)
    if entry.task != "classification":
        raise LatencyError(
            f"{entry.name!r} is a detector, and classifiers are measured here; give one, or the spec of the detector's "
            "backbone"
        )
    return entry.arch if entry.arch is not None and not with_weights else str(download(entry.name))


def _in_folder(folder: Path, with_weights: bool) -> str:
    for name in ((WEIGHTS_FILE,) if with_weights else ()) + (SPEC_FILE,):
        if (folder / name).is_file():
            return str(folder / name)
    raise LatencyError(f"{folder} is a folder without {SPEC_FILE}; give a search's work directory, or a file")


def load_subject(arch: Arch, input_size: Size | None = None) -> Subject:
    """Build what `measure` takes as ``arch``; without weights, with random ones of ordinary scale.

    Args:
        arch: see `prunet_zoo.latency.measure`.
        input_size: one side or (H, W) in px; None takes the network's own (of timm's networks, the one that their
            published accuracy is for).

    Raises:
        LatencyError: a module without a spec.
        UnknownNameError, SpecError, CheckpointError: about ``arch`` or ``input_size``.
    """
    if isinstance(arch, str) and arch.startswith(TIMM):
        return _load_timm(arch, input_size)
    arch = find_arch(arch) if isinstance(arch, str) else arch
    spec, module = _network(arch)
    size = as_size(spec.input_size if input_size is None else input_size)
    if isinstance(spec, NetSpec):
        list(spec.placed(size))  # raises SpecError where the input is too small
    elif spec.timm is not None:
        spec.macs(size)  # likewise
    return Subject(spec.name, spec, module, spec.in_channels, size)


def _load_timm(arch: str, input_size: Size | None) -> Subject:
    import timm

    name = arch.removeprefix(TIMM)
    if not timm.is_model(name.partition(".")[0]):
        raise unknown_name("network of timm", name, timm.list_models())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _timm_network(name)
    cfg: Any = module.pretrained_cfg
    channels, *own = cfg.get("test_input_size") or cfg["input_size"]
    size = as_size(tuple(own) if input_size is None else input_size)
    subject = Subject(arch, None, randomise(module), channels, size)
    if size != tuple(own):
        _check_size(subject, (own[0], own[1]))
    return subject


def _timm_network(name: str) -> nn.Module:
    import timm

    base, _, tag = name.partition(".")
    try:
        return timm.create_model(name, pretrained=False)
    except RuntimeError:  # "Invalid pretrained tag"
        if not tag:
            raise
        raise unknown_name("network of timm", name, [base, *timm.list_models(f"{base}.*", pretrained=True)]) from None


def _check_size(subject: Subject, own: tuple[int, int]) -> None:
    """Raise `LatencyError` where a network of timm does not run at the size asked for, as many transformers do not."""
    height, width = subject.size
    try:
        with torch.inference_mode():
            copy.deepcopy(subject.module).eval()(torch.zeros(1, subject.channels, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:  # whatever the network checks by
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LatencyError(
            f"{subject.name} does not run on input of {height}×{width} px ({why}); "
            f"its own size is {own[0]}×{own[1]}: leave --input-size out"
        ) from error


def _network(arch: Arch) -> tuple[NetSpec | PrunedSpec, nn.Module]:
    if isinstance(arch, nn.Module):
        own = getattr(arch, "spec", None)
        if not isinstance(own, NetSpec | PrunedSpec):
            raise LatencyError(f"a module to be measured needs its NetSpec as .spec; {type(arch).__name__} has none")
        return own, arch
    if isinstance(arch, PrunedSpec) or is_pruned(arch) or (isinstance(arch, str | Path) and is_pruned_file(arch)):
        return _pruned(arch)
    if str(arch).endswith(".safetensors"):
        model = create_model(arch)
        return model.spec, model
    spec = load_spec(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec, randomise(create_model(spec))


def _pruned(arch: str | Path | dict[str, Any] | PrunedSpec | Any) -> tuple[PrunedSpec, nn.Module]:
    spec = load_pruned_spec(arch)
    if str(arch).endswith(".safetensors"):
        return spec, load_pruned(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec, randomise(build_pruned(spec))


def subject_groups(archs: Sequence[Arch | tuple[Arch, Size]], input_size: Size | None) -> Iterator[list[Subject]]:
    """The networks in order, built in groups that fit into memory together; a tuple names its own input size."""
    group: list[Subject] = []
    params = 0
    for arch in archs:
        subject = load_subject(*arch) if isinstance(arch, tuple) else load_subject(arch, input_size)
        if group and params + subject.params > MAX_PARAMS_TOGETHER:
            yield group
            group, params = [], 0
        group.append(subject)
        params += subject.params
    if group:
        yield group
