"""``prunet://NAME`` and ``FILE.safetensors`` wherever MMEngine takes a checkpoint. Importing this registers them.

A classifier's tensors get ``backbone.`` before their names, as in mmpretrain's checkpoints, so that a detector takes
them by ``init_cfg=dict(type='Pretrained', checkpoint='prunet://prunet_p0', prefix='backbone.')``; a detector keeps its
own names. MMEngine loads without being strict, so weights that fit nowhere would be a line in the log and random
numbers in the network: our tensors carry where they are from, and where none of them fits it is an error.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mm_checkpoint
from torch import nn

from prunet_zoo.errors import CheckpointError, few
from prunet_zoo.metadata import read_metadata
from prunet_zoo.mm.interrupts import is_first
from prunet_zoo.models.weights import advise_published, compare, load_state, read_weights_spec, shapes
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.zoo.index import SCHEME, find_model, is_zoo

_ORIGIN = "_prunet_origin"  # attribute of a tensor: the address or file it was loaded from
_MARK = "_prunet_loud"
_FILE = r"(?!.*://).+\.safetensors$"  # MMEngine takes what it calls a prefix for a regular expression


def local_file(source: str | Path) -> str | Path:
    """The file behind ``prunet://NAME``, downloaded where it is not there yet; any other source as it is.

    Raises:
        UnknownNameError: no such model. DownloadError, CheckpointError: its weights cannot be got or are damaged.
    """
    if not is_zoo(source):
        return source
    from prunet_zoo.zoo.download import download

    # each process asks: the download locks its file, so that one fetches and the others wait, on every machine of a job
    return str(download(find_model(str(source)).name, progress=is_main_process() and is_first()))


def zoo_spec(source: str) -> NetSpec:
    """The architecture of ``prunet://NAME``; nothing is downloaded where the architecture is a listed one."""
    entry = find_model(source)
    if entry.arch is not None:
        return load_spec(entry.arch)
    return read_weights_spec(local_file(source))


@CheckpointLoader.register_scheme(prefixes=SCHEME, force=True)
def load_from_prunet(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a model of the zoo for MMEngine: ``state_dict``, and ``meta`` with the classes and where it is from.

    Args:
        filename: ``prunet://NAME``.
        map_location: as in `torch.load`.

    Raises:
        UnknownNameError, DownloadError, CheckpointError: as `local_file`.
    """
    entry = find_model(filename)
    about = {"name": entry.name, "licence": entry.weights.licence, "origin": entry.weights.origin}
    return _load(local_file(filename), filename, map_location, entry.classes, about)


@CheckpointLoader.register_scheme(prefixes=_FILE, force=True)
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a safetensors file for MMEngine: one of ours, which has its spec inside, as a model of the zoo is loaded;
    of any other the tensors as they are.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from prunet_zoo.zoo.predict import read_meta

    path = Path(filename).expanduser()
    if "spec" not in read_metadata(path):
        return {"state_dict": _mapped(load_state(path), map_location)}
    told = read_meta(path)
    about: dict[str, Any] = {key: told[key] for key in ("name", "licence", "origin") if key in told}
    return _load(path, filename, map_location, told.get("classes"), about)


def _load(
    path: str | Path, source: str, map_location: Any, classes: str | Sequence[str] | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """A file of ours as MMEngine wants it; ``source`` is what errors call it."""
    from prunet_zoo.zoo.predict import class_names, read_meta

    state = _mapped(load_state(path), map_location)
    if any(name.startswith("stages.") for name in state):  # of a classifier or a backbone, not of a detector
        state = {f"backbone.{name}": tensor for name, tensor in state.items()}
    for tensor in state.values():
        setattr(tensor, _ORIGIN, source)
    meta: dict[str, Any] = {"prunet_zoo": {**about, "file": str(path)}}
    if classes is not None:
        names = class_names(classes)
        meta["dataset_meta"] = {"classes": names}
        if "config_text" in (told := read_meta(path)):
            meta["cfg"] = _inference_config(told["config_text"], names)
    return {"state_dict": state, "meta": meta}


def _inference_config(text: str, classes: tuple[str, ...]) -> str:
    """The config in a detector's file with what mmdet's ``DetInferencer(weights=…)`` wants besides."""
    from prunet_zoo.mm.publish_config import parse_config

    cfg = parse_config(text)
    cfg.test_dataloader.dataset.update(type="CocoDataset", metainfo={"classes": classes})
    cfg.visualizer = {"type": "DetLocalVisualizer", "vis_backends": []}
    return str(cfg.pretty_text)


def _mapped(state: dict[str, torch.Tensor], map_location: Any) -> dict[str, torch.Tensor]:
    if map_location is None or isinstance(map_location, str | torch.device):
        return {name: tensor.to(map_location or "cpu") for name, tensor in state.items()}
    buffer = io.BytesIO()  # a function or a dict of devices: what torch.load makes of it
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, map_location=map_location, weights_only=True))


# ---- names that fit, or an error


def fit_names(state: MutableMapping[str, Any], prefix: str, net: nn.Module, own: str) -> None:
    """Rename the tensors of ``net`` in ``state``, in place, to what the module that holds it calls them.

    To be called first thing in ``_load_from_state_dict``, which both torch's and MMEngine's ``load_state_dict`` call.
    Our tensors must then be complete and of the right shapes; a head for another number of classes is not taken.

    Args:
        state: the state dict that is being loaded.
        prefix: where the module stands in the model; ``''`` is the model itself.
        net: the network whose names are meant.
        own: what the module puts before the network's names.

    Raises:
        CheckpointError: the module is the whole model and nothing in ``state`` is for it; or weights of ours are of
            another architecture.
    """
    wanted = net.state_dict()
    if not any(prefix + own + name in state for name in wanted):
        for other in ("backbone.", "net.", ""):
            found = [name for name in wanted if prefix + other + name in state]
            if found:
                renamed = {prefix + own + name: state.pop(prefix + other + name) for name in found}
                state.update(renamed)
                break
        else:
            if not prefix:
                raise CheckpointError(
                    f"nothing in the checkpoint{_of(state)} is for this {type(net).__name__}; it has {few(state)}, "
                    f"wanted {few(wanted)}, also with 'backbone.' or 'net.' before them{advise_published(state)}"
                )
            return
    origin = origin_of({name: state[prefix + own + name] for name in wanted if prefix + own + name in state})
    if origin is not None:
        _check_whole(state, prefix + own, wanted, origin)


def _check_whole(state: MutableMapping[str, Any], prefix: str, wanted: Mapping[str, torch.Tensor], origin: str) -> None:
    """Raise unless every wanted tensor is in ``state`` with its shape; put the model's own head where that differs."""
    there = {name: state[prefix + name] for name in wanted if prefix + name in state}
    missing, _, wrong = compare(shapes(wanted), shapes(there))
    head = [name for name in wrong if name.startswith("classifier.")]
    if missing or len(wrong) > len(head):
        first = next(name for name in [*missing, *wrong] if name not in head)
        raise CheckpointError(
            f"{origin} is of another architecture: it lacks {len(missing)} tensors of the network and has "
            f"{len(wrong) - len(head)} of another shape (the first: {first}); give the network its arch"
        )
    for name in head:
        state[prefix + name] = wanted[name].detach().clone()
    if head:
        have = wanted[head[0]].shape[0]
        print_log(f"the head of {origin} is for other classes: the model's own, for {have}, stays fresh", "current")


def origin_of(state: Mapping[str, Any]) -> str | None:
    """The address or file of ours that tensors of ``state`` were loaded from; None for others."""
    return next((getattr(t, _ORIGIN) for t in state.values() if hasattr(t, _ORIGIN)), None)


def _of(state: Mapping[str, Any]) -> str:
    origin = origin_of(state)
    return "" if origin is None else f" {origin}"


def install() -> None:
    """Let MMEngine's loading of our weights fail where none of them fits. Other checkpoints are left alone."""
    if not hasattr(mm_checkpoint.load_state_dict, _MARK):
        mm_checkpoint.load_state_dict = _loud(mm_checkpoint.load_state_dict)
        mm_checkpoint._load_checkpoint_with_prefix = _named_prefix(mm_checkpoint._load_checkpoint_with_prefix)


def _loud(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        origin = origin_of(state_dict)
        target: Any = module.module if is_model_wrapper(module) else module
        if origin is not None and not getattr(target, "fits_zoo_names", False):  # ours look for themselves
            own = target.state_dict()
            if not any(name in own and own[name].shape == tensor.shape for name, tensor in state_dict.items()):
                raise CheckpointError(
                    f"no tensor of {origin} fits {type(target).__name__}: it has {few(state_dict)}, the model has "
                    f"{few(own)}. Give the model (or its backbone) the type PruNet with the arch of these weights"
                )
        load(module, state_dict, *args, **kwargs)

    setattr(load_state_dict, _MARK, True)
    return load_state_dict


def _named_prefix(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(load)
    def load_with_prefix(prefix: str, filename: str, map_location: Any = None) -> dict[str, Any]:
        try:
            return load(prefix, filename, map_location=map_location)
        except AssertionError:  # MMEngine's: nothing begins so
            if not (is_zoo(filename) or re.match(_FILE, filename)):
                raise
            state = CheckpointLoader.load_checkpoint(filename, "cpu")["state_dict"]
            if origin_of(state) is None:  # not ours
                raise
            begin = sorted({name.partition(".")[0] + "." for name in state})
            raise CheckpointError(
                f"no tensor of {filename} begins with the prefix {prefix!r}; they begin with {' or '.join(begin)}"
            ) from None

    return load_with_prefix
