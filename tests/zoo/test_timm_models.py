"""What timm asks of its own models (its tests/test_models.py), asked of the zoo's seven networks."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from timm.models import FeatureInfo, group_parameters
from torch import nn

from prunet_zoo import create_model, load_spec
from prunet_zoo.errors import SpecError
from prunet_zoo.models import PruNetClassifier
from prunet_zoo.zoo import find_model

NAMES = ["gpunet_0", "gpunet_1", "gpunet_2", "gpunet_d1", "gpunet_d2", "prunet_p0", "prunet_p1"]
ONE = "gpunet_d1"  # has all that the others have: a convolution in the head, and the fewest parameters of such


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> PruNetClassifier:
    """Each network once, in eval mode, with BatchNorm statistics that count; not to be changed."""
    torch.manual_seed(1)
    return with_statistics(timm.create_model(request.param)).eval()


def with_statistics(network: Any) -> Any:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def image(side: int = 64, batch: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, side, side)


def test_listed() -> None:
    assert timm.list_models("prunet*") == ["prunet_p0", "prunet_p1"]
    assert timm.list_models("gpunet*") == NAMES[:5]
    assert timm.list_models(["prunet*", "gpunet*"], pretrained=True) == [f"{name}.nv_in1k" for name in NAMES]
    assert set(timm.list_models(module="timm_models")) == set(NAMES)
    for name in NAMES:
        assert timm.is_model(name) and timm.models.is_model_pretrained(name)
        assert timm.model_entrypoint(name).__name__ == name
        assert timm.model_entrypoint(name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_the_indexs(name: str) -> None:
    entry, cfg = find_model(name), timm.get_pretrained_cfg(f"{name}.nv_in1k").to_dict()
    preprocess = entry.preprocess
    assert preprocess is not None
    assert cfg == timm.get_pretrained_cfg(name).to_dict()
    side = preprocess.input_size
    assert cfg["input_size"] == cfg["test_input_size"] == (3, side, side)
    for field in ("crop_pct", "crop_mode", "interpolation", "mean", "std"):
        assert cfg[field] == getattr(preprocess, field), field
    assert cfg["num_classes"] == 1000
    assert (cfg["license"], cfg["url"]) == ("apache-2.0", entry.weights.url)
    assert cfg["origin_url"].startswith("https://github.com/NVIDIA/DeepLearningExamples")
    assert cfg["paper_ids"].startswith("arXiv:2")


def test_default_cfg_fits_the_network(model: PruNetClassifier) -> None:
    cfg, state = model.default_cfg, model.state_dict()
    assert model.default_cfg is model.pretrained_cfg
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert model.get_submodule(cfg["first_conv"]) is first
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]
    crop = timm.data.create_transform(**data, is_training=False)
    from PIL import Image

    assert crop(Image.new("RGB", (600, 400), (124, 116, 104))).shape == cfg["input_size"]


@pytest.mark.parametrize("name", ["prunet_p0", "gpunet_0"])
def test_own_create_model_tells_timm_the_same_preprocessing(name: str) -> None:
    ours, timms = (timm.data.resolve_model_data_config(make(name)) for make in (create_model, timm.create_model))
    assert ours == timms
    gray = create_model(name, in_chans=1)
    assert timm.data.resolve_model_data_config(gray)["input_size"][0] == gray.default_cfg["input_size"][0] == 1


def test_pool_size_is_the_last_maps() -> None:
    for name in ("gpunet_0", "prunet_p0"):  # with and without the padding that keeps half of the side
        network = timm.create_model(name).eval()
        with torch.no_grad():
            features = network.forward_features(torch.randn(1, *network.default_cfg["input_size"]))
        assert tuple(features.shape[2:]) == network.default_cfg["pool_size"]


def test_forward_features_and_head(model: PruNetClassifier) -> None:
    x = image(batch=2)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model(x)
        assert features.shape[:2] == (2, model.num_features)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), logits)
        assert logits.shape == (2, 1000) and torch.isfinite(logits).all()


def test_removing_classifier_and_pooling(model: PruNetClassifier) -> None:
    network, x = copy.deepcopy(model), image()
    with torch.no_grad():
        pooled = network.forward_head(network.forward_features(x), pre_logits=True)
        network.reset_classifier(0)
        assert network.num_classes == network.spec.num_classes == 0
        assert torch.equal(network(x), pooled)
        network.reset_classifier(0, "")
        unpooled = network(x)
        assert unpooled.shape[:2] == (1, model.head_hidden_size) and unpooled.ndim == 4
        assert unpooled.shape[2:] == network.forward_features(x).shape[2:]
        network.reset_classifier(1000, "avg")
        network.load_state_dict(model.state_dict())
        assert torch.equal(network(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_backward_reaches_every_parameter(name: str) -> None:
    network = timm.create_model(name, num_classes=42).train()
    for training in (True, False):  # while a batch's mean is subtracted, a shift before it has no gradient
        network.train(training).zero_grad()
        out = network(image(batch=2))
        assert out.shape == (2, 42)
        out.square().mean().backward()
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            assert training or parameter.grad.abs().sum() > 0, key


def test_forward_intermediates(model: PruNetClassifier) -> None:
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [level.stride for level in model.spec.feature_levels] == info.reduction()
    assert info.reduction()[:5] == [2, 4, 8, 16, 32]
    maps: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: maps.update({n: out.clone()}))
        for name in info.module_name()
    ]
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        final, found = model.forward_intermediates(x)
        [handle.remove() for handle in handles]
        assert torch.equal(final, model.forward_features(x))
        assert len(found) == len(model.feature_info)
        sizes = {place.name: place.out_size for place in model.spec.placed((96, 64))}
        for one, channels, module in zip(found, info.channels(), info.module_name(), strict=True):
            assert one.shape == (1, channels, *sizes[module])
            assert torch.equal(one, maps[module])
        for indices in ([-1, 1], [3], 2):
            some = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
            wanted = found[-indices:] if isinstance(indices, int) else [found[i] for i in indices]
            assert all(torch.equal(a, b) for a, b in zip(some, wanted, strict=True))


def test_stop_early_computes_nothing_behind() -> None:
    network, seen = timm.create_model(ONE).eval(), []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, n=name: seen.append(n))
    with torch.no_grad():
        network.forward_intermediates(image(), [1], stop_early=True, intermediates_only=True)
    assert network.feature_info[1]["module"] in seen
    assert not [name for name in seen if name.startswith(("stages.3", "tail", "head"))]


def test_features_only_gives_the_classifiers_maps(model: PruNetClassifier) -> None:
    x, last = image(), len(model.feature_info) - 1
    wanted, state = model.forward_intermediates(x, intermediates_only=True), model.state_dict()
    for indices in (None, (last, 0), (2,)):
        network = timm.create_model(model.spec.name, features_only=True, out_indices=indices).eval()
        network.model.load_state_dict({key: state[key] for key in network.model.state_dict()})
        kept = {key.split(".")[0] for key in network.model.state_dict()}
        assert kept == {"stages"}, "tail, head and classifier are pruned"
        levels = (0, 1, 2, 3, 4) if indices is None else indices
        assert network.feature_info.reduction() == [2 ** (i + 1) for i in levels]
        assert network.feature_info.channels() == [model.feature_info[i]["num_chs"] for i in levels]
        assert "num_classes" not in network.pretrained_cfg
        for out, index in zip(network(x), levels, strict=True):
            assert torch.equal(out, wanted[index])
    blocks = [m for stage in network.model.stages for m in stage]
    assert len(blocks) < model.spec.depth, "blocks behind level 2 are pruned"


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_other_feature_extractors_of_timm_agree(feature_cls: str) -> None:
    x = image()
    outs = []
    for options in ({}, {"feature_cls": feature_cls}):
        torch.manual_seed(3)
        outs.append(timm.create_model(ONE, features_only=True, out_indices=(1, 4), **options).eval()(x))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def test_pruning_keeps_what_is_asked() -> None:
    network = timm.create_model(ONE, num_classes=5).eval()
    x = image()
    whole = network.forward_features(x)
    kept = copy.deepcopy(network)
    assert kept.prune_intermediate_layers(2, prune_head=False) == [3, 4]
    assert torch.equal(kept(x), network(x))
    assert kept.prune_intermediate_layers([0, -1]) == [0, 4]  # all blocks and the tail stay, the head goes
    assert torch.equal(kept(x), whole)
    assert (kept.num_classes, kept.num_features, kept.head_hidden_size) == (0, 1152, 1152)
    assert kept.prune_intermediate_layers([0, -2], prune_head=False) == [0, 3]
    level = network.spec.feature_levels[3]
    assert kept(x).shape[1] == kept.num_features == level.channels
    assert [info["num_chs"] for info in kept.feature_info] == network.spec.channels([0, 1, 2, 3])
    with pytest.raises(SpecError, match="feature level 4 does not exist; there are 4: 0 to 3"):
        kept.forward_intermediates(x, [4])
    kept.reset_classifier(3, "avg")
    assert kept(x).shape == (1, 3)


@pytest.mark.parametrize("features", [False, True], ids=["classifier", "features"])
@pytest.mark.parametrize("name", [ONE, "gpunet_0", "prunet_p0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(name: str, features: bool) -> None:
    network = timm.create_model(name, scriptable=True, features_only=features).eval()
    scripted, x = torch.jit.script(network), image()
    with torch.no_grad():
        ours, theirs = network(x), scripted(x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_onnx_exportable() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from prunet_zoo.models.export import export_onnx

    network = timm.create_model(ONE, exportable=True, num_classes=4).eval()
    session = onnxruntime.InferenceSession(export_onnx(network, (1, 3, 64, 64)), providers=["CPUExecutionProvider"])
    x = image()
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), network(x), atol=1e-3, rtol=0
    )


def test_classes_channels_pooling() -> None:
    assert timm.create_model(ONE, num_classes=10).spec.num_classes == 10
    assert timm.create_model(ONE, num_classes=0).eval()(image()).shape == (1, 1984)
    unpooled = timm.create_model(ONE, num_classes=0, global_pool="").eval()
    assert unpooled(image()).shape == (1, 1984, 2, 2)
    gray = timm.create_model(ONE, in_chans=1)
    assert gray.spec.in_channels == gray.in_chans == 1
    assert sum(p.numel() for p in gray.parameters()) == gray.spec.params()
    assert gray.eval()(image(channels=1)).shape == (1, 1000)
    peaks = timm.create_model(ONE, global_pool="max", num_classes=3).eval()
    assert peaks.global_pool == "max"
    last = peaks.forward_features(image())
    wanted = peaks.classifier(peaks.head.act(peaks.head.conv(last.amax((2, 3), keepdim=True))).flatten(1))
    assert torch.equal(peaks.forward_head(last), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 8}, r"output_stride=8 is not possible.*maps of the strides 2, 4, 8, 16, 32$"),
        ({"global_pool": ""}, "global_pool='' gives a map.*give num_classes=0"),
        ({"global_pool": "catavgmax"}, "global_pool must be one of 'avg', 'max', 'avgmax', ''; got 'catavgmax'"),
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 0}, "in_channels"),
        ({"drop_rate": 1.5}, r"drop_rate must be a number from 0 to below 1; got 1\.5"),
        ({"features_only": True, "out_indices": (1, 5)}, "feature level 5 does not exist; there are 5: 0 to 4"),
        ({"features_only": True, "out_indices": ()}, "at least one feature level"),
        ({"features_only": True, "out_indices": 6}, "the last 6 feature levels were asked for; there are 5"),
    ],
)
def test_refused_clearly(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        timm.create_model(ONE, **options)


def test_strides_as_they_are_may_be_asked_for() -> None:
    for stride in (32, 64):
        assert timm.create_model("prunet_p0", output_stride=stride, num_classes=0).num_features == 1984
    network = timm.create_model("prunet_p0", features_only=True, out_indices=(4, 5))
    assert network.feature_info.reduction() == [32, 64]


def test_names_that_timm_does_not_have() -> None:
    for name in ("prunet_p2", "digits_classifier", "digits_detector"):  # the latter two are in the zoo, not in timm
        with pytest.raises(RuntimeError, match=rf"Unknown model \({name}\)"):
            timm.create_model(name)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(imagenet\) for prunet_p0"):
        timm.create_model("prunet_p0.imagenet")
    with pytest.raises(TypeError, match="unexpected keyword argument 'act_layer'"):
        timm.create_model("prunet_p0", act_layer="silu")


def test_reset_classifier_keeps_type_mode_and_the_rest() -> None:
    network = timm.create_model(ONE, dtype=torch.float64).eval()
    before = {key: value for key, value in network.state_dict().items() if not key.startswith("classifier")}
    network.reset_classifier(6)
    assert network.classifier.weight.dtype == torch.float64 and not network.classifier.training
    assert network(image().double()).shape == (1, 6)
    after = network.state_dict()
    assert all(after[key] is value or torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(SpecError, match="give num_classes=0"):
        network.reset_classifier(6, "")
    assert network(image().double()).shape == (1, 6), "a refusal changes nothing"


def test_device_and_dtype() -> None:
    network = timm.create_model(ONE, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.float16)}


def test_grad_checkpointing_computes_the_same() -> None:
    network, x = timm.create_model(ONE, num_classes=3).eval(), image()
    grads = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        calls: list[int] = []
        handle = network.stages[1][0].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        out = network(x)
        out.square().sum().backward()
        assert len(calls) == 1 + enable, "computed again in the backward pass"
        handle.remove()
        maps = network.forward_intermediates(x, intermediates_only=True)
        grads.append((out, *maps, *(p.grad for p in network.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_group_matcher_takes_layers_in_order(model: PruNetClassifier) -> None:
    names = [name for name, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(names)
        assert all(name.startswith("stages.0.") for name in groups[0])
        assert all(name.startswith(("head", "classifier")) for name in groups[max(groups)])
        order = [names.index(group[0]) for _, group in sorted(groups.items())]
        assert order == sorted(order)
    assert len(group_parameters(model, model.group_matcher(True))) == len(model.spec.stages) + 1
    assert model.no_weight_decay() == set()


def test_copy_and_pickle() -> None:
    network, x = with_statistics(timm.create_model(ONE, num_classes=4)).eval(), image()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))
        assert other.pretrained_cfg == network.pretrained_cfg
        assert other.spec == network.spec


def test_a_pickle_is_read_by_a_process_that_imports_nothing(tmp_path: Path) -> None:
    network = timm.create_model(ONE, num_classes=2).eval()
    (tmp_path / "network.pickle").write_bytes(pickle.dumps((network, image())))
    code = (
        "import pickle, sys; network, x = pickle.load(open(sys.argv[1], 'rb')); "
        "import timm; print(network(x).shape, timm.is_model('prunet_p0'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "network.pickle")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.Size([1, 2]) True", done.stderr


def test_stochastic_depth_and_dropout_arrive() -> None:
    network = timm.create_model(ONE, drop_rate=0.3, drop_path_rate=0.2)
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert network.drop_rate == 0.3 and max(rates) == pytest.approx(0.2) and rates == sorted(rates)


def test_spec_is_the_listed_one(model: PruNetClassifier) -> None:
    assert model.spec == load_spec(model.spec.name)
    assert sum(p.numel() for p in model.parameters()) == model.spec.params()
