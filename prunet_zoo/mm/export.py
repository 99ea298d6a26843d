"""What to export of a config or of a published detector: the whole network, with the neck, or the backbone alone.

Of a one-stage detector the whole is backbone, neck and the head's raw maps, as mmdet's ``mode='tensor'`` gives them;
decoding and NMS, which runtimes have in forms of their own, are left to them. `head` in the metadata is the head's
config, which tells how to decode.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from prunet_zoo.errors import PrunetError
from prunet_zoo.mm.backbone import plain
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.network import is_detection, register_mmdet, set_arch
from prunet_zoo.mm.predict import checkpoint_meta, detector_classes, preprocess_of
from prunet_zoo.mm.publish_config import parse_config
from prunet_zoo.mm.testing import look_into
from prunet_zoo.mm.training import load_strictly
from prunet_zoo.models.export import ExportError, Network, Scaling
from prunet_zoo.models.export.network import flat
from prunet_zoo.zoo.index import SCHEME, Preprocess, find_model
from prunet_zoo.zoo.predict import class_names, get_weights, read_meta

PARTS = ("whole", "neck", "backbone")


def config_network(
    config: str | Path,
    weights: str | None = None,
    arch: str | None = None,
    part: str = "whole",
    input_size: tuple[int, int] | None = None,
    options: dict[str, Any] | None = None,
) -> Network:
    """The network of a config.

    Args:
        config: of a classifier or a detector.
        weights: every tensor of its model: a run's ``.pth``, ``.safetensors``, ``prunet://NAME``. None: random.
        arch: another architecture in its place (``--arch``).
        part: of `PARTS`.
        input_size: H, W in px; None: what the config's test pipeline makes of an image.
        options: what to change in the config (``--cfg-options``).

    Raises:
        ConfigError, CheckpointError: with what to do. ExportError: the model has no such part, or none of one input.
    """
    cfg = load_config(config, options)
    if "model" not in cfg:
        raise ConfigError(f"{config} has no model")
    path = None if weights is None else get_weights(weights)
    known = None if weights is None else look_into(str(weights))
    detection = is_detection(cfg)
    takes_spec = not detection or "arch" in cfg.model.backbone
    set_arch(cfg, known.spec if arch is None and known is not None and takes_spec else arch)
    name = Path(config).stem
    if detection:
        return _detector(cfg, path, weights, name, part, input_size)
    if part != "whole":
        raise ExportError(f"--part {part} of a classifier: give its name, spec or weights file instead of the config")
    if known is not None and known.spec is not None:
        cfg.model.num_classes = known.spec.num_classes
    model = _build(cfg, path, weights)
    try:
        own: Preprocess | None = (known and known.preprocess) or preprocess_of(cfg)
    except PrunetError:  # a config without test data tells nothing of it, and needs none here
        own = None
    spec = model.net.spec
    about: dict[str, Any] = {"task": "classification", "arch": {"name": spec.name, "hash": spec.hash}}
    if own:
        about["preprocess"] = own.model_dump(mode="json")
    if known is not None and known.classes:
        about["classes"] = list(class_names(known.classes))
    return Network(
        module=model.net,
        name=name,
        input_size=input_size or (own.input_size if own else spec.input_size,) * 2,
        channels=spec.in_channels,
        outputs=("logits",),
        weights=weights,
        scaling=Scaling(tuple(255 * v for v in own.mean), tuple(255 * v for v in own.std)) if own else None,
        about=about,
    )


def detector_network(model: str, part: str = "whole", input_size: tuple[int, int] | None = None) -> Network:
    """A published detector: a name of the zoo, or a ``.safetensors`` file with its config inside.

    Raises:
        As `prunet_zoo.mm.predict.load_detector`; ExportError as `config_network`.
    """
    named = not model.endswith(".safetensors")
    name = find_model(model).name if named else Path(model).stem
    path = get_weights(SCHEME + name if named else model)
    meta = read_meta(path)
    if meta.get("task") != "detection" or "config_text" not in meta:
        raise ExportError(f"{path} is no published detector; give its config: CONFIG --weights {path}")
    cfg = parse_config(meta["config_text"])
    set_arch(cfg, None)
    return _detector(cfg, path, SCHEME + name if named else model, name, part, input_size, meta)


def _build(cfg: Config, path: Path | None, weights: str | None) -> Any:
    torch.manual_seed(0)  # random weights are the same each time
    if cfg.get("default_scope", "mmdet") == "mmdet" and is_detection(cfg):
        register_mmdet()
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        model = MODELS.build(cfg.model)
    if path is not None:
        load_strictly(model, path if weights is None or "://" not in weights else weights)
    return model.eval()


def _detector(
    cfg: Config,
    path: Path | None,
    weights: str | None,
    name: str,
    part: str,
    input_size: tuple[int, int] | None,
    meta: Mapping[str, Any] | None = None,
) -> Network:
    model = _build(cfg, path, weights)
    preprocessor = model.data_preprocessor
    divisor = int(getattr(preprocessor, "pad_size_divisor", 1))
    size = input_size or pipeline_size(cfg, divisor, name)
    _check_part(model, part, cfg, name)
    module = DetectorPart(model, part)
    strides, groups = module.describe(size)
    count = len(strides)
    names = groups and tuple(f"{group}_{i}" for group in groups for i in range(count))
    about: dict[str, Any] = {"task": "detection" if part == "whole" else part, "strides": strides}
    about["detector"] = type(model).__name__
    if part == "whole":
        about["head"], about["test_cfg"] = plain(cfg.model.bbox_head), plain(cfg.model.get("test_cfg"))
        about["classes"] = _classes(cfg, path, meta)
    scaling = _scaling(preprocessor)
    if scaling is not None:
        about["preprocess"] = {
            "mean": list(scaling.mean), "std": list(scaling.std), "order": "BGR" if scaling.bgr else "RGB",
            "pad_size_divisor": divisor, "pad_value": _pad_value(cfg, preprocessor, scaling),
        }  # fmt: skip
    return Network(
        module=module,
        name=name if part == "whole" else f"{name}_{part}",
        input_size=size,
        outputs=names or tuple(f"feature_{i}" for i in range(count)),
        weights=weights,
        scaling=scaling,
        about=about,
    )


class DetectorPart(nn.Module):
    """Backbone, backbone and neck, or these with the head's raw maps. (B, 3, H, W) → the maps, flat."""

    def __init__(self, model: Any, part: str) -> None:
        super().__init__()
        self.part = part
        self.backbone = model.backbone
        self.neck = model.neck if part != "backbone" and getattr(model, "with_neck", False) else None
        self.head = model.bbox_head if part == "whole" else None

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The maps before the head."""
        maps = self.backbone(x)
        return tuple(maps if self.neck is None else self.neck(maps))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.features(x)
        return flat(maps if self.head is None else self.head(maps))

    def describe(self, size: tuple[int, int]) -> tuple[list[int], tuple[str, ...]]:
        """Strides of the maps in px, and what the head's groups of maps are called (empty without a head).

        The names are those that the head's own ``predict_by_feat`` has for them, in the singular.
        """
        with torch.no_grad():
            try:
                maps = self.features(torch.zeros(1, 3, *size))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ExportError(
                    f"the network cannot be run on an input of {size[0]}×{size[1]} px: {reason}"
                ) from error
            groups = () if self.head is None else self.head(maps)
        strides = [2 ** round(torch.tensor(size[0] / m.shape[-2]).log2().item()) for m in maps]
        if self.head is None:
            return strides, ()
        known = list(inspect.signature(self.head.predict_by_feat).parameters)
        return strides, tuple(_singular(known[i]) for i in range(len(groups)))


def _singular(name: str) -> str:
    return name.removesuffix("es") if name.endswith("sses") else name.removesuffix("s")


def _check_part(model: Any, part: str, cfg: Config, name: str) -> None:
    """Raise `ExportError` where the model's whole is not maps of one input alone, or it has no neck."""
    from mmdet.models.detectors import SingleStageDetector

    if part == "neck" and not getattr(model, "with_neck", False):
        raise ExportError(f"{name} has no neck; give --part backbone")
    plain_head = isinstance(model, SingleStageDetector) and not hasattr(model, "mask_head")
    if part == "whole" and not plain_head:
        raise ExportError(
            f"{name} is a {type(model).__name__}: not a one-stage detector, whose whole is maps of each level. "
            "Give --part neck or --part backbone, and run what follows in PyTorch"
        )


def pipeline_size(cfg: Config, divisor: int, name: str) -> tuple[int, int]:
    """H and W in px that the test pipeline brings a landscape image to, padded as the detector pads.

    Raises:
        ExportError: it has no step that tells.
    """
    scales = [s["scale"] for s in _pipeline(cfg) if s.get("type", "").endswith("Resize") and "scale" in s]
    scale = scales[0] if scales else None
    if isinstance(scale, int):
        scale = (scale, scale)
    if not isinstance(scale, Sequence) or len(scale) != 2:
        raise ExportError(f"the test pipeline of {name} does not tell the size of its images; give --input-size H W")
    long, short = max(scale), min(scale)
    return -(-short // divisor) * divisor, -(-long // divisor) * divisor


def _scaling(preprocessor: Any) -> Scaling | None:
    normalizes = getattr(preprocessor, "_enable_normalize", None)
    if normalizes is None:  # a preprocessor of another kind
        return None
    mean, std = (0.0,) * 3, (1.0,) * 3  # such as YOLOX: images as they are loaded
    if normalizes:
        mean, std = (tuple(getattr(preprocessor, key).flatten().tolist()) for key in ("mean", "std"))
    return Scaling(mean, std, bgr=not getattr(preprocessor, "_channel_conversion", False))


def _pad_value(cfg: Config, preprocessor: Any, scaling: Scaling) -> float | list[float]:
    """What stands beside an image, after scaling: of the pipeline, which pads before it, or of the preprocessor."""
    pads = [step for step in _pipeline(cfg) if step.get("type", "").endswith("Pad")]
    if not pads:
        return getattr(preprocessor, "pad_value", 0)
    given = pads[0].get("pad_val", 0)
    given = given.get("img", 0) if isinstance(given, Mapping) else given
    raw = list(given) if isinstance(given, Sequence) else [given] * len(scaling.mean)
    if not scaling.bgr:
        raw.reverse()  # images are loaded as BGR
    values = [(value - mean) / std for value, mean, std in zip(raw, scaling.mean, scaling.std, strict=True)]
    return values[0] if len(set(values)) == 1 else values


def _pipeline(cfg: Config) -> Sequence[Any]:
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    return dataset.get("pipeline") or []


def _classes(cfg: Config, path: Path | None, meta: Mapping[str, Any] | None) -> list[str] | None:
    if meta is None:
        meta = {} if path is None else checkpoint_meta(path)
    try:
        return list(class_names(meta["classes"]) if meta.get("classes") else detector_classes(cfg, meta))
    except PrunetError:  # the config names none: the network has its outputs all the same
        return None
