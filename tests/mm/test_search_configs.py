"""Every search config builds: model, strategy and cost exist and fit each other. Nothing is trained or measured."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from prunet_zoo import load_space, load_spec
from prunet_zoo.cost import MacsCost
from prunet_zoo.mm.latency_cost import make_cost
from prunet_zoo.mm.masked_model import MaskedClassifier
from prunet_zoo.mm.strategies import MODELS_OF, build_strategy, check_fit, check_model
from prunet_zoo.mm.supernet_model import SuperNetClassifier
from prunet_zoo.registry import MODELS
from prunet_zoo.space import space_around

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "search").glob("*.py"))
TYPES = {"tiered": "TieredPruning", "ddpnas": "DDPNAS", "pas": "PruningAsSearch", "archtree": "Archtree"}
DATA = {"digits": 10, "cifar10": 10, "imagenet": 1000}
LOADERS = ("train_dataloader", "train_cfg.arch_dataloader", "train_cfg.val_dataloader")


def parts(path: Path) -> tuple[str, str, str]:
    method, what, data = path.stem.split("_")
    return method, what, data


def test_every_method_has_a_config_for_each_data_set():
    assert {parts(path)[::2] for path in CONFIGS} == {(method, data) for method in TYPES for data in DATA}
    wanted = {"pas_rep-vgg-small_digits", "pas_rep-vgg-small_cifar10", "pas_rep-vgg-b1_imagenet"}
    assert wanted | {"pas_resnet50_imagenet", "archtree_resnet50_imagenet"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_its_name_says(path: Path):
    method, what, data = parts(path)
    cfg = Config.fromfile(path)
    about = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    assert f"configs/search/{path.name}" in about and len(path.read_text().splitlines()) <= 30
    if data == "imagenet":  # no recipe for it was run, and whose figures they are is said
        assert "not run at full size" in about and "ours" in about.lower()
    assert cfg.train_cfg.strategy.type == TYPES[method]
    assert cfg.model.type == MODELS_OF[TYPES[method]].__name__ and cfg.runner_type == "SuperNetRunner"
    named = cfg.model.get("space") or cfg.model.get("arch") or cfg.model.timm
    assert named.replace("_", "-") == what
    sets = [cfg.get(name.partition(".")[0]) if "." not in name else cfg.train_cfg[name[10:]] for name in LOADERS]
    kinds = {(s.dataset.type, s.dataset.transform.type, s.dataset.get("data_root")) for s in sets}
    folder = None if data == "digits" else f"data/{data}"
    wanted = {"digits": ("DigitsDataset", "digits"), "cifar10": ("ImageFolderDataset", "cifar")}
    assert kinds == {(*wanted.get(data, ("ImageFolderDataset", "imagenet")), folder)}
    assert [s.dataset.get("part") for s in sets] == ["weights", "arch", None]
    assert cfg.model.get("num_classes", 1000) == DATA[data]
    for scheduler in cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]:
        assert scheduler.get("end", scheduler.get("T_max")) <= cfg.train_cfg.max_epochs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_strategy_and_model_fit(path: Path):
    cfg = Config.fromfile(path)
    strategy = build_strategy(dict(cfg.train_cfg.strategy))
    check_model(cfg.model)
    kind = MODELS.get(cfg.model.type)
    assert kind in (SuperNetClassifier, MaskedClassifier)
    if cfg.model.get("timm"):
        check_timm(cfg, strategy)
        return
    if cfg.model.get("arch"):
        space = space_around(load_spec(cfg.model.arch), cfg.model.step)
        assert cfg.model.weights == f"prunet://{cfg.model.arch}"
    else:
        space = load_space(cfg.model.space)
    assert space.num_classes == cfg.model.get("num_classes", space.num_classes)
    target = cfg.train_cfg.strategy.get("target")
    if cfg.train_cfg.latency.get("type") == "macs":
        low = space.decode(
            tuple((c, la.candidate_widths(c)[0]) for la, (c, _) in zip(space.layers, space.largest(), strict=True))
        )  # type: ignore[misc]
        assert MacsCost()(low) < target < MacsCost()(space.decode(space.largest()))
    assert TYPES[parts(path)[0]] not in ("TieredPruning", "DDPNAS") or space.additive
    if space.input_size <= 32:  # the others are built by the tests of their spaces
        model = MODELS.build(dict(cfg.model))
        assert check_fit(strategy, model) is model


def check_timm(cfg: Config, strategy: Any) -> None:
    """Everything but timm's weights, which would be downloaded."""
    import timm

    assert timm.get_pretrained_cfg(cfg.model.timm).has_weights and cfg.model.pretrained and cfg.model.input_size == 224
    model = MODELS.build({**cfg.model, "pretrained": False})
    space: Any = model.searched.space
    assert (space.input_size, space.num_classes) == (224, cfg.model.get("num_classes", 1000))
    model.trained = True
    assert check_fit(strategy, model) is model
    cost = make_cost(space, "unused", "macs")
    low, high = (cost(space.decode(end)) for end in (space.smallest(), space.largest()))
    if cfg.train_cfg.latency.get("type") == "macs":
        assert low < cfg.train_cfg.strategy.target < high
    else:
        assert low < high


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "imagenet" in p.stem and p.stem.split("_")[0] in ("pas", "archtree")]
)
def test_what_starts_from_trained_weights_trains_no_network_first(path: Path):
    cfg = Config.fromfile(path)
    trained = bool(cfg.model.get("weights") or cfg.model.get("pretrained"))
    assert (cfg.train_cfg.strategy.pretrain == 0.0) is trained


def test_the_published_coefficients_are_on_our_scale():
    """α of the publication is for M in GMACs; ours is for M as a share of the start network's."""
    about: dict[str, tuple[float, float]] = {"pas_resnet50_imagenet": (5.0, 4.089)}
    space = load_space("rep_vgg_b1")
    about["pas_rep-vgg-b1_imagenet"] = (0.1, space.decode(space.largest()).macs() / 1e9)
    for name, (published, gmacs) in about.items():
        strategy: Any = Config.fromfile(ROOT / "configs" / "search" / f"{name}.py").train_cfg.strategy
        assert strategy.alpha == pytest.approx(published * gmacs**2, rel=0.05), name


def test_commands_in_the_configs_name_files_that_exist():
    for path in CONFIGS:
        for name in re.findall(r"(?:tools|configs)/[\w./-]+\.py", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
