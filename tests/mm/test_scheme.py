"""prunet:// wherever MMEngine takes a checkpoint: every tensor arrives, or it is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmengine.runner.checkpoint import load_state_dict

import prunet_zoo
from prunet_zoo import save_weights
from prunet_zoo.errors import CheckpointError, UnknownNameError
from prunet_zoo.mm.backbone import PruNet
from prunet_zoo.mm.checks import check_pretrained
from prunet_zoo.mm.classifier import PruNetClassifier
from prunet_zoo.mm.cli import load_config
from prunet_zoo.mm.network import set_arch, set_weights
from prunet_zoo.mm.publish_config import write_config
from prunet_zoo.models import create_model, load_state
from prunet_zoo.zoo.fetch import DownloadError
from prunet_zoo.zoo.home import shared_folder
from prunet_zoo.zoo.index import load_index

ROOT = Path(__file__).resolve().parents[2]
P0 = "prunet://prunet_p0"
SCENES = ROOT / "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
QUIET = ["--cfg-options", "visualizer=None", "log_level=WARNING"]
DIGITS = tuple(str(i) for i in range(10))
State = dict[str, torch.Tensor]
RandomState = Callable[[torch.nn.Module], State]
pytestmark = pytest.mark.usefixtures("zoo_home")


@pytest.fixture(scope="module")
def p0(home: Path, random_state: RandomState) -> State:
    torch.manual_seed(5)
    model = create_model("prunet_p0")
    state = random_state(model)
    save_weights(home / "prunet_p0.safetensors", state, model.spec)
    return state


def retinanet(checkpoint: str = P0, prefix: str | None = None, backbone: dict[str, Any] | None = None) -> ConfigDict:
    init = {"type": "Pretrained", "checkpoint": checkpoint, **({} if prefix is None else {"prefix": prefix})}
    pairs = backbone or {"type": "PruNet", "arch": "prunet_p0", "out_indices": (1, 2, 3, 4)}
    text = "_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/default_runtime.py']"
    cfg = Config.fromstring(f"{text}\nmodel = dict(backbone=dict(_delete_=True, **{pairs!r}))", ".py")
    cfg.model.backbone.init_cfg = init
    return cfg.model


def build_detector(config: Any) -> torch.nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    return MODELS.build(config)


# ---- what is loaded


@pytest.mark.parametrize("map_location", [None, "cpu", torch.device("cpu"), lambda storage, place: storage])
def test_what_the_loader_gives(p0: State, map_location: Any) -> None:
    loaded = CheckpointLoader.load_checkpoint(P0, map_location=map_location)
    assert loaded["state_dict"].keys() == {f"backbone.{name}" for name in p0}
    assert all(torch.equal(loaded["state_dict"][f"backbone.{name}"], tensor) for name, tensor in p0.items())
    classes = loaded["meta"]["dataset_meta"]["classes"]
    assert len(classes) == 1000 and classes[1].startswith("goldfish")
    assert loaded["meta"]["prunet_zoo"]["licence"] == "Apache-2.0"


@pytest.mark.usefixtures("p0")
def test_map_location_is_kept() -> None:
    for location in ("meta", torch.device("meta")):
        state = CheckpointLoader.load_checkpoint(P0, map_location=location)["state_dict"]
        assert {tensor.device.type for tensor in state.values()} == {"meta"}


@pytest.mark.parametrize("prefix", [None, "backbone.", "backbone"])
def test_every_tensor_of_a_detectors_backbone(p0: State, prefix: str | None) -> None:
    detector = build_detector(retinanet(prefix=prefix))
    detector.init_weights()
    backbone = detector.backbone.state_dict()
    assert len(backbone) > 200 and all(torch.equal(tensor, p0[name]) for name, tensor in backbone.items())


def test_load_checkpoint_into_each_kind_of_model(p0: State) -> None:
    for config in ({"type": "PruNet"}, {"type": "PruNetClassifier"}, {"type": "PruNetClassifier", "num_classes": 7}):
        model = ROOT_MODELS.build({**config, "arch": "prunet_p0"})
        load_checkpoint(model, P0)
        net = getattr(model, "net", model)
        same = {name: torch.equal(t, p0[name]) for name, t in net.state_dict().items() if t.shape == p0[name].shape}
        assert all(same.values()) and len(same) == len(net.state_dict()) - 2 * ("num_classes" in config)
    detector = build_detector(retinanet())
    head = detector.bbox_head.retina_cls.weight.clone()
    load_checkpoint(detector, P0)
    assert all(torch.equal(tensor, p0[name]) for name, tensor in detector.backbone.state_dict().items())
    assert torch.equal(detector.bbox_head.retina_cls.weight, head)


def test_the_address_as_arch_brings_its_weights(p0: State, tiny: State) -> None:
    backbone = ROOT_MODELS.build({"type": "PruNet", "arch": P0, "out_indices": (1, 2)})
    backbone.init_weights()
    assert all(torch.equal(tensor, p0[name]) for name, tensor in backbone.state_dict().items())
    classifier = ROOT_MODELS.build({"type": "PruNetClassifier", "arch": "prunet://tiny"})
    assert all(torch.equal(tensor, tiny[name]) for name, tensor in classifier.net.state_dict().items())


@pytest.mark.parametrize("prefix", [None, "backbone", "backbone."])
def test_init_cfg_of_the_classifier(tiny: State, tiny_config: Path, prefix: str | None) -> None:
    init = {"type": "Pretrained", "checkpoint": "prunet://tiny", "prefix": prefix}
    arch = load_config(tiny_config).model.arch.to_dict()
    model = PruNetClassifier(arch, init_cfg=init)
    model.init_weights()
    assert all(torch.equal(tensor, tiny[name]) for name, tensor in model.net.state_dict().items())
    other = PruNetClassifier(arch, num_classes=3, init_cfg=init)
    other.init_weights()
    assert torch.equal(other.net.tail.conv.weight, tiny["tail.conv.weight"])
    with pytest.raises(CheckpointError, match=r"prunet://tiny.* 'neck\.'"):
        PruNetClassifier(arch, init_cfg={**init, "prefix": "neck"}).init_weights()


@pytest.mark.parametrize("prefix", ["net.", "backbone.", ""])
@pytest.mark.parametrize("load", ["torch", "mmengine", "copy"])
def test_names_that_the_classifier_takes(tiny: State, tiny_config: Path, prefix: str, load: str) -> None:
    model = PruNetClassifier(load_config(tiny_config).model.arch.to_dict())
    state = {prefix + name: tensor for name, tensor in tiny.items()}
    kept = dict(state)
    if load == "mmengine":
        load_state_dict(model, state, strict=True)
    else:
        model = copy.deepcopy(model) if load == "copy" else model
        model.load_state_dict(state)
    assert state == kept  # the caller's dict is not changed
    assert all(torch.equal(tensor, tiny[name]) for name, tensor in model.net.state_dict().items())
    with pytest.raises(CheckpointError, match="nothing in the checkpoint is for this PruNetClassifier"):
        model.load_state_dict({"neck.weight": torch.ones(1)}, strict=False)
    around = torch.nn.ModuleDict({"student": model})
    around.load_state_dict({f"student.{name}": tensor for name, tensor in state.items()})
    around.load_state_dict({}, strict=False)  # a part that a checkpoint does not have is the outer model's affair


def test_detector_of_the_zoo(
    tmp_path: Path, home: Path, list_model: Callable[..., None], random_state: RandomState
) -> None:
    """DetInferencer and init_detector get weights and class names, with a config or, where the file has it, without."""
    from mmdet.apis import DetInferencer, init_detector
    from PIL import Image

    names = tuple("abcdefghij")
    list_model("tiny_detector", task="detection", preprocess=None, classes=names)
    cfg = load_config(SCENES)
    set_arch(cfg, None)
    detector = build_detector(cfg.model)
    state = random_state(detector)
    spec = prunet_zoo.NetSpec.from_dict(cfg.model.backbone.arch.to_dict())
    save_weights(home / "tiny_detector.safetensors", state, spec, config_text=write_config(cfg))
    Image.new("RGB", (128, 128), "gray").save(tmp_path / "image.png")
    address = "prunet://tiny_detector"
    cfg.dump(str(tmp_path / "config.py"))
    for model in (str(tmp_path / "config.py"), None):
        inferencer = DetInferencer(model=model, weights=address, device="cpu", show_progress=False)
        assert inferencer.model.dataset_meta["classes"] == names
        assert all(torch.equal(tensor, state[name]) for name, tensor in inferencer.model.state_dict().items())
        found = inferencer(str(tmp_path / "image.png"), return_vis=True)
        assert set(found["predictions"][0]) >= {"bboxes", "labels", "scores"} and found["visualization"]
    cfg.test_dataloader.dataset.pop("ann_file")
    model = init_detector(cfg, address, palette="random", device="cpu")
    assert model.dataset_meta["classes"] == names
    backbone = PruNet(spec, out_indices=(2, 3), init_cfg={"type": "Pretrained", "checkpoint": address})
    backbone.init_weights()
    assert all(torch.equal(tensor, state[f"backbone.{n}"]) for n, tensor in backbone.state_dict().items())


def test_the_committed_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdet.apis import DetInferencer, init_detector

    state = load_state(shared_folder("checkpoints") / load_index()["digits_detector"].weights.file)
    config = str(shared_folder("configs") / load_index()["digits_detector"].config)
    assert config == str(SCENES)
    options: dict[str, Any] = {"weights": "prunet://digits_detector", "device": "cpu", "show_progress": False}
    made = [DetInferencer(model=model, **options).model for model in (config, None)]
    made.append(init_detector(config, "prunet://digits_detector", device="cpu"))
    for model in made:
        assert model.dataset_meta["classes"] == DIGITS
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---- what does not fit is an error


@pytest.mark.usefixtures("p0")
def test_a_prefix_that_matches_nothing() -> None:
    resnet = {"type": "ResNet", "depth": 18}
    with pytest.raises(CheckpointError, match=r"prunet_p0 fits with prefix 'neck\.'"):
        build_detector(retinanet(prefix="neck")).init_weights()
    with pytest.raises(CheckpointError, match=r"begins with the prefix 'neck\.'; they begin with backbone\."):
        build_detector(retinanet(prefix="neck.", backbone=resnet)).init_weights()
    init = {"type": "Pretrained", "checkpoint": P0, "prefix": "neck"}
    with pytest.raises(CheckpointError, match=r"neck\."):
        ROOT_MODELS.build({"type": "PruNet", "arch": "prunet_p0", "init_cfg": init}).init_weights()


@pytest.mark.usefixtures("p0")
@pytest.mark.parametrize("prefix", [None, "backbone."])
def test_a_foreign_backbone_takes_nothing(prefix: str | None) -> None:
    config = retinanet(prefix=prefix, backbone={"type": "ResNet", "depth": 18})
    with pytest.raises(CheckpointError, match=r"no tensor of prunet://prunet_p0 fits ResNet: .* type PruNet"):
        build_detector(config).init_weights()
    with pytest.raises(CheckpointError, match="fits RetinaNet"):
        load_checkpoint(build_detector(config), P0)
    with pytest.raises(CheckpointError, match="fits Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), P0)


@pytest.mark.usefixtures("p0")
def test_another_architecture_takes_nothing() -> None:
    detector = build_detector(retinanet(backbone={"type": "PruNet", "arch": "prunet_p1"}))
    for load in (detector.init_weights, lambda: load_checkpoint(detector, P0)):
        with pytest.raises(CheckpointError, match="prunet://prunet_p0"):
            load()
    for model in (PruNet("prunet_p1"), PruNetClassifier("gpunet_0")):
        with pytest.raises(CheckpointError, match="prunet://prunet_p0 is of another architecture"):
            load_checkpoint(model, P0)


@pytest.mark.usefixtures("p0")
def test_through_the_runner(tmp_path: Path) -> None:
    """init_cfg is applied when training begins, load_from too."""

    def train(model: Any, **options: Any) -> None:
        loader = {"batch_size": 8, "collate_fn": {"type": "default_collate"}, "dataset": {"type": "DigitsDataset"}}
        loader["sampler"] = {"type": "DefaultSampler", "shuffle": False}
        runner = Runner(
            model=model,
            work_dir=str(tmp_path),
            train_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            default_scope="mmdet",
            log_level="ERROR",
            experiment_name=f"scheme-{len(list(tmp_path.iterdir()))}",
            **options,
        )
        runner.train()

    build_detector(retinanet())  # registers mmdet's modules
    resnet = {"type": "ResNet", "depth": 18}
    with pytest.raises(CheckpointError, match=r"prefix 'neck\.'"):
        train(retinanet(prefix="neck."))
    with pytest.raises(CheckpointError, match=r"prefix 'neck\.'"):
        train(retinanet(prefix="neck.", backbone=resnet))
    model = retinanet(backbone=resnet)
    model.backbone.init_cfg = None
    with pytest.raises(CheckpointError, match="fits RetinaNet"):
        train(model, load_from=P0)


def test_other_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """MMEngine's loading stays as lenient as it is for what is not of the zoo."""
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    load_checkpoint(torch.nn.Linear(2, 2), str(tmp_path / "other.pth"))
    from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

    with pytest.raises(AssertionError):
        _load_checkpoint_with_prefix("neck.", str(tmp_path / "other.pth"))


# ---- names, and what cannot be downloaded


def loaders() -> list[Any]:
    init = {"type": "Pretrained", "checkpoint": "prunet://{}"}
    return [
        lambda a: load_checkpoint(torch.nn.Linear(2, 2), a),
        lambda a: PruNet("prunet_p0", init_cfg={**init, "checkpoint": a}).init_weights(),
        lambda a: PruNetClassifier("prunet_p0", init_cfg={**init, "checkpoint": a}).init_weights(),
        lambda a: build_detector(retinanet(checkpoint=a, backbone={"type": "ResNet", "depth": 18})).init_weights(),
        lambda a: check_pretrained({"backbone": {"init_cfg": {**init, "checkpoint": a}}}),
        lambda a: set_weights(Config({"model": {"type": "PruNetClassifier"}}), a),
    ]


@pytest.mark.parametrize("number", range(len(loaders())))
def test_unknown_names_and_offline(number: int) -> None:
    load = loaders()[number]
    with pytest.raises(UnknownNameError, match="did you mean 'prunet_p1' or 'prunet_p0'"):
        load("prunet://prunet_p2")
    with pytest.raises(DownloadError, match=r"^no address could be reached\nWithout a way to .*bring https://"):
        load("prunet://prunet_p1")
