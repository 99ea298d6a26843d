"""trtexec: what its releases print, and the backend against a stand-in that behaves as each of them does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency.backends import Setting, check_output, get_backend
from prunet_zoo.latency.backends import trtexec as trtexec_module
from prunet_zoo.latency.backends.trtexec_program import decode_version, read_median, read_output, read_times
from prunet_zoo.latency.timing import run_rounds

DOUBLE = Path(__file__).with_name("trtexec_double.py")
SHAPE = (1, 3, 8, 8)

# lines that the program printed, as people documented them; the release stands in each log's "TensorRT v" banner
SAMPLES = {
    # 8, April 2022: README of NVIDIA's GPUNet, the published protocol
    # (github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/GPUNet)
    "GPUNet": (
        "[04/07/2022-19:40:17] [I] GPU Compute Time: min = 0.554077 ms, max = 0.572388 ms, mean = 0.564606 ms, "
        "median = 0.564209 ms, percentile(99%) = 0.570312 ms\n",
        0.564209,
    ),
    # 7: github.com/NVIDIA/TensorRT/issues/1221
    "7": (
        "[04/30/2021-08:54:18] [I] walltime: 5.67147 s\n"
        "[04/30/2021-08:54:18] [I] Enqueue Time\n"
        "[04/30/2021-08:54:18] [I] min: 1.9541 ms\n"
        "[04/30/2021-08:54:18] [I] max: 8.28448 ms\n"
        "[04/30/2021-08:54:18] [I] median: 4.74475 ms\n"
        "[04/30/2021-08:54:18] [I] GPU Compute\n"
        "[04/30/2021-08:54:18] [I] min: 564.432 ms\n"
        "[04/30/2021-08:54:18] [I] max: 569.332 ms\n"
        "[04/30/2021-08:54:18] [I] mean: 567.144 ms\n"
        "[04/30/2021-08:54:18] [I] median: 567.073 ms\n",
        567.073,
    ),
    # 8.2.5: a log whose last line is "&&&& PASSED TensorRT.trtexec [TensorRT v8205]"
    "8.2": (
        "[09/01/2025-18:07:04] [I] End-to-End Host Latency: min = 31.8066 ms, max = 51.0674 ms, mean = 47.4387 ms, "
        "median = 47.5804 ms, percentile(99%) = 50.3098 ms\n"
        "[09/01/2025-18:07:04] [I] H2D Latency: min = 6.76038 ms, max = 6.83435 ms, mean = 6.77499 ms, "
        "median = 6.76849 ms, percentile(99%) = 6.82928 ms\n"
        "[09/01/2025-18:07:04] [I] GPU Compute Time: min = 20.9889 ms, max = 25.8992 ms, mean = 23.8437 ms, "
        "median = 23.8456 ms, percentile(99%) = 25.2888 ms\n"
        "[09/01/2025-18:07:04] [I] D2H Latency: min = 4.03357 ms, max = 4.19946 ms, mean = 4.04503 ms, "
        "median = 4.04138 ms, percentile(99%) = 4.19824 ms\n"
        "[09/01/2025-18:07:04] [I] Total GPU Compute Time: 3.00431 s\n",
        23.8456,
    ),
    # 8.4.1: github.com/NVIDIA/TensorRT/issues/2129
    "8.4": (
        "[07/22/2022-08:01:17] [I] Latency: min = 2.55664 ms, max = 9.1418 ms, mean = 7.03175 ms, median = 7.40112 ms, "
        "percentile(99%) = 7.92065 ms\n"
        "[07/22/2022-08:01:17] [I] GPU Compute Time: min = 2.50195 ms, max = 9.0508 ms, mean = 6.9321 ms, "
        "median = 7.29883 ms, percentile(99%) = 7.81812 ms\n"
        "[07/22/2022-08:01:17] [I] Total GPU Compute Time: 113.576 s\n",
        7.29883,
    ),
    # 8.6.1: a log that begins "&&&& RUNNING TensorRT.trtexec [TensorRT v8601]"; --verbose explains the names after it
    "8.6": (
        "[08/31/2025-21:07:11] [I] Enqueue Time: min = 0.684082 ms, max = 1.16016 ms, mean = 0.79691 ms, "
        "median = 0.771881 ms, percentile(90%) = 0.862427 ms, percentile(95%) = 1.10266 ms, "
        "percentile(99%) = 1.15564 ms\n"
        "[08/31/2025-21:07:11] [I] GPU Compute Time: min = 21.4507 ms, max = 26.4669 ms, mean = 22.4855 ms, "
        "median = 22.0431 ms, percentile(90%) = 24.1021 ms, percentile(95%) = 24.494 ms, percentile(99%) = 26.1577 ms\n"
        "[08/31/2025-21:07:11] [V] GPU Compute Time: the GPU latency to execute the kernels for a query.\n",
        22.0431,
    ),
    # 10.0.1: a log whose last line is "&&&& PASSED TensorRT.trtexec [TensorRT v100001]"
    "10.0": (
        "[09/08/2025-20:11:30] [I] GPU Compute Time: min = 0.872314 ms, max = 3.66479 ms, mean = 1.3108 ms, "
        "median = 0.904633 ms, percentile(90%) = 2.23645 ms, percentile(95%) = 2.40967 ms, "
        "percentile(99%) = 2.62042 ms\n"
        "[09/08/2025-20:11:30] [W] * GPU compute time is unstable, with coefficient of variance = 43.467%.\n",
        0.904633,
    ),
    # 10.9: a log whose last line is "&&&& PASSED TensorRT.trtexec [TensorRT v100900] [b34]"
    "10.9": (
        "[04/08/2025-23:15:51] [I] GPU Compute Time: min = 109.522 ms, max = 114.185 ms, mean = 111.557 ms, "
        "median = 111.208 ms, percentile(90%) = 113.02 ms, percentile(95%) = 114.115 ms, "
        "percentile(99%) = 114.185 ms\n",
        111.208,
    ),
}
BANNERS = {"8003": "8.0.3", "8205": "8.2.5", "8601": "8.6.1", "100001": "10.0.1", "100400": "10.4.0",
           "101401": "10.14.1", "110000": "11.0.0", "110300": "11.3.0", "11.1.0.106": "11.1.0"}  # fmt: skip


@pytest.mark.parametrize("release", SAMPLES)
def test_the_median_of_gpu_compute_time_is_found(release):
    log, median = SAMPLES[release]
    assert read_median(log) == median


def test_a_log_without_a_summary_is_an_error():
    log = "[I] Total GPU Compute Time: 3.0 s\n[I] GPU Compute Time: the GPU latency\n[I] Latency: median = 3 ms\n"
    with pytest.raises(LatencyError, match='no "GPU Compute Time"'):
        read_median(log)


@pytest.mark.parametrize("code", BANNERS)
def test_versions_of_banners(code):
    assert decode_version(code) == BANNERS[code]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """Makes a stand-in of a release the program that the backend finds, on a machine with a GPU."""

    def make(release: str, fail: str = ""):
        text = DOUBLE.read_text(encoding="utf-8")
        text = text.replace('RELEASE = "8.6.1"', f'RELEASE = "{release}"').replace('FAIL = ""', f'FAIL = "{fail}"')
        program = tmp_path / "trtexec"
        program.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("PRUNET_TRTEXEC", raising=False)
        monkeypatch.setattr(trtexec_module, "gpu_name", lambda: "Tesla V100")
        return get_backend("trtexec")

    return make


def setting(dtype: str) -> Setting:
    return Setting(dtype=dtype, accelerator="cuda")


def engine_of(session) -> dict:
    return json.loads((Path(session.folder.name) / "model.engine").read_bytes().split(b"\n", 1)[0])


@pytest.mark.parametrize(
    ("release", "flags"),
    [
        ("8.0.3", {"--fp16", "--buildOnly", "--workspace"}),
        ("8.4.1", {"--fp16", "--buildOnly"}),
        ("8.6.1", {"--fp16", "--skipInference"}),
        ("10.4.0", {"--fp16", "--skipInference"}),
        ("11.3.0", {"--skipInference"}),
    ],
)
def test_fp16_on_every_release(backend, release, flags):
    engine = backend(release)
    engine.check(setting("fp16"))
    assert (engine.version, engine.device_name("cuda")) == (release, "Tesla V100")
    module = network()
    session = engine.prepare(module, SHAPE, setting("fp16"))
    assert set(engine_of(session)["options"]) == {"--onnx", "--saveEngine"} | flags
    if "--workspace" in flags:
        assert engine_of(session)["workspace"] == "10240"  # as published
    assert session.solo
    times = session.sample(30)
    assert len(times) == 30 and set(times) == {0.50, 0.51, 0.52}  # no warm-up run of 9 ms
    # only a strongly typed release is given a network in fp16, whose rounding shows
    error = check_output(session, module, SHAPE, "fp16")
    assert error > 1e-5 if release.startswith("11") else error < 1e-5


def test_a_visit_is_the_published_protocol(backend):
    """Default duration, default count, the median of all runs: nothing is asked for, nothing is left out."""
    session = backend("8.0.3").prepare(network(), SHAPE, setting("fp16"))
    assert len(session.visit(0.4)) == 300
    asked = json.loads((Path(session.folder.name) / "run_options.json").read_text())
    assert asked == ["--exportTimes", "--loadEngine"]
    assert len(session.visit(5.0)) == 500
    assert run_rounds([session], 0.4)[0].timing().median_ms == 0.51


def test_fp32_takes_no_precision_flag(backend):
    session = backend("8.6.1").prepare(network(), SHAPE, setting("fp32"))
    assert "--fp16" not in engine_of(session)["options"]


@pytest.mark.parametrize("release", ["10.4.0", "11.0.0"])
def test_bf16_where_the_release_has_it(backend, release):
    backend(release).check(setting("bf16"))


def test_bf16_is_refused_by_releases_without(backend):
    with pytest.raises(LatencyError, match="has no bf16"):
        backend("8.6.1").check(setting("bf16"))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("build", r"trtexec 8\.6\.1 failed \(exit status 1\): Failed to parse onnx file; Parsing model failed; Engine"),
        ("silent", "saved no engine"),
        ("times", "wrote no file that can be read"),
        ("median", "counts differently"),
        ("few", "timed 2 runs, 30 were asked for"),
    ],
)
def test_faults_of_the_program(backend, fail, message):
    with pytest.raises(LatencyError, match=message):
        backend("8.6.1", fail).prepare(network(), SHAPE, setting("fp16")).sample(30)


def test_no_program_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PRUNET_TRTEXEC", raising=False)
    monkeypatch.setattr(trtexec_module, "USUAL_PLACES", ())
    with pytest.raises(LatencyError, match=r"no program trtexec on PATH.*libnvinfer-bin.*PRUNET_TRTEXEC"):
        get_backend("trtexec").check(setting("fp16"))


def test_the_variable_names_the_program(backend, tmp_path, monkeypatch):
    backend("8.6.1")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PRUNET_TRTEXEC", str(tmp_path / "trtexec"))
    assert get_backend("trtexec").version == "8.6.1"
    monkeypatch.setenv("PRUNET_TRTEXEC", str(tmp_path / "absent"))
    with pytest.raises(LatencyError, match=r"PRUNET_TRTEXEC names .*absent, where no file is"):
        get_backend("trtexec").check(setting("fp16"))


def test_another_program_is_refused(tmp_path, monkeypatch):
    program = tmp_path / "trtexec"
    program.write_text(f"#!{sys.executable}\nprint('usage: other')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PRUNET_TRTEXEC", str(program))
    with pytest.raises(LatencyError, match=r"is no trtexec.*It said: usage: other"):
        get_backend("trtexec").check(setting("fp16"))
    program.chmod(0o644)
    with pytest.raises(LatencyError, match=r"cannot run .*trtexec"):
        get_backend("trtexec").check(setting("fp16"))


LOG = "Timing trace has 3 queries over 3 s\nGPU Compute Time: min = 1 ms, max = 3 ms, mean = 2 ms, median = 2 ms\n"


@pytest.mark.parametrize(
    ("text", "log", "message"),
    [
        ("[{}]", LOG, "without computeMs"),
        ("{}", LOG, "exported 0 runs"),
        ('[{"computeMs": 1}', LOG, "wrote no file that can be read"),
        ('[{"computeMs": 1}]', LOG, "exported 1 runs, its log says 3"),
        ('[{"computeMs": 1}]', "", "its log says nothing of how many count"),
        ('[{"computeMs": 1}]', LOG.replace("has 3", "has 0"), "its log says 0"),
    ],
)
def test_files_that_do_not_fit_their_log(tmp_path, text, log, message):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(LatencyError, match=message):
        read_times(path, log)


def test_only_the_counted_runs_are_read(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps([{"computeMs": t} for t in (9.0, 9.0, 3.0, 1.0, 2.0)]))
    assert read_times(path, LOG) == [3.0, 1.0, 2.0]


def test_an_output_that_is_not_finite_is_read(tmp_path):
    path = tmp_path / "output.json"
    path.write_text('[{ "name" : "nan", "dimensions" : "1x4", "values" : [ nan, -inf, 1.5, -nan ] }]')
    found = read_output(path)
    assert found.shape == (1, 4)
    assert str(found.tolist()) == "[[nan, -inf, 1.5, nan]]"
    path.write_text('[{ "name" : "y", "dimensions" : "1x5", "values" : [ 1 ] }]')
    with pytest.raises(LatencyError, match="cannot be read"):
        read_output(path)
