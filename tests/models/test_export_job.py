"""Files are kept only when they compute what torch computes; whole or not at all; they tell what they are."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunet_zoo.files import WriteError
from prunet_zoo.models import PruNetBackbone, create_model, memory
from prunet_zoo.models.export import (
    FORMATS,
    ExportError,
    Format,
    Network,
    Options,
    Plan,
    Scaling,
    export,
    openvino_core,
)
from prunet_zoo.models.export import formats as formats_module
from prunet_zoo.models.export.job import relative_error

SPEC = {
    "name": "tiny", "input_size": 32, "num_classes": 5, "tail": {"out_channels": 16},
    "stages": [
        {"blocks": [{"type": "conv", "out_channels": 8, "stride": 2, "act": "hard_swish"}]},
        {"blocks": [{"type": "irb", "out_channels": 8, "hidden": 24, "se_ratio": 0.5, "act": "silu", "stride": 2}]},
        {"blocks": [{"type": "fused_irb", "out_channels": 16, "hidden": 24, "stride": 2}]},
    ],
}  # fmt: skip
SCALING = Scaling((120.0, 110.0, 100.0), (60.0, 55.0, 50.0))
LIBRARY = {"onnx": "onnxruntime", "torchscript": "torch", "openvino": "openvino"}


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    model = create_model(SPEC).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return Network(model, "tiny", (32, 32), outputs=("logits",), scaling=SCALING, about={"classes": ["ä", "b"]})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def run_file(name: str, path: Path, x: torch.Tensor) -> list[np.ndarray]:
    return FORMATS[name].open(path)(x.numpy())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("free", [False, True], ids=["fixed", "dynamic"])
def test_every_format_computes_what_torch_computes(network, tmp_path, name, dtype, free):
    pytest.importorskip(LIBRARY[name])
    path = tmp_path / f"net{FORMATS[name].suffix}"
    state = {key: value.clone() for key, value in network.module.state_dict().items()}
    record = export(network, FORMATS[name], path, Options(dtype=dtype, dynamic_batch=free, batch=2))
    assert record["batchnorm"] == {"folded": 7, "kept": 0}
    assert left(tmp_path) == sorted(record["files"])
    assert record["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    limit = 1e-5 if dtype == "fp32" else 0.01
    assert record["max_error"]["logits"] < limit
    assert record["input"]["shape"] == ["batch" if free else 2, 3, 32, 32]
    for count in (2, 1, 5) if free else (2,):
        x = torch.randn(count, 3, 32, 32)
        (got,) = run_file(name, path, x)
        with torch.no_grad():
            wanted = network.module(x).numpy()
        assert got.dtype == np.float32 and relative_error(got, wanted) < limit
    assert all(torch.equal(value, state[key]) for key, value in network.module.state_dict().items())


@pytest.mark.parametrize("name", FORMATS)
def test_half_files_are_half_as_large(tmp_path, name):
    pytest.importorskip(LIBRARY[name])
    net = Network(nn.Conv2d(3, 512, 9), "wide", (16, 16))
    sizes = {}
    for dtype in ("fp32", "fp16"):
        path = tmp_path / f"{dtype}{FORMATS[name].suffix}"
        sizes[dtype] = export(net, FORMATS[name], path, Options(dtype=dtype))["bytes"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bgr", [False, True])
def test_the_scaling_can_lie_in_the_file(network, tmp_path, name, bgr):
    pytest.importorskip(LIBRARY[name])
    network.scaling = Scaling(SCALING.mean, SCALING.std, bgr)
    path = tmp_path / f"net{FORMATS[name].suffix}"
    record = export(network, FORMATS[name], path, Options(normalize=True))
    assert record["input"]["values"] == "RGB, 0…255"
    image = torch.randint(0, 256, (1, 3, 32, 32)).float()
    (got,) = run_file(name, path, image)
    ordered = image.flip(1) if bgr else image
    x = (ordered - torch.tensor(SCALING.mean).view(1, 3, 1, 1)) / torch.tensor(SCALING.std).view(1, 3, 1, 1)
    with torch.no_grad():
        assert relative_error(got, network.module(x).numpy()) < 1e-5


def test_files_tell_what_they_are(network, tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    paths = {name: tmp_path / f"net{form.suffix}" for name, form in FORMATS.items()}
    for name, form in FORMATS.items():
        export(network, form, paths[name])
    told: list[dict[str, Any]] = [
        {item.key: json.loads(item.value) for item in onnx.load(paths["onnx"]).metadata_props}
    ]
    extra = {"prunet_zoo.json": ""}
    torch.jit.load(str(paths["torchscript"]), _extra_files=extra)
    told.append(json.loads(extra["prunet_zoo.json"]))
    model = openvino_core().read_model(str(paths["openvino"]))
    told.append({key: json.loads(model.get_rt_info(["model_info", key]).astype(str)) for key in told[1]})
    (opset,) = (entry.version for entry in onnx.load(paths["onnx"]).opset_import)
    assert told[0].pop("opset") == opset == 17
    for metadata in told:
        assert metadata == told[0]
    assert told[0]["classes"] == ["ä", "b"] and told[0]["name"] == "tiny"
    assert told[0]["outputs"] == [{"name": "logits", "shape": [1, 5]}]


def test_the_same_network_gives_the_same_onnx_file(network, tmp_path):
    pytest.importorskip("onnxruntime")
    for name in ("a.onnx", "b.onnx"):
        export(network, FORMATS["onnx"], tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_several_outputs_keep_their_names_and_order(tmp_path, name):
    pytest.importorskip(LIBRARY[name])
    torch.manual_seed(0)
    net = Network(PruNetBackbone(SPEC, (0, 1, 2)).eval(), "maps", (48, 32), outputs=("feature",))
    path = tmp_path / f"net{FORMATS[name].suffix}"
    record = export(net, FORMATS[name], path)
    shapes = [[1, 8, 24, 16], [1, 8, 12, 8], [1, 16, 6, 4]]
    assert record["outputs"] == [{"name": f"feature_{i}", "shape": shape} for i, shape in enumerate(shapes)]
    assert [list(out.shape) for out in run_file(name, path, torch.zeros(1, 3, 48, 32))] == shapes


class Wrong(type(FORMATS["torchscript"])):  # type: ignore[misc]
    """Writes another network than it is given, by a factor."""

    factor = 1.01

    def write(self, graph: nn.Module, plan: Plan, path: Path) -> dict[str, Any]:
        class Changed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.graph = graph

            def forward(self, x: torch.Tensor) -> Any:
                return Wrong.factor * self.graph(x)

        return super().write(Changed().eval(), plan, path)


@pytest.mark.parametrize("factor", [1.01, float("nan"), 0.0])
def test_a_file_that_computes_something_else_is_not_kept(network, tmp_path, monkeypatch, factor):
    monkeypatch.setattr(Wrong, "factor", factor)
    old = tmp_path / "net.pt"
    old.write_bytes(b"old")
    size = {1.01: "0.01", 0.0: "1"}.get(factor, "inf")
    with pytest.raises(ExportError, match=rf"differs from torch by {size} of the scale of output 'logits'.*not kept"):
        export(network, Wrong(), old)
    assert left(tmp_path) == ["net.pt"] and old.read_bytes() == b"old"
    if factor == 1.01:  # unless that is asked for
        record = export(network, Wrong(), old, Options(tolerance=0.02))
        assert record["max_error"]["logits"] == pytest.approx(0.01, rel=0.01) and old.read_bytes() != b"old"
    export(network, Wrong(), old, Options(check=False))


def test_a_file_that_its_runtime_cannot_read_is_not_kept(network, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(formats_module, "add_metadata", lambda data, metadata: data[: len(data) // 2])
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot run it.*not kept"):
        export(network, FORMATS["onnx"], tmp_path / "net.onnx")
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_without_its_runtime_nothing_is_written_unasked(network, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, LIBRARY[name], None)
    with pytest.raises(ExportError, match=rf"{LIBRARY[name]}.*run: pip install"):
        export(network, FORMATS[name], tmp_path / f"net{FORMATS[name].suffix}")
    assert left(tmp_path) == []
    if name == "onnx":
        pytest.importorskip("onnx")
        record = export(network, FORMATS["onnx"], tmp_path / "net.onnx", Options(check=False))
        assert record["max_error"] is None and record["checked_with"] is None and left(tmp_path) == ["net.onnx"]
    else:
        with pytest.raises(ExportError, match="pip install openvino"):
            export(network, FORMATS[name], tmp_path / "net.xml", Options(check=False))
        assert left(tmp_path) == []


def test_onnx_without_its_package(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"pip install 'prunet_zoo\[export\]'"):
        export(network, FORMATS["onnx"], tmp_path / "net.onnx", Options(check=False))
    assert left(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(network, tmp_path, monkeypatch, step):
    path = tmp_path / "net.pt"
    path.write_bytes(b"old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(WriteError, match="No space left"):
        export(network, FORMATS["torchscript"], path)
    monkeypatch.undo()
    assert left(tmp_path) == ["net.pt"] and path.read_bytes() == b"old"


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from prunet_zoo.models.export import FORMATS, Network, export
from prunet_zoo.errors import PrunetError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
torch.set_num_threads(1)
net = Network(torch.nn.Conv2d(3, 512, 9), "wide", (16, 16))
for form in FORMATS.values():
    try:
        export(net, form, Path(sys.argv[1]) / f"wide{form.suffix}")
        print("kept", form.name)
    except PrunetError as error:
        print("refused", form.name, error)
"""


def test_no_format_keeps_a_file_that_the_system_cut_off(tmp_path):
    pytest.importorskip("resource")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line[:4] in ("kept", "refu")] == [
        ["refused", name] for name in FORMATS
    ], done.stdout + done.stderr
    assert left(tmp_path) == []


def test_an_old_openvino_model_is_replaced_as_a_pair(network, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    path = tmp_path / "net.xml"
    export(network, FORMATS["openvino"], path)
    usual, moved = os.replace, []

    def replace(source: Any, target: Any) -> None:
        moved.append(Path(target).name)
        if len(moved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(WriteError):
        export(network, FORMATS["openvino"], path)
    assert moved == ["net.bin", "net.xml"]
    assert not path.exists()  # never the old description beside new weights


def test_what_cannot_be_is_said(network, tmp_path):
    class Fixed(type(FORMATS["torchscript"])):  # type: ignore[misc]
        dynamic = False

    form: Format = FORMATS["torchscript"]
    for options, message in (
        ({"dtype": "int8"}, "dtype must be one of fp32, fp16, got 'int8'"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"tolerance": 0.0}, "above 0 and below 1"),
    ):
        with pytest.raises(ExportError, match=message):
            Options(**options)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"fixed batch: give --batch N"):
        export(network, Fixed(), tmp_path / "x.pt", Options(dynamic_batch=True))
    network.scaling = None
    with pytest.raises(ExportError, match=r"tiny wants its images scaled is not known.*leave out --normalize"):
        export(network, form, tmp_path / "x.pt", Options(normalize=True))
    network.channels = 4
    with pytest.raises(ExportError, match=r"tiny cannot be run on an input of \(1, 4, 32, 32\)"):
        export(network, form, tmp_path / "x.pt")
    network.channels = 3
    with pytest.raises(ExportError, match=r"'openvino' makes files FILE\.xml; got the name x\.onnx"):
        export(network, FORMATS["openvino"], tmp_path / "x.onnx", Options(check=False))
    with pytest.raises(ExportError, match=r"is a folder; give the file: .*NAME\.torchscript\.pt"):
        export(network, form, tmp_path)
    with pytest.raises(ExportError, match=r"'torchscript' has no ONNX opset"):
        export(network, form, tmp_path / "x.pt", Options(opset=17))
    nan = Network(nn.Conv2d(3, 4, 1), "nan", (4, 4))
    nan.module.weight.data.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ExportError, match="not finite in torch itself"):
        export(nan, form, tmp_path / "x.pt")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("batch", "size"), [(10**9, (32, 32)), (1, (10**6, 10**6)), (10**12, (10**6, 10**6))], ids=["batch", "size", "both"]
)
def test_what_does_not_fit_into_memory_is_said(network, tmp_path, batch, size, monkeypatch):
    network.input_size = size
    asked = f"{batch}×{size[0]}×{size[1]} px"
    with pytest.raises(ExportError, match=rf"{asked} needs .* layer of 'tiny', .* smaller --input-size or --batch"):
        export(network, FORMATS["onnx"], tmp_path / "x.onnx", Options(batch=batch))
    monkeypatch.setattr(memory, "free_memory", lambda: None)  # the system does not tell: torch finds out
    with pytest.raises(ExportError, match=rf"tiny does not fit into memory with {asked}; take a smaller --input-size"):
        export(network, FORMATS["onnx"], tmp_path / "x.onnx", Options(batch=batch))
    assert left(tmp_path) == []


@pytest.mark.parametrize("asked", [None, 16, 99])
def test_the_opset_is_the_one_asked_for_or_nothing(network, tmp_path, asked):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")  # behind the exporter that torch falls back to
    path = tmp_path / "net.onnx"
    if asked == 99:
        with pytest.raises(ExportError, match=r"opset 99 cannot be written: torch .* gives \d+ instead"):
            export(network, FORMATS["onnx"], path, Options(opset=asked, check=False))
        assert left(tmp_path) == []
    else:
        record = export(network, FORMATS["onnx"], path, Options(opset=asked, check=False))
        assert record["opset"] == onnx.load(path).opset_import[0].version == (asked or 17)


def test_a_network_of_images_as_they_are(tmp_path):
    net = Network(nn.Conv2d(3, 4, 3), "plain", (8, 8), scaling=Scaling((0.0,) * 3, (1.0,) * 3, bgr=True))
    path = tmp_path / "net.pt"
    assert export(net, FORMATS["torchscript"], path)["input"]["values"] == "BGR, 0…255"
    image = torch.randint(0, 256, (1, 3, 8, 8)).float()
    with torch.no_grad():
        wanted = net.module(image).numpy()
    assert relative_error(run_file("torchscript", path, image)[0], wanted) < 1e-5
    assert export(net, FORMATS["torchscript"], path, Options(normalize=True))["input"]["values"] == "RGB, 0…255"
    assert relative_error(run_file("torchscript", path, image.flip(1))[0], wanted) < 1e-5


def test_relative_error():
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert relative_error(np.ones(2), np.zeros(2)) == float("inf")
    assert relative_error(np.array([np.inf]), np.array([1.0])) == float("inf")
