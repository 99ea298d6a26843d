"""The backends that a CPU can run, each against torch, and what is said where one cannot run."""

from __future__ import annotations

import builtins
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from prunet_zoo.errors import LatencyError, UnknownNameError
from prunet_zoo.latency.backends import (
    Session,
    Setting,
    available_backends,
    check_output,
    example_input,
    get_backend,
    list_backends,
)
from prunet_zoo.latency.backends import openvino as openvino_module
from prunet_zoo.latency.backends import torch_compile as compile_module
from prunet_zoo.latency.backends.verify import TOLERANCE, first_output
from prunet_zoo.models import create_model
from prunet_zoo.models.export import export_onnx

NAMES = {"torch", "torch-compile", "cuda-graph", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt",
         "openvino", "tensorrt", "trtexec"}  # fmt: skip
LIBRARIES = {"onnxruntime": "onnxruntime", "onnxruntime-cuda": "onnxruntime", "onnxruntime-tensorrt": "onnxruntime",
             "openvino": "openvino", "tensorrt": "tensorrt"}  # fmt: skip
SHAPE = (2, 3, 32, 32)
has_gpu = torch.cuda.is_available()


def network(activation: type[nn.Module] = nn.Hardswish, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), activation(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def prepared(name: str, module: nn.Module, **options) -> Session:
    backend, setting = get_backend(name), Setting(batch=SHAPE[0], **options)
    backend.check(setting)
    with backend.environment(setting):
        return backend.prepare(module, SHAPE, setting)


def test_all_backends_are_listed():
    assert set(list_backends()) == NAMES
    for name in NAMES:
        backend = get_backend(name)
        assert backend.name == name
        assert get_backend(backend) is backend
        assert set(backend.dtypes) <= {"cpu", "cuda"}
        assert backend.install


def test_near_names_are_suggested():
    with pytest.raises(UnknownNameError, match="did you mean 'openvino'"):
        get_backend("openvno")
    with pytest.raises(UnknownNameError, match="'onnxruntime-tensorrt'"):
        get_backend("onnxruntime-trt")


def test_what_is_available_is_said():
    found = available_backends()
    assert set(found) == NAMES
    assert found["torch"] == (torch.__version__, None)
    for version, reason in found.values():
        assert (version is None) != (reason is None)
    if not has_gpu:
        assert "cuda" in found["cuda-graph"].reason


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_says_what_to_install(name, monkeypatch):
    def blocked(module, *args, **kwargs):
        if module.split(".")[0] == LIBRARIES[name]:
            raise ImportError(f"No module named {module!r}")
        return real(module, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.delitem(sys.modules, LIBRARIES[name], raising=False)
    monkeypatch.setattr(builtins, "__import__", blocked)
    backend = get_backend(name)  # importing the backend does not need its library
    accelerator = next(iter(backend.dtypes))
    with pytest.raises(LatencyError, match=rf"'{name}' needs something that is not installed \(No module.*pip install"):
        backend.check(Setting(accelerator=accelerator))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("onnxruntime", Setting(accelerator="cuda"), "does not run on 'cuda'; it runs on cpu"),
        ("cuda-graph", Setting(), r"does not run on 'cpu'; it runs on cuda \(--device\)"),
        ("onnxruntime", Setting(dtype="fp16"), "on cpu does not run 'fp16'; it runs fp32"),
        ("onnxruntime", Setting(memory_format="channels_last"), "does not run 'channels_last'; it runs 'contiguous'"),
        ("openvino", Setting(memory_format="channels_last"), "does not run 'channels_last'"),
        ("torch", Setting(memory_format="nhwc"), "does not run 'nhwc'; it runs 'contiguous' or 'channels_last'"),
        ("torch", Setting(threads=0), "threads must be at least 1"),
        ("torch", Setting(batch=0), "batch must be at least 1"),
    ],
)
def test_settings_that_a_backend_cannot_run(name, setting, message):
    with pytest.raises(LatencyError, match=message):
        get_backend(name).check(setting)


@pytest.mark.skipif(has_gpu, reason="there is a GPU")
@pytest.mark.parametrize("name", ["torch", "torch-compile", "cuda-graph"])
def test_cuda_without_a_device(name, monkeypatch):
    with pytest.raises(LatencyError, match=f"'{name}' was asked for cuda, but torch sees no CUDA device"):
        get_backend(name).check(Setting(accelerator="cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(LatencyError, match=r"is a CPU build; install one for CUDA: pip install torch"):
        get_backend(name).check(Setting(accelerator="cuda"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch", {}),
        ("torch", {"memory_format": "channels_last"}),
        ("torch", {"dtype": "bf16"}),
        ("onnxruntime", {}),
        ("openvino", {}),
        ("openvino", {"dtype": "bf16"}),
        ("openvino", {"dtype": "fp16"}),
    ],
)
def test_a_session_runs_the_network(name, options):
    library = LIBRARIES.get(name)
    if library:
        pytest.importorskip(library)
    module = network()
    try:
        session = prepared(name, module, **options)
    except LatencyError as error:
        if "this processor does not run" not in str(error):
            raise
        pytest.skip(str(error))
    dtype = options.get("dtype", "fp32")
    error = check_output(session, module, SHAPE, dtype)
    assert error < 1e-5 if dtype == "fp32" else 1e-5 < error < TOLERANCE[dtype]
    assert session.output().shape == (2, 10)
    assert len(session.sample(3)) == 3
    assert check_output(session, module, SHAPE, dtype) == error  # runs leave the input as it was


@pytest.mark.slow
def test_whole_networks_agree():
    module = create_model("prunet_p0").eval()
    shape = (1, 3, 64, 64)
    outputs = []
    for name in ("torch", "onnxruntime", "openvino"):
        if name in LIBRARIES:
            pytest.importorskip(LIBRARIES[name])
        backend = get_backend(name)
        session = backend.prepare(module, shape, Setting())
        check_output(session, module, shape)
        outputs.append(session.output())
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-4 * np.abs(outputs[0]).max())


def test_preparing_leaves_the_module_alone():
    module = network().train()
    before = copy.deepcopy(module.state_dict())
    for name in ("torch", "onnxruntime"):
        prepared(name, module, **({"dtype": "bf16", "memory_format": "channels_last"} if name == "torch" else {}))
    assert module.training
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) and value.stride() == before[key].stride()


def test_channels_last_is_the_layout_that_runs():
    seen = []
    module = network()
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda layer, args: seen.append((args[0].is_contiguous(memory_format=torch.channels_last), layer))
    )
    try:
        session = get_backend("torch").prepare(module, SHAPE, Setting(memory_format="channels_last"))
        session.run()
    finally:
        hook.remove()
    assert all(last for last, layer in seen if isinstance(layer, nn.Conv2d))


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with get_backend("torch").environment(Setting(threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


INTERRUPTED = """
import os, signal, time
from torch import nn
from prunet_zoo.latency.backends import Setting, get_backend

backend = get_backend("openvino")
first, second = (backend.prepare(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), Setting()) for _ in range(2))
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("stopped")
"""


def test_openvino_leaves_signals_alone():
    """Two models at a time, the older one dropped first: Ctrl-C was a segmentation fault."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


def test_openvino_refuses_another_precision_or_thread_count(monkeypatch):
    pytest.importorskip("openvino")
    real = openvino_module.properties
    for changed in ({"INFERENCE_PRECISION_HINT": "bf16"}, {"INFERENCE_NUM_THREADS": 2}):
        monkeypatch.setattr(openvino_module, "properties", lambda s, changed=changed: real(s) | changed)
        if "INFERENCE_NUM_THREADS" in changed and (os.cpu_count() or 1) < 2:
            continue
        try:
            get_backend("openvino").check(Setting(dtype="bf16"))
        except LatencyError:
            continue
        with pytest.raises(LatencyError, match=r"would run .* instead of f32 on 1"):
            get_backend("openvino").prepare(network(), SHAPE, Setting())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.Sigmoid])
def test_the_half_network_for_gpus_is_the_network(activation):
    """What the CUDA provider and TensorRT 11 are given, on ONNX Runtime's CPU provider."""
    onnxruntime = pytest.importorskip("onnxruntime")
    module = network(activation)
    model = export_onnx(module, SHAPE, dtype=torch.float16)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float16)"
    x = example_input(SHAPE)
    found = session.run(None, {"input": x.astype(np.float16)})[0].astype(np.float32)
    half = Session(lambda: None, output=lambda: found)
    assert 1e-5 < check_output(half, module, SHAPE, "fp16") < TOLERANCE["fp16"]


def test_the_bf16_network_for_gpus_has_its_types():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(export_onnx(network(), SHAPE, dtype=torch.bfloat16))
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.BFLOAT16}


def test_a_wrong_output_is_noticed():
    module = network()
    right = prepared("torch", module).output()
    for output, message in [
        (right * 1.5, "differs from torch's by 50.0%"),
        (right[:1], r"has shape \(1, 10\), torch's \(2, 10\)"),
        (np.full_like(right, np.nan), "not finite"),
    ]:
        with pytest.raises(LatencyError, match=message):
            check_output(Session(lambda: None, output=lambda output=output: output), module, SHAPE)
    with pytest.raises(LatencyError, match="does not show the network's output"):
        Session(lambda: None).output()


def test_the_first_of_several_outputs_counts():
    x = torch.ones(2)
    assert first_output({"a": [x, None]}) is x
    with pytest.raises(LatencyError, match="must return a tensor, not str"):
        first_output("x")


def test_example_input_is_always_the_same():
    assert example_input(SHAPE).dtype == np.float32
    np.testing.assert_array_equal(example_input(SHAPE), example_input(list(SHAPE)))


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "some-compiler")
    with pytest.raises(LatencyError, match=r"needs a C\+\+ compiler, and 'some-compiler' was not found; run: apt"):
        get_backend("torch-compile").check(Setting())


needs_compiler = pytest.mark.skipif(compile_module.missing_compiler() is not None, reason="there is no C++ compiler")


@needs_compiler
def test_what_is_compiled_is_the_network():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    session = prepared("torch-compile", module)
    assert check_output(session, module, SHAPE) < 1e-5
    assert len(session.sample(3)) == 3


def test_more_networks_than_torch_keeps_are_compiled(monkeypatch):
    """Without the C++ compiler: eleven networks of one class, of which torch would compile eight."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **options | {"backend": "eager"}))
    sessions = []
    for seed in range(11):
        module = network(seed=seed)
        sessions.append((module, get_backend("torch-compile").prepare(module, SHAPE, Setting())))
    for module, session in sessions:
        assert check_output(session, module, SHAPE) < 1e-5


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_graph_break_is_an_error():
    with pytest.raises(LatencyError, match=r"torch\.compile of Breaks .* failed"):
        get_backend("torch-compile").prepare(Breaks(), SHAPE, Setting())


@needs_compiler
@pytest.mark.slow
def test_a_whole_network_is_compiled():
    module = create_model("prunet_p0").eval()
    session = get_backend("torch-compile").prepare(module, (1, 3, 64, 64), Setting())
    assert check_output(session, module, (1, 3, 64, 64)) < 1e-4


@pytest.mark.skipif(not has_gpu, reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", sorted(n for n in NAMES if "cuda" in get_backend(n).dtypes))
def test_on_a_gpu(name, dtype):
    backend, setting = get_backend(name), Setting(dtype=dtype, accelerator="cuda", batch=2)
    try:
        backend.check(setting)
    except LatencyError as error:
        pytest.skip(str(error))
    module = network()
    with backend.environment(setting):
        session = backend.prepare(module, SHAPE, setting)
        check_output(session, module, SHAPE, dtype)
        times = session.sample(5)
        assert len(times) == 5 and min(times) > 0
