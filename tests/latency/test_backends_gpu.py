"""The backends for GPUs without one: stand-ins for TensorRT's bindings of each generation, for ONNX Runtime's GPU build
and for torch's streams and events. What they run is ONNX Runtime on the CPU, so outputs can be compared."""

from __future__ import annotations

import ctypes
import enum
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Setting, check_output, cuda, cuda_graph, get_backend, onnxruntime_gpu
from prunet_zoo.latency.backends import tensorrt as tensorrt_module
from prunet_zoo.latency.backends.cuda import CudaSession, gpu_name
from prunet_zoo.latency.backends.torch_eager import place

onnxruntime = pytest.importorskip("onnxruntime")
SHAPE = (1, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class FakeStream:
    cuda_stream = 7

    def synchronize(self) -> None:
        events.append("synchronize stream")

    def wait_stream(self, other: object) -> None:
        events.append("wait")


class FakeEvent:
    """Its time is the number of things that have happened."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = len(events)

    def synchronize(self) -> None:
        events.append("synchronize event")

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.time - self.time)


events: list[str] = []


@pytest.fixture
def gpu(monkeypatch):
    """torch as on a machine with a GPU, as far as the backends look."""
    events.clear()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    for module in (tensorrt_module, onnxruntime_gpu):
        monkeypatch.setattr(module, "require_cuda", lambda name: None)
    monkeypatch.setattr(tensorrt_module, "DEVICE", "cpu")


def test_events_time_what_runs_on_an_idle_device(gpu):
    session = CudaSession(lambda: events.extend(["run", "run"]))
    assert session.sample(3) == [2.0, 2.0, 2.0]
    assert events == ["synchronize", "run", "run", "synchronize event"] * 3


def test_a_graph_is_captured_after_warm_up_and_replayed(gpu, monkeypatch):
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            events.append("forward")
            return 2 * x

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    class Capture(nullcontext):
        def __enter__(self):
            events.append("capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Capture())
    monkeypatch.setattr(cuda_graph, "place", lambda m, shape, s: place(m, shape, Setting()))
    session = get_backend("cuda-graph").prepare(Counts(), SHAPE, Setting(accelerator="cuda"))
    assert events == ["wait", *["forward"] * cuda_graph.WARMUP_RUNS, "wait", "capture", "forward"]
    events.clear()
    session.sample(2)
    assert events.count("replay") == 2 and "forward" not in events
    assert check_output(session, Counts(), SHAPE) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_name_of_the_gpu_comes_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('Tesla V100-SXM2-16GB')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_name() == "Tesla V100-SXM2-16GB"
    for name in ("torch", "torch-compile", "cuda-graph"):  # told before a setting is checked: no traceback of torch's
        assert get_backend(name).device_name("cuda") == "Tesla V100-SXM2-16GB"
    program.write_text(f"#!{sys.executable}\n")
    with pytest.raises(LatencyError, match="nvidia-smi names none"):
        gpu_name()
    program.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    with pytest.raises(LatencyError, match="nvidia-smi does not answer"):
        gpu_name()
    program.unlink()
    with pytest.raises(LatencyError, match="no NVIDIA GPU"):
        gpu_name()


# ---------------------------------------------------------------- TensorRT


def fake_tensorrt(version: str, fail: str = "") -> ModuleType:
    """The names that the bindings of a release have, as far as the backend uses them; the engine is the ONNX model."""
    major = int(version.split(".")[0])
    trt = ModuleType("tensorrt")
    trt.__version__ = version
    flags = {} if major >= 11 else {"FP16": 0, "TF32": 7} | ({"BF16": 17} if major >= 9 else {})
    trt.BuilderFlag = SimpleNamespace(**flags)
    creation = {"EXPLICIT_BATCH": 0} if major < 11 else {"STRONGLY_TYPED": 1}
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(**creation)
    trt.DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32"])
    trt.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    trt.Logger = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)
    trt.ILogger = type("ILogger", (), {})
    trt.built = []

    class Builder:
        def __init__(self, logger):
            self.logger = logger

        def create_network(self, flags):
            if major < 10 and flags != 1:
                raise ValueError("implicit batch")  # the ONNX parser of 8 refuses such a network
            return SimpleNamespace(model=None)

        def create_builder_config(self):
            config = SimpleNamespace(flags=[])
            config.set_flag = config.flags.append
            return config

        def build_serialized_network(self, network, config):
            trt.built.append(config.flags)
            if fail == "build":
                self.logger.log(2, "a warning")
                self.logger.log(1, "no kernel for this GPU")
                return None
            return bytearray(network.model)

    class OnnxParser:
        num_errors = 2

        def __init__(self, network, logger):
            self.network = network

        def parse(self, model):
            self.network.model = model
            return fail != "parse"

        def get_error(self, i):
            return f"unknown operator {i}"

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            return None if fail == "load" else Engine(trt, plan)

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    trt.fail = fail
    return trt


class Engine:
    def __init__(self, trt, plan):
        self.trt, self.session = trt, onnxruntime.InferenceSession(bytes(plan), providers=["CPUExecutionProvider"])
        self.io = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.io)

    def _of(self, name):
        return next(item for item in self.io if item.name == name)

    def get_tensor_name(self, i):
        return self.io[i].name

    def get_tensor_shape(self, name):
        return self._of(name).shape

    def get_tensor_dtype(self, name):
        return self.trt.DataType.HALF if "float16" in self._of(name).type else self.trt.DataType.FLOAT

    def get_tensor_mode(self, name):
        is_input = name in [item.name for item in self.session.get_inputs()]
        return self.trt.TensorIOMode.INPUT if is_input else self.trt.TensorIOMode.OUTPUT

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def _array(self, name):
        shape = self.engine._of(name).shape
        dtype = np.float16 if self.engine.get_tensor_dtype(name).name == "HALF" else np.float32
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def execute_async_v3(self, stream):
        assert stream == FakeStream.cuda_stream
        if self.engine.trt.fail == "run":
            return False
        x, y = (items[0].name for items in (self.engine.session.get_inputs(), self.engine.session.get_outputs()))
        self._array(y)[...] = self.engine.session.run([y], {x: self._array(x)})[0]
        events.append("execute")
        return True


GENERATIONS = ["8.6.1", "10.4.0", "10.16.1.11", "11.4.0.106"]


@pytest.mark.parametrize("version", GENERATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tensorrt_of_each_generation(gpu, monkeypatch, version, dtype):
    trt = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    backend, setting, module = get_backend("tensorrt"), Setting(dtype=dtype, accelerator="cuda"), network()
    backend.check(setting)
    assert backend.version == version
    session = backend.prepare(module, SHAPE, setting)
    typed = version.startswith("11")
    assert trt.built == [[trt.BuilderFlag.FP16] if dtype == "fp16" and not typed else []]
    error = check_output(session, module, SHAPE, dtype)
    assert (error > 1e-5) == (dtype == "fp16" and typed)  # there the network itself is in fp16
    events.clear()
    assert session.sample(2) == [1.0, 1.0]
    assert events.count("execute") == 2


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("parse", "does not read this ONNX model: unknown operator 0; unknown operator 1"),
        ("build", "could not build the engine: no kernel for this GPU$"),
        ("load", "cannot load the engine that it built: it gave no reason"),
    ],
)
def test_tensorrt_says_why_there_is_no_engine(gpu, monkeypatch, fail, message):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.4.0", fail))
    with pytest.raises(LatencyError, match=message):
        get_backend("tensorrt").prepare(network(), SHAPE, Setting(dtype="fp16", accelerator="cuda"))


def test_tensorrt_that_does_not_run_is_noticed(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.4.0", "run"))
    session = get_backend("tensorrt").prepare(network(), SHAPE, Setting(accelerator="cuda"))
    with pytest.raises(LatencyError, match="could not run the engine"):
        session.sample(1)


def test_tensorrt_releases_that_cannot(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("8.5.3"))
    with pytest.raises(LatencyError, match=r"needs TensorRT 8\.6 or newer, this is 8\.5\.3; run: pip install"):
        get_backend("tensorrt").check(Setting(accelerator="cuda"))
    bf16 = Setting(dtype="bf16", accelerator="cuda")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("8.6.1"))
    with pytest.raises(LatencyError, match="has no bf16"):
        get_backend("tensorrt").check(bf16)
    for version in GENERATIONS[1:]:
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
        get_backend("tensorrt").check(bf16)


def test_the_plan_of_the_builder_flag_is_bytes(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.4.0"))
    assert tensorrt_module.build_engine(b"model", "fp32") == b"model"


# ---------------------------------------------------------------- ONNX Runtime for GPUs


class FakeBinding:
    def __init__(self, binding):
        self.binding = binding

    def bind_ortvalue_input(self, name, value):
        self.binding.bind_ortvalue_input(name, value)

    def bind_output(self, name, device):
        assert device == "cuda"
        self.binding.bind_output(name, "cpu")

    def copy_outputs_to_cpu(self):
        return self.binding.copy_outputs_to_cpu()


class FakeInferenceSession:
    """Opens the model on the CPU and says which providers it has."""

    gives: tuple[str, ...] = ()
    asked: list = []  # noqa: RUF012
    configs: list = []  # noqa: RUF012

    def __init__(self, model, options, providers):
        type(self).asked.append(providers)
        type(self).configs.append(options.get_session_config_entry("session.disable_cpu_ep_fallback"))
        self.real = real_session(model, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return list(self.gives)

    def get_inputs(self):
        return self.real.get_inputs()

    def get_outputs(self):
        return self.real.get_outputs()

    def io_binding(self):
        return FakeBinding(self.real.io_binding())

    def run_with_iobinding(self, binding, options=None):
        if options is not None:
            assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
            events.append("run")
        self.real.run_with_iobinding(binding.binding)


real_session = onnxruntime.InferenceSession


@pytest.fixture
def gpu_build(gpu, monkeypatch):
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    from_numpy = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(FakeInferenceSession, "asked", [])
    monkeypatch.setattr(FakeInferenceSession, "configs", [])
    monkeypatch.setattr(FakeInferenceSession, "gives", tuple(providers))
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeInferenceSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: events.append("preload"), raising=False)
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(lambda x, device, index: from_numpy(x))
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntime_on_a_gpu(gpu_build, name, dtype):
    backend, setting, module = get_backend(name), Setting(dtype=dtype, accelerator="cuda"), network()
    backend.check(setting)
    session = backend.prepare(module, SHAPE, setting)
    [[(provider, options)]] = FakeInferenceSession.asked
    assert provider == backend.provider
    assert options["user_compute_stream"] == "7"
    assert FakeInferenceSession.configs == ["1"]  # no node may go to the CPU
    error = check_output(session, module, SHAPE, dtype)
    assert (error > 1e-5) == (dtype == "fp16")
    events.clear()
    assert session.sample(2) == [1.0, 1.0]
    if name == "onnxruntime-tensorrt":
        assert options["trt_fp16_enable"] == str(dtype == "fp16")
        folder = Path(options["trt_engine_cache_path"])
        assert folder.is_dir()
        backend.prepare(module, SHAPE, setting)
        assert FakeInferenceSession.asked[1][0][1]["trt_engine_cache_path"] != str(folder)
        del session
        assert not folder.exists()


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntime_that_turned_to_the_cpu_is_refused(gpu_build, monkeypatch, name):
    monkeypatch.setattr(FakeInferenceSession, "gives", ("CPUExecutionProvider",))
    with pytest.raises(
        LatencyError, match=r"could not load .* would run on CPUExecutionProvider instead: its .* do not"
    ):
        get_backend(name).prepare(network(), SHAPE, Setting(accelerator="cuda"))


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="a GPU build")
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_the_cpu_build_of_onnxruntime_is_refused(gpu, name):
    with pytest.raises(
        LatencyError, match=r"needs an ONNX Runtime with .*ExecutionProvider.*pip install onnx onnxrunti"
    ):
        get_backend(name).check(Setting(accelerator="cuda"))
    with pytest.raises(LatencyError, match=r"alone|would run on CPUExecutionProvider instead"):
        get_backend(name).prepare(network(), SHAPE, Setting(accelerator="cuda"))


def test_onnxruntime_gpu_has_no_bf16():
    with pytest.raises(LatencyError, match="on cuda does not run 'bf16'; it runs fp32, fp16"):
        get_backend("onnxruntime-cuda").check(Setting(dtype="bf16", accelerator="cuda"))


def test_a_cpu_build_of_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(LatencyError, match="is a CPU build"):
        cuda.require_cuda("tensorrt")


def test_the_stand_in_has_the_names_of_the_releases():
    """What the stand-in leaves out is what those releases removed or did not have yet."""
    assert not hasattr(fake_tensorrt("11.0.0").BuilderFlag, "FP16")
    assert not hasattr(fake_tensorrt("11.0.0").NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    assert not hasattr(fake_tensorrt("8.6.1").BuilderFlag, "BF16")
