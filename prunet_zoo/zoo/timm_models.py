"""The zoo's ImageNet networks as models of timm; importing this file registers them.

The networks are imported when one is made: this file may run in the middle of timm's own import, which ours wait for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

# not from timm.models: its names are not there yet where it is half imported
from timm.models._registry import generate_default_cfgs, register_model

from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.zoo.index import COLLECTIONS, ModelEntry, load_index

if TYPE_CHECKING:
    import torch
    from timm.models import PretrainedCfg

    from prunet_zoo.models import PruNetClassifier

__all__ = ["TAG", "default_cfgs"]  # timm adds the names of the networks

TAG = "nv_in1k"  # trained by NVIDIA on ImageNet-1k
FIRST_CONV, CLASSIFIER = "stages.0.0.conv.conv", "classifier"
_LEVELS = (0, 1, 2, 3, 4)  # strides 2 to 32, as timm's other networks give them; level 5 of PruNets has stride 64


def _cfg(entry: ModelEntry) -> dict[str, Any]:
    """What timm records of a network: weights, preprocessing, the layers that depend on channels and classes."""
    spec, preprocess = load_spec(entry.arch or entry.name), entry.preprocess
    assert preprocess is not None  # the index has it for every classifier
    size = (spec.in_channels, preprocess.input_size, preprocess.input_size)
    about = COLLECTIONS[entry.collection]
    return {
        "url": entry.weights.url,  # upstream's archive; what is loaded is `download`'s converted file
        "input_size": size,
        "test_input_size": size,
        "pool_size": list(spec.placed(preprocess.input_size))[-1].out_size,
        "crop_pct": preprocess.crop_pct,
        "test_crop_pct": preprocess.crop_pct,
        "crop_mode": preprocess.crop_mode,
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "num_classes": spec.num_classes,
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
        "license": entry.weights.licence.lower(),
        "origin_url": about.code,
        "paper_name": about.title,
        "paper_ids": f"arXiv:{about.arxiv}",
    }


def _create(entry: ModelEntry, pretrained: bool, **options: Any) -> torch.nn.Module:
    """Build the network of ``entry`` by timm's factory, with the zoo's weights unless the caller's cfg has others."""
    from timm.models import build_model_with_cfg, resolve_pretrained_cfg

    given = {key: options.pop(key, None) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
    cfg = resolve_pretrained_cfg(entry.name, **given)
    if pretrained and not _has_own_weights(cfg, entry):
        if options.get("cache_dir") is not None:
            raise CheckpointError(
                f"cache_dir={str(options['cache_dir'])!r} is not for the weights of {entry.name!r}: "
                "set the environment variable PRUNET_HOME to the folder where they shall lie"
            )
        from prunet_zoo.zoo.download import download

        cfg = dataclasses.replace(cfg, file=str(download(entry.name)))
    return build_model_with_cfg(
        partial(_build, load_spec(entry.arch or entry.name)),
        entry.name,
        pretrained,
        pretrained_cfg=cfg.to_dict(),
        pretrained_filter_fn=partial(_checked, entry.name),
        feature_cfg={"out_indices": _LEVELS, "feature_cls": "getter"},
        **options,
    )


def _has_own_weights(cfg: PretrainedCfg, entry: ModelEntry) -> bool:
    """Whether ``cfg`` says where to take weights from, other than the zoo's default."""
    other_url = cfg.url and cfg.url != entry.weights.url  # the default comes back with model.pretrained_cfg
    return bool(cfg.state_dict or cfg.file or cfg.hf_hub_id or other_url or cfg.source in ("hf-hub", "local-dir"))


def _build(
    spec: NetSpec, output_stride: int = 32, device: Any = None, dtype: torch.dtype | None = None, **options: Any
) -> PruNetClassifier:
    import torch

    from prunet_zoo.models import PruNetClassifier

    if output_stride not in (32, spec.feature_levels[-1].stride):
        strides = ", ".join(str(level.stride) for level in spec.feature_levels)
        raise SpecError(
            f"output_stride={output_stride} is not possible: strides are part of the architecture {spec.name!r}. "
            f"Use features_only=True with out_indices for maps of the strides {strides}"
        )
    with nullcontext() if device is None else torch.device(device):
        model = PruNetClassifier(spec, **options)
    # also for timm's checkpoint_path, which goes through load_state_dict alone
    model._register_load_state_dict_pre_hook(partial(_rename_published, spec.name))
    return model if dtype is None else model.to(dtype=dtype)


def _rename_published(name: str, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Give the tensors of a published checkpoint our names, in place (a hook before `load_state_dict`)."""
    from prunet_zoo.models.weights import is_published

    if not prefix and is_published(state):
        own = _own_names(state, name)
        state.clear()
        state.update(own)


def _own_names(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    from prunet_zoo.zoo.convert import to_own_names

    return to_own_names(state, name)


def _checked(name: str, state: dict[str, Any], model: PruNetClassifier) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in our names, all of them there and of the right shape.

    timm calls this before it fits the first convolution and the classifier to other channels and classes. It then loads
    without asking for every tensor, so that is asked here.

    Raises:
        CheckpointError: with the names of what is missing, left over, or of another shape.
    """
    from prunet_zoo.models.weights import compare, is_published
    from prunet_zoo.zoo.checkpoint import pick_state

    state = pick_state(state, "the checkpoint")
    state = _own_names(state, name) if is_published(state) else state
    wanted, found = _shapes(model.state_dict()), _shapes(state)
    misfit = compare(wanted, found)
    problems = [f"{key} is missing" for key in misfit.missing]
    problems += [f"{key} does not belong to it" for key in misfit.left_over]
    problems += [f"{key} has shape {found[key]}, not {wanted[key]}" for key in misfit.wrong]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"the checkpoint does not fit {name!r}: {'; '.join(problems[:4])}{more}")
    return state


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Shapes by name, without what timm fits to the model: the classifier, and the image channels."""
    shapes = {key: list(value.shape) for key, value in state.items() if not key.startswith(f"{CLASSIFIER}.")}
    if len(shapes.get(f"{FIRST_CONV}.weight", ())) == 4:
        shapes[f"{FIRST_CONV}.weight"][1] = 0
    return shapes


def _register(entry: ModelEntry) -> Callable[..., torch.nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return _create(entry, pretrained, **options)

    create.__name__ = create.__qualname__ = entry.name
    create.__doc__ = f"{entry.weights.origin}."
    return register_model(create)


_ENTRIES = [entry for entry in load_index().values() if entry.task == "classification" and entry.arch is not None]
default_cfgs = generate_default_cfgs({f"{entry.name}.{TAG}": _cfg(entry) for entry in _ENTRIES})
globals().update({entry.name: _register(entry) for entry in _ENTRIES})
