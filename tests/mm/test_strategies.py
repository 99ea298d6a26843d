"""Methods by name, the models that they search in, and what these are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from prunet_zoo import save_weights
from prunet_zoo.errors import CheckpointError, SpecError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.masked_model import MaskedClassifier
from prunet_zoo.mm.search_model import SearchModel
from prunet_zoo.mm.strategies import MODELS_OF, build_strategy, check_fit, check_model, check_start
from prunet_zoo.mm.supernet_model import SuperNetClassifier
from prunet_zoo.models import PrunedSpec, create_model
from prunet_zoo.search import MacsCost
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import load_spec

SPACE = {
    "name": "tiny",
    "input_size": 16,
    "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "stages": [{"out_channels": 12, "layers": [{"stride": 2, "kernel_sizes": [3], "hidden": {"step": 8}}]}],
    "tail": {"out_channels": 16},
    "num_classes": 4,
}


def model(kind: str = "MaskedClassifier", **options: Any) -> SearchModel:
    return MODELS.build(dict(type=kind, **{"space": SPACE, **options}))


@pytest.mark.parametrize("name", MODELS_OF)
def test_a_method_fits_its_own_model_and_no_other(name: str):
    strategy = build_strategy(dict(type=name, target=1.0))
    if hasattr(strategy, "pretrain"):
        strategy.pretrain = 0.3
    models = {cls: model(cls.__name__) for cls in (SuperNetClassifier, MaskedClassifier)}
    right = MODELS_OF[name]
    wrong = next(cls for cls in models if cls is not right)
    assert check_fit(strategy, models[right]) is models[right]
    with pytest.raises(ConfigError, match=rf"{name} searches in a {right.__name__}, .* is a {wrong.__name__}"):
        check_fit(strategy, models[wrong])
    with pytest.raises(ConfigError, match=r"a search needs model\.type=MaskedClassifier or SuperNetClassifier"):
        check_fit(strategy, torch.nn.Identity())


@pytest.mark.parametrize("name", ["PruningAsSearch", "Archtree"])
def test_pruning_of_an_untrained_network_is_refused(name: str, tmp_path: Path):
    strategy = build_strategy(dict(type=name, pretrain=0.0))
    with pytest.raises(ConfigError, match=f"{name} prunes a trained network, but the model has no weights"):
        check_fit(strategy, model())
    space = SearchSpace.from_dict(SPACE)
    spec = space.decode(space.largest())
    start = create_model(spec)
    save_weights(tmp_path / "start.safetensors", start.state_dict(), spec)
    given = model(weights=str(tmp_path / "start.safetensors"))
    check_fit(strategy, given)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(given.eval()(x), start.eval()(x))


def test_unknown_methods_and_arguments_are_named():
    with pytest.raises(ConfigError, match="did you mean 'Archtree'"):
        build_strategy(dict(type="Archtre"))
    with pytest.raises(ConfigError, match="does not take beams; Archtree takes beam"):
        build_strategy(dict(type="Archtree", beams=2))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Archtree", "beam", "abc"),
        ("Archtree", "beam", 2.5),
        ("Archtree", "beam", True),
        ("Archtree", "target", "abc"),
        ("Archtree", "measure_most", "2"),
        ("PruningAsSearch", "multiplier", 1),
        ("TieredPruning", "tau", [4.0]),
        ("DDPNAS", "update", "third"),
    ],
)
def test_arguments_of_another_type_are_named(name: str, field: str, value: Any):
    with pytest.raises(ConfigError, match=rf"train_cfg\.strategy\.{field}: .*, got ") as error:
        build_strategy(dict(type=name, **{field: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("MaskedClassifier", "options", 5),
        ("MaskedClassifier", "step", "8"),
        ("MaskedClassifier", "pretrained", 1),
        ("MaskedClassifier", "space", 5),
        ("SuperNetClassifier", "num_classes", "ten"),
        ("SuperNetClassifier", "label_smoothing", [0.1]),
    ],
)
def test_arguments_of_the_model_of_another_type_are_named(kind: str, field: str, value: Any):
    good = ConfigDict(type=kind, space=SPACE, num_classes=4, label_smoothing=0, data_preprocessor=dict(type="x"))
    check_model(good)
    check_model(dict(type="MaskedClassifier", timm="resnet18", options=ConfigDict(channels=[8, 8])))
    check_model(dict(type="MaskedClassifier", space=SearchSpace.from_dict(SPACE), start=[[0, 16]]))
    with pytest.raises(ConfigError, match=rf"model\.{field}: .*, got ") as error:
        check_model({**good, field: value})
    assert "\n" not in str(error.value)


def test_arguments_may_be_written_as_a_config_has_them():
    assert build_strategy(dict(type="TieredPruning", target=1, tau=[4, 1])).target == 1
    assert build_strategy(dict(type="Archtree", target=None, held_batches=None)).held_batches is None


@pytest.mark.parametrize(("name", "epochs"), [("PruningAsSearch", 1), ("Archtree", 1), ("Archtree", 5)])
def test_a_network_that_no_epoch_is_left_to_train_is_refused(name: str, epochs: int, tmp_path: Path):
    space = SearchSpace.from_dict(SPACE)
    spec = space.decode(space.largest())
    save_weights(tmp_path / "start.safetensors", create_model(spec).state_dict(), spec)
    given, fresh = model(weights=str(tmp_path / "start.safetensors")), model()
    for run, searched in ((epochs, given), (100, given), (100, fresh), (epochs, fresh)):
        strategy = build_strategy(dict(type=name, pretrain=0.1))
        strategy.setup(searched.masked, MacsCost(), run, 0, 8)
        if (run, searched) == (epochs, fresh):
            with pytest.raises(ConfigError, match=f"of {epochs} epochs none is left to train in first; give model.wei"):
                check_start(strategy, searched, run)
        else:
            check_start(strategy, searched, run)


def test_what_a_masked_network_is_made_from(tmp_path: Path):
    space = SearchSpace.from_dict(SPACE)
    start = space.decode([(0, 16)])
    assert model(start=start.to_dict()).masked.groups[0].channels == 16
    assert model(start=[[0, 24]], num_classes=7)(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    save_weights(tmp_path / "net.safetensors", create_model(start).state_dict(), start)
    around = model(space=None, arch=str(tmp_path / "net.safetensors"), num_classes=5)
    assert around.trained and around.masked.space.num_classes == 5 and around.masked.groups[0].widths[-1] == 16
    assert not model(space=None, arch=start.to_dict()).trained
    for options, words in (
        (dict(arch="prunet_p1"), "one of space, arch and timm, got space and arch"),
        (dict(space=None), "got none"),
        (dict(space=None, arch="prunet_p1", start=[[0, 8]]), "start is a network of space; with arch leave it out"),
        (dict(pretrained=True), "pretrained, input_size, .* go with timm"),
        (dict(space=None, timm="resnet18"), "timm needs input_size"),
        (dict(start=[[0, 9]]), "does not offer"),
    ):
        with pytest.raises(SpecError, match=words):
            model(**options)
    with pytest.raises(CheckpointError, match="does not fit"):
        model(weights=str(tmp_path / "net.safetensors"))


def test_a_cut_network_is_not_pruned_again(tmp_path: Path):
    cut = PrunedSpec.from_dict({"timm": "resnet18", "shapes": {"layer1.0.bn1": [32]}})
    (tmp_path / "spec.json").write_text(cut.to_json())
    save_weights(tmp_path / "cut.safetensors", {"x": torch.zeros(1)}, cut)
    options = dict(space=None, timm="resnet18", input_size=32, num_classes=4)
    for given in (
        dict(space=None, arch=str(tmp_path / "spec.json")),
        dict(space=None, arch=str(tmp_path / "cut.safetensors")),
        dict(space=None, arch=cut.to_dict()),
        dict(start=str(tmp_path / "spec.json")),
        dict(weights=str(tmp_path / "cut.safetensors")),
        dict(weights=str(tmp_path / "cut.safetensors"), **options),
    ):
        with pytest.raises(SpecError, match=r"of a cut network \(resnet18 .* cannot be pruned again") as error:
            model(**given)
        assert "\n" not in str(error.value)
    save_weights(tmp_path / "whole.safetensors", {"x": torch.zeros(1)}, cut.replace(shapes={}))
    with pytest.raises(CheckpointError, match="no tensor"):  # a whole network of timm; these tensors are none of its
        model(weights=str(tmp_path / "whole.safetensors"), **options)
    with pytest.raises(SpecError, match=r"tools/train\.py --arch \(classifiers and detectors\)"):
        load_spec(tmp_path / "spec.json")


def test_the_penalty_joins_the_loss_and_reaches_the_masks():
    from mmengine.optim import OptimWrapper

    given = model()
    weights = [p for p in given.parameters() if p is not given.masked.arch_parameters()[0]]
    wrapper = OptimWrapper(torch.optim.SGD(weights, lr=0.1))
    batch = {"inputs": torch.randn(4, 3, 16, 16), "label": torch.arange(4)}
    plain = given.train_step(batch, wrapper)
    assert "penalty_loss" not in plain
    (mask,) = given.masked.arch_parameters()
    mask.grad = None
    given.penalty = lambda: 5 * mask.sum()
    kept = weights[0].detach().clone()
    logged = given.train_step(batch, wrapper)
    assert float(logged["penalty_loss"].detach()) == 5 * len(mask) and float(logged["loss"].detach()) < 5
    assert mask.grad is not None and mask.grad.mean() > 2 and not torch.equal(kept, weights[0])


@pytest.mark.parametrize("name", MODELS_OF)
def test_gradients_of_the_masks_are_averaged_for_the_method_that_learns_them_with_the_weights(name: str, monkeypatch):
    from mmengine.optim import OptimWrapper

    from prunet_zoo.mm import search_model

    assert build_strategy(dict(type=name, target=1.0)).arch_in_weight_step is (name == "PruningAsSearch")
    given, seen = model(), []
    monkeypatch.setattr(search_model, "average_gradients", lambda parameters: seen.append(list(parameters)))
    (mask,) = given.masked.arch_parameters()
    wrapper = OptimWrapper(torch.optim.SGD([p for p in given.parameters() if p is not mask], lr=0.1))
    given.arch_in_weight_step = name == "PruningAsSearch"
    given.train_step({"inputs": torch.randn(4, 3, 16, 16), "label": torch.arange(4)}, wrapper)
    assert any(p is mask for p in seen[0]) is (name == "PruningAsSearch")
