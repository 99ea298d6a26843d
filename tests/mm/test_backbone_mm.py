"""PruNet as an MMEngine backbone: registration, mmdet's arguments, strict weights, channels of the neck."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS

import prunet_zoo
from prunet_zoo.errors import CheckpointError, PrunetError, SpecError
from prunet_zoo.mm.backbone import PruNet
from prunet_zoo.mm.channels import follow_spec
from prunet_zoo.registry import MODELS

TINY = {
    "name": "tiny",
    "input_size": 64,
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]},
        {"blocks": [{"type": "fused_irb", "out_channels": 12, "stride": 2, "hidden": 16}]},
        {"blocks": [{"type": "irb", "out_channels": 16, "stride": 2, "hidden": 24, "se_ratio": 0.25}]},
        {
            "blocks": [
                {"type": "irb", "out_channels": 24, "stride": 2, "hidden": 32},
                {"type": "irb", "out_channels": 24, "hidden": 40, "act": "silu"},
            ]
        },
    ],
    "tail": {"out_channels": 32},
    "num_classes": 10,
}


@pytest.mark.parametrize("kind", ["PruNet", "prunet_zoo.PruNet", PruNet])
def test_registered_in_the_root_and_in_our_scope(kind) -> None:
    config = ConfigDict(type=kind, arch=TINY, out_indices=(1, 3), init_cfg=None)
    kept = copy.deepcopy(config)
    backbone = ROOT_MODELS.build(config)
    assert config == kept
    backbone.init_weights()
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert isinstance(maps, tuple)
    assert [tuple(m.shape) for m in maps] == [(2, 12, 16, 16), (2, 24, 4, 4)]
    assert [f["reduction"] for f in backbone.feature_info] == [4, 16]


def test_rep_blocks_are_deployed_and_keep_to_their_form() -> None:
    arch = {
        **TINY,
        "stages": [
            {"blocks": [{"type": "rep", "out_channels": 8, "stride": 2}]},
            {"blocks": [{"type": "rep", "out_channels": 12, "stride": 2}, {"type": "rep", "out_channels": 12}]},
        ],
    }
    torch.manual_seed(0)
    backbone = ROOT_MODELS.build(dict(type="PruNet", arch=arch, out_indices=(0, 1), norm_eval=True)).eval()
    backbone.init_weights()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(x)
        trained = copy.deepcopy(backbone.state_dict())
        assert backbone.switch_to_deploy() is backbone
        for mine, wanted in zip(backbone.train()(x), maps, strict=True):
            assert torch.allclose(mine, wanted, atol=1e-4)
    deployed = backbone.state_dict()
    assert len(deployed) == 2 * 3
    for prefix in ("", "backbone."):
        for net, state, message in (
            (PruNet(arch, out_indices=(0, 1)), deployed, r"call switch_to_deploy\(\)"),
            (backbone, trained, "load them into a fresh network"),
        ):
            with pytest.raises(CheckpointError, match=message):
                net.load_state_dict({prefix + name: tensor for name, tensor in state.items()})


def test_weights_of_another_network_of_the_zoo_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after changing arch, but not the checkpoint of a config."""
    held = prunet_zoo.create_model("prunet_p0").state_dict()
    monkeypatch.setattr("prunet_zoo.mm.backbone.read_state", lambda checkpoint: held)

    def load(arch: str, checkpoint: str) -> None:
        PruNet(arch, init_cfg={"type": "Pretrained", "checkpoint": checkpoint}).init_weights()

    told = (
        r"prunet://prunet_p0 holds prunet_p0, the network is gpunet_0: change init_cfg.checkpoint too \(.*(lacks|fit)"
    )
    with pytest.raises(CheckpointError, match=told):
        load("gpunet_0", "prunet://prunet_p0")
    for checkpoint in ("p0.pth", "prunet://gpunet_0"):  # the latter: its own name, so the file is at fault
        with pytest.raises(CheckpointError, match=rf"^{checkpoint} (lacks|does not fit)"):
            load("gpunet_0", checkpoint)
    load("prunet_p0", "prunet://prunet_p0")


@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (1, 2, 3)])
def test_no_unused_parameters(out_indices) -> None:
    backbone = PruNet(TINY, out_indices=out_indices)
    sum(m.sum() for m in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_with_cp_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain, recomputing = PruNet(TINY, (1, 2, 3)), PruNet(TINY, (1, 2, 3), with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 64, 64)
    for backbone in (plain, recomputing):
        sum((m**2).mean() for m in backbone.train()(image)).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(("frozen", "prefixes"), [(-1, ()), (0, ("stages.0",)), (1, ("stages.0", "stages.1"))])
def test_frozen_stages(frozen: int, prefixes: tuple[str, ...]) -> None:
    backbone = PruNet(TINY, (1, 2, 3), frozen_stages=frozen).train()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    statistics = {n: b.clone() for n, b in backbone.named_buffers() if n.endswith("running_mean")}
    backbone(torch.rand(2, 3, 64, 64))
    for name, buffer in backbone.named_buffers():
        if name in statistics:
            assert torch.equal(buffer, statistics[name]) == name.startswith(prefixes), name


def test_norm_eval_and_norm_cfg() -> None:
    norms = (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)
    backbone = PruNet(TINY, (1, 2, 3), norm_eval=True).train()
    assert not any(m.training for m in backbone.modules() if isinstance(m, norms))
    assert backbone.training
    synced = PruNet(TINY, (1, 2, 3), norm_cfg={"type": "SyncBN", "requires_grad": False})
    found = [m for m in synced.modules() if isinstance(m, norms)]
    assert found and all(isinstance(m, torch.nn.SyncBatchNorm) and m.eps == 1e-3 for m in found)
    assert not any(p.requires_grad for m in found for p in m.parameters())
    grouped = PruNet(TINY, (1, 2, 3), norm_cfg={"type": "GN", "num_groups": 4})
    assert not any(isinstance(m, norms) for m in grouped.modules())
    grouped(torch.rand(1, 3, 64, 64))


def classifier_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = prunet_zoo.create_model(TINY)
    for buffer in model.buffers():  # statistics that differ from a fresh network's
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.state_dict()


@pytest.mark.parametrize(
    ("prefix", "wrapped", "given"),
    [("", False, None), ("net.", True, None), ("backbone.", True, None), ("net.", True, "net"), ("a.b.", True, "a.b.")],
)
def test_every_tensor_arrives(tmp_path: Path, prefix: str, wrapped: bool, given: str | None) -> None:
    state = {prefix + name: tensor for name, tensor in classifier_state().items()}
    path = tmp_path / "w.pth"
    hub = {"log_scalars": {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}}  # as in a run's checkpoint
    torch.save({"state_dict": state, "meta": {"epoch": 3}, "message_hub": hub} if wrapped else state, path)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": given}
    backbone = ROOT_MODELS.build({"type": "PruNet", "arch": TINY, "out_indices": (1, 2), "init_cfg": init_cfg})
    backbone.init_weights()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[prefix + name]), name
    assert backbone.init_cfg["checkpoint"] == str(path)


def test_safetensors_arrive(tmp_path: Path) -> None:
    state = classifier_state()
    prunet_zoo.save_weights(tmp_path / "w.safetensors", state, prunet_zoo.NetSpec.from_dict(TINY))
    path = str(tmp_path / "w.safetensors")
    backbone = PruNet(path, (1, 2, 3), init_cfg={"type": "Pretrained", "checkpoint": path})
    backbone.init_weights()
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


@pytest.fixture
def weights(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    state = classifier_state()
    path = tmp_path / "arch.safetensors"
    prunet_zoo.save_weights(path, state, prunet_zoo.NetSpec.from_dict(TINY))
    return str(path), state


def holds(backbone: PruNet, state: dict[str, torch.Tensor]) -> bool:
    own = backbone.state_dict()
    return bool(own) and all(torch.equal(tensor, state[name]) for name, tensor in own.items())


CONSTANT = {"type": "Constant", "layer": ["Conv2d", "BatchNorm2d"], "val": 0.25}


@pytest.mark.parametrize("init_cfg", [None, CONSTANT, [CONSTANT]])
def test_a_weights_file_as_arch_brings_its_weights(weights, init_cfg) -> None:
    path, state = weights
    backbone = ROOT_MODELS.build({"type": "PruNet", "arch": path, "out_indices": (1, 2), "init_cfg": init_cfg})
    assert holds(backbone, state)
    backbone.init_weights()
    assert holds(backbone, state)


def test_a_detectors_initialiser_leaves_the_weights_of_arch(weights) -> None:
    class Detector(BaseModule):
        def __init__(self) -> None:
            super().__init__(init_cfg=CONSTANT)
            self.backbone = PruNet(path, (1, 2))
            self.head = torch.nn.Conv2d(16, 2, 1)

    path, state = weights
    detector = Detector()
    detector.init_weights()
    assert (detector.head.weight == 0.25).all()  # it ran
    assert holds(detector.backbone, state)


def test_an_explicit_checkpoint_wins_over_arch(weights, tmp_path: Path) -> None:
    path, state = weights
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(other, tmp_path / "other.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "other.pth")}
    backbone = PruNet(path, (1, 2), init_cfg=init_cfg)
    backbone.init_weights()
    assert holds(backbone, other)
    assert backbone.init_cfg == init_cfg


def test_weights_that_do_not_fit_raise(tmp_path: Path) -> None:
    state = classifier_state()
    lacking = {k: v for k, v in state.items() if "stages.1" not in k}
    other = dict(state) | {"stages.0.0.conv.conv.weight": torch.ones(9, 3, 3, 3)}
    cases = [(lacking, "lacks"), (other, "another shape"), ({"x": torch.ones(1)}, "no tensor")]
    for number, (content, message) in enumerate(cases):
        torch.save(content, tmp_path / f"{number}.pth")
        backbone = PruNet(
            TINY, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / f"{number}.pth")}, out_indices=(1,)
        )
        with pytest.raises(CheckpointError, match=message):
            backbone.init_weights()
    for wrong, message in [
        ({"type": "Pretrained", "checkpoint": "nowhere.pth"}, "does not exist"),
        ({"type": "Pretrained"}, "needs 'checkpoint'"),
        ({"type": "Pretrained", "checkpoint": "file://nothing"}, "cannot load"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            PruNet(TINY, out_indices=(1,), init_cfg=wrong).init_weights()


def test_other_initialisers_are_mmengines() -> None:
    backbone = PruNet(TINY, (1,), init_cfg=[{"type": "Constant", "layer": "Conv2d", "val": 0.25}])
    backbone.init_weights()
    convolutions = [m.weight for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all((weight == 0.25).all() for weight in convolutions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "prunet_p9"}, "prunet_p0"),
        ({"arch": 3}, "arch must be"),
        ({"arch": TINY, "out_indices": (1, 9)}, "9 does not exist"),
        ({"arch": TINY, "out_indices": (1,), "frozen_stages": 4}, "frozen_stages"),
        ({"arch": TINY, "out_indices": 3}, "^out_indices must be a list of integers"),
        ({"arch": TINY, "out_indices": (1,), "norm_cfg": "BN"}, "^norm_cfg must be None or a dict"),
        ({"arch": TINY, "out_indices": (1,), "drop_path_rate": 2.0}, "^drop_path_rate must be a number"),
    ],
)
def test_bad_arguments(options, message: str) -> None:
    with pytest.raises(PrunetError, match=message):
        PruNet(**options)


# ---- in_channels of the neck


def detector(neck, **backbone) -> ConfigDict:
    return ConfigDict(
        type="Any", backbone={"type": "PruNet", "arch": TINY, "out_indices": (1, 2, 3), **backbone}, neck=neck
    )


@pytest.mark.parametrize(
    ("neck", "expected"),
    [
        ({"type": "mmdet.FPN", "out_channels": 8, "num_outs": 3}, [12, 16, 24]),
        ({"type": "FPN", "in_channels": [256, 512, 1024, 2048]}, [12, 16, 24]),
        ({"type": "mmdet.DilatedEncoder", "in_channels": 2048}, 24),
        ({"type": "mmdet.DilatedEncoder"}, 24),
        ({"type": "YOLOV3Neck", "in_channels": [1024, 512, 256]}, [24, 16, 12]),
    ],
)
def test_neck_follows_the_spec(neck, expected) -> None:
    config = detector(neck)
    kept = copy.deepcopy(config)
    filled = follow_spec(config)
    assert config == kept  # never in place
    assert filled.neck.in_channels == expected
    assert follow_spec(filled) == filled


def test_neck_follows_out_indices_nesting_and_lists() -> None:
    nested = ConfigDict(
        type="SemiBase", detector=detector([{"type": "FPN", "in_channels": [1]}, {"type": "BFP", "in_channels": 8}])
    )
    filled = follow_spec(nested)
    assert filled.detector.neck[0].in_channels == [12, 16, 24]
    assert filled.detector.neck[1].in_channels == 8
    assert nested.detector.neck[0].in_channels == [1]
    assert follow_spec(detector({"type": "FPN"}, out_indices=(2,)), scope="mmdet").neck.in_channels == [16]
    assert follow_spec(Config({"model": detector({"type": "FPN", "in_channels": [1]})}).model).neck.in_channels == [
        12,
        16,
        24,
    ]


def test_others_are_left_alone() -> None:
    resnet = ConfigDict(
        type="Any", backbone={"type": "ResNet", "depth": 50}, neck={"type": "FPN", "in_channels": [1, 2]}
    )
    assert follow_spec(resnet) == resnet
    without = ConfigDict(type="Any", backbone={"type": "PruNet", "arch": TINY}, head={"type": "X"})
    assert follow_spec(without) == without
    other_neck = detector({"type": "SomeNeckWithoutChannels"})
    assert follow_spec(other_neck) == other_neck


def test_building_in_mmengine_and_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmengine.registry import Registry

    late = Registry("model", parent=ROOT_MODELS, scope="late_child_of_test")

    class Detector(torch.nn.Module):
        def __init__(self, backbone, neck) -> None:
            super().__init__()
            self.in_channels = neck["in_channels"]

    late.register_module(module=Detector)
    try:
        config = detector({"type": "FPN", "in_channels": [5, 6]})
        config.type = "late_child_of_test.Detector"
        assert late.build(config).in_channels == [12, 16, 24]
        assert MODELS.build(config).in_channels == [12, 16, 24]
        assert config.neck.in_channels == [5, 6]
    finally:
        ROOT_MODELS.children.pop("late_child_of_test")


def test_out_indices_that_are_no_list_are_named_also_beside_a_neck() -> None:
    neck = {"type": "FPN", "out_channels": 8, "num_outs": 2}
    backbone = {"type": "PruNet", "arch": "prunet_p0", "out_indices": 3}
    model = {"type": "RetinaNet", "backbone": backbone, "neck": neck}
    assert follow_spec(model)["neck"] == neck
    with pytest.raises(SpecError, match="out_indices"):
        MODELS.build(backbone)
