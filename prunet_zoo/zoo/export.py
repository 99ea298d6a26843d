"""What to export of an architecture: the zoo's networks, specs, weights files, and timm's networks (``timm/NAME``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prunet_zoo.errors import PrunetError, unknown_name
from prunet_zoo.models import PruNetBackbone, load_weights
from prunet_zoo.models.export import ExportError, Network, Scaling
from prunet_zoo.models.pruned import is_pruned_file, load_pruned, load_pruned_spec
from prunet_zoo.zoo.create import create_model
from prunet_zoo.zoo.index import Preprocess, is_zoo, load_index
from prunet_zoo.zoo.predict import class_names, get_weights, told

TIMM = "timm/"
LEVELS = (1, 2, 3, 4)  # strides 4, 8, 16 and 32, as detectors take them


def classifier_network(
    arch: str,
    weights: str | None = None,
    pretrained: bool = False,
    backbone: bool = False,
    out_indices: Sequence[int] | None = None,
    input_size: tuple[int, int] | None = None,
) -> Network:
    """A classifier, or its backbone, as it is exported.

    Args:
        arch: a listed name; ``prunet://NAME`` or a ``.safetensors`` file (with their weights); a spec's ``.json``; or
            ``timm/NAME``. A spec may be that of a network with channels taken out, see `PrunedSpec`.
        weights: a file with the network's weights; None and not ``pretrained``: random.
        pretrained: published weights.
        backbone: the feature maps instead of the logits.
        out_indices: feature levels of a backbone by stride: 0 is stride 2, 1 is stride 4, …; None: those of `LEVELS`
            that there are. For timm's networks the numbers are timm's.
        input_size: H, W in px; None: what the network was trained or designed for; of timm's networks, what they are
            tested at, as `prunet_zoo.latency.measure` takes it.

    Raises:
        UnknownNameError, SpecError, CheckpointError, DownloadError: as `create_model`.
        ExportError: options that do not go together.
    """
    if weights is not None and (pretrained or is_zoo(arch) or arch.endswith(".safetensors")):
        raise ExportError(
            f"{arch} is to have two kinds of weights; give --weights FILE with a name or a spec, or neither"
        )
    torch.manual_seed(0)  # random weights are the same each time
    if arch.startswith(TIMM):
        return _timm_network(arch.removeprefix(TIMM), weights, pretrained, backbone, out_indices, input_size)
    if is_pruned_file(arch):
        return _pruned_network(arch, weights, pretrained or backbone, input_size)
    model = create_model(arch, pretrained=pretrained)
    source = arch if is_zoo(arch) or arch.endswith(".safetensors") else f"prunet://{arch}" if pretrained else None
    if weights is not None:
        path = get_weights(weights)
        load_weights(model, path)
        source = str(weights)
    name, about, preprocess = _known(arch, weights)
    size = input_size or ((preprocess.input_size,) * 2 if preprocess else (model.spec.input_size,) * 2)
    network = Network(
        module=model.eval(),
        name=name or model.spec.name,
        input_size=size,
        channels=model.in_chans,
        outputs=("logits",) if model.num_classes else ("features",),
        weights=source,
        scaling=_scaling(preprocess.mean, preprocess.std) if preprocess else None,
        about={"task": "classification", **about, "arch": {"name": model.spec.name, "hash": model.spec.hash}},
    )
    if not backbone:
        return network
    found = model.spec.feature_levels
    chosen = tuple(out_indices) if out_indices is not None else tuple(i for i in LEVELS if i < len(found))
    network.module = PruNetBackbone(model.spec, chosen).eval()
    load_weights(network.module, model.state_dict())
    return _as_backbone(network, [found[i].stride for i in chosen])


def _pruned_network(arch: str, weights: str | None, refused: bool, input_size: tuple[int, int] | None) -> Network:
    """The classifier of a `PrunedSpec`, as it is exported."""
    if refused:
        raise ExportError(f"{arch} is a pruned network: give --weights FILE instead of --pretrained, and no --part")
    spec = load_pruned_spec(arch)
    model = load_pruned(arch, None if weights is None else get_weights(weights))
    name, about, preprocess = _known(arch, weights)
    return Network(
        module=model.eval(),
        name=name or spec.name,
        input_size=input_size or ((preprocess.input_size if preprocess else spec.input_size),) * 2,
        channels=spec.in_channels,
        outputs=("logits",) if spec.num_classes else ("features",),
        weights=arch if arch.endswith(".safetensors") else weights,
        scaling=_scaling(preprocess.mean, preprocess.std) if preprocess else None,
        about={"task": "classification", **about, "arch": {"name": spec.name, "hash": spec.hash}},
    )


def _known(arch: str, weights: str | None) -> tuple[str | None, dict[str, Any], Preprocess | None]:
    """Name, classes and preprocessing, from the weights file or from the zoo's index."""
    file = weights or arch
    name = arch.removeprefix("prunet://")
    entry = load_index().get(name) if not arch.endswith((".safetensors", ".json")) else None
    known = told(file) if file.endswith(".safetensors") and Path(file).is_file() else None
    preprocess = known.preprocess if known else None
    classes = known.classes if known else None
    if entry is not None:
        preprocess = preprocess or entry.preprocess
        classes = classes or (entry.classes if weights is None else None)
    about: dict[str, Any] = {}
    if preprocess:
        about["preprocess"] = preprocess.model_dump(mode="json")
    if classes:
        about["classes"] = list(class_names(classes))
    own = known.name if known is not None and weights is None else None
    return (entry.name if entry is not None else own), about, preprocess


def _timm_network(
    name: str,
    weights: str | None,
    pretrained: bool,
    backbone: bool,
    out_indices: Sequence[int] | None,
    input_size: tuple[int, int] | None,
) -> Network:
    import timm

    if not timm.is_model(name):
        raise unknown_name("network of timm", name.partition(".")[0], timm.list_models())
    if weights is not None and backbone:
        raise ExportError("--weights of a network of timm are those of the whole network; leave out --part backbone")
    options: dict[str, Any] = {"pretrained": pretrained}
    if weights is not None:
        options["checkpoint_path"] = str(get_weights(weights))
    if backbone:
        options.update(features_only=True, **({} if out_indices is None else {"out_indices": tuple(out_indices)}))
    try:
        model: Any = timm.create_model(name, **options)
    except PrunetError:
        raise
    except Exception as error:  # no network, a name without weights, a file of another network, wrong indices
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExportError(f"timm cannot make {name} with these options: {reason}") from error
    cfg: Mapping[str, Any] = timm.data.resolve_model_data_config(model, use_test_size=True)
    keys = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    channels, *size = cfg["input_size"]
    preprocess = {"input_size": size[0], **{key: cfg[key] for key in keys}}
    classes = getattr(model, "num_classes", 0)
    network = Network(
        module=model.eval(),
        name=name,
        input_size=input_size or (size[0], size[1]),
        channels=channels,
        outputs=("logits",) if classes else ("features",),
        weights=str(weights) if weights else f"{TIMM}{name}" if pretrained else None,
        scaling=_scaling(cfg["mean"], cfg["std"]),
        about={"task": "classification", "preprocess": preprocess, "arch": {"name": f"{TIMM}{name}"}},
    )
    return _as_backbone(network, model.feature_info.reduction()) if backbone else network


def _as_backbone(network: Network, strides: Sequence[int]) -> Network:
    about = {key: value for key, value in network.about.items() if key != "classes"}
    network.about = {**about, "task": "backbone", "strides": list(strides)}
    network.outputs = tuple(f"feature_{i}" for i in range(len(strides)))
    return network


def _scaling(mean: Sequence[float], std: Sequence[float]) -> Scaling:
    return Scaling(tuple(255 * value for value in mean), tuple(255 * value for value in std))
