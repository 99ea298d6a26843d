"""Fitting a predictor: known rates are found again, what is left out is left out, and bad measurements are refused."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import LatencyError, SpecError
from prunet_zoo.files import WriteError
from prunet_zoo.latency import LatencyTable, Predictor, build_table, fit_device, read_measurements
from prunet_zoo.latency.fit import FUSED_GPU, Observation, Prior, Subject, fit_rates, leave_one_out
from prunet_zoo.latency.kernels import Runtime, block_kernels
from prunet_zoo.latency.record import Record, append_record
from prunet_zoo.latency.roofline import Peaks, Rates
from prunet_zoo.space import load_space
from prunet_zoo.spec import BlockSpec, load_spec

ROOT = Path(__file__).parents[2]
PEAKS = Peaks(matrix_tflops=100.0, vector_tflops=20.0, bandwidth_gbs=500.0, units=40, align=8)
TRUE = Rates(overhead_us=6.0, matrix=0.6, depthwise=0.02, memory=0.5)  # each bounds some kernels
LOOSE = Prior(FUSED_GPU.rates, dict.fromkeys(FUSED_GPU.spread, 50.0))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("latency_tool_fit", ROOT / "tools" / "latency.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def status(tool, argv):
    with pytest.raises(SystemExit) as ended:
        run_plain_tool(tool.main, argv, stopped=tool.STOPPED)
    return ended.value.code


def networks(count=12, seed=0):
    space, rng = load_space("prunet_gpu"), random.Random(seed)
    return [space.decode(space.sample(rng), f"net-{i}") for i in range(count)]


def subject(rates=TRUE, count=12, noise=0.0, peaks=PEAKS, seed=0):
    """Networks whose latencies the model itself gives."""
    specs = networks(count)
    shapes = [(s.input_size, s.input_size) for s in specs]
    first = Subject.of(
        Runtime(), peaks, "fp16", 1, [Observation(s, p, 1.0) for s, p in zip(specs, shapes, strict=True)]
    )
    factors = np.exp(np.random.default_rng(seed).normal(0, noise, count)) if noise else np.ones(count)
    times = first.predict(rates) * factors
    rows = [Observation(s, p, float(ms)) for s, p, ms in zip(specs, shapes, times, strict=True)]
    return Subject.of(Runtime(), peaks, "fp16", 1, rows)


def test_latencies_of_the_model_are_predicted_exactly():
    (fitted,) = fit_rates([subject()], LOOSE)
    for name in LOOSE.spread:
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name
    (report,) = leave_one_out([subject()], LOOSE)
    assert report.worst < 0.01
    assert len(report.networks) == 12


def test_the_prior_holds_what_the_figures_do_not_tell():
    tight = Prior(FUSED_GPU.rates, dict.fromkeys(FUSED_GPU.spread, 1e-4))
    (fitted,) = fit_rates([subject()], tight)
    for name in tight.spread:
        assert getattr(fitted, name) == pytest.approx(getattr(FUSED_GPU.rates, name), rel=0.01)


def test_two_devices_tell_of_each_other():
    """A device with four noisy networks is predicted better with one of twelve clean ones beside it."""
    few = subject(count=4, noise=0.2, seed=3)
    clean = subject()
    alone = clean.predict(fit_rates([few], FUSED_GPU)[0])
    together = clean.predict(fit_rates([few, clean], FUSED_GPU)[0])
    truth = clean.predict(TRUE)
    assert np.abs(together / truth - 1).mean() < np.abs(alone / truth - 1).mean()


def test_what_is_left_out_is_not_seen(monkeypatch):
    """Each fit of leave_one_out lacks the architecture that it predicts, in every subject and at every input size."""
    from prunet_zoo.latency import fit

    spec = networks(4)[0]
    one = subject(count=4)
    twice = Subject.of(
        Runtime(), PEAKS, "fp16", 1, [*one.observations, Observation(spec.replace(name="again"), (320, 320), 2.0)]
    )
    seen = []
    real = fit.fit_rates

    def spy(subjects, prior):
        seen.append([{o.hash for o in s.observations} for s in subjects])
        return real(subjects, prior)

    monkeypatch.setattr(fit, "fit_rates", spy)
    reports = fit.leave_one_out([one, twice], FUSED_GPU)
    every = {o.hash for o in one.observations}
    assert [[every - h for h in sets] for sets in seen] == [[{o.hash}] * 2 for o in one.observations]
    assert [len(r.networks) for r in reports] == [4, 5]


def test_a_changed_figure_does_not_change_its_own_prediction():
    before = subject(noise=0.05)
    rows = list(before.observations)
    rows[0] = Observation(rows[0].spec, rows[0].input_size, rows[0].ms * 3)
    after = Subject.of(Runtime(), PEAKS, "fp16", 1, rows)
    (one,), (other,) = leave_one_out([before], FUSED_GPU), leave_one_out([after], FUSED_GPU)
    assert one.networks[0].left_out_ms == other.networks[0].left_out_ms
    assert one.networks[1].left_out_ms != other.networks[1].left_out_ms


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_latency_that_is_none_is_refused(ms):
    with pytest.raises(LatencyError, match="positive latencies, got"):
        Subject.of(Runtime(), PEAKS, "fp16", 1, [Observation(load_spec("prunet_p0"), (224, 224), ms)])


def test_too_few_networks_are_refused():
    with pytest.raises(LatencyError, match="at least 4 different networks, got 3"):
        leave_one_out([subject(count=3)], FUSED_GPU)


def record(net, ms, **changes):
    """A record as `measure` makes it."""
    data = {
        "median_ms": ms, "p10_ms": ms, "p90_ms": ms, "ci_low_ms": ms, "ci_high_ms": ms, "n": 9, "rounds": 3,
        "warmup_runs": 2, "interrupted": 0, "spec_name": net.name, "spec_hash": net.hash, "spec": net.to_dict(),
        "input_size": (net.input_size, net.input_size), "device": "GPU 9", "accelerator": "cuda",
        "backend": "trtexec", "backend_version": "10.0", "dtype": "fp16", "batch": 1, "threads": 1,
        "memory_format": "contiguous", "disturbed": (), "attempts": 1, "clock": {}, "fingerprint": {},
        "date": "2026-11-20T00:00:00+00:00",
    }  # fmt: skip
    return Record(**{**data, **changes})


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "records.jsonl"
    for observation in subject(count=6, noise=0.03).observations:
        append_record(path, record(observation.spec, observation.ms))
    return path


def test_records_become_a_predictor(tool, log, tmp_path, capsys):
    out = tmp_path / "mine.json"
    argv = ["fit", str(log), "--out", str(out), "--like", "v100-tensorrt-fp16", "--bandwidth-gbs", "500"]
    assert tool.main(argv) == 0
    printed = capsys.readouterr().out
    predictor = Predictor.load(out)
    fit = predictor.model.fit
    assert f"mean error {fit.mean_abs:.1%}, worst {fit.worst:.1%}" in printed
    assert [n.name for n in fit.networks] == [f"net-{i}" for i in range(6)]
    assert printed.count(" ms measured ") == 6
    about = predictor.describe()
    assert (about["predictor"], about["device"], about["backend"]) == ("mine", "GPU 9", "trtexec")
    assert predictor.model.peaks.bandwidth_gbs == 500
    assert about["sources"]["peaks"] == "bandwidth_gbs given; the others of v100-tensorrt-fp16"
    for network, spec in zip(fit.networks, networks(6), strict=True):
        assert predictor(spec) == pytest.approx(network.measured_ms, rel=0.15)


def test_fit_prints_json_alone(tool, log, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert tool.main(["fit", str(log), "--out", str(out), "--name", "nine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert Predictor.load(out).name == "nine"


def test_of_several_records_the_median_counts(log):
    spec = networks(1)[0]
    for factor in (3.0, 1.1):
        append_record(log, record(spec, read_measurements(log).observations[0].ms * factor))
    first = [json.loads(line)["median_ms"] for line in log.read_text().splitlines()]
    found = read_measurements(log).observations
    assert len(found) == 6
    assert found[0].ms == sorted([first[0], first[6], first[7]])[1]


def test_disturbed_records_and_networks_of_timm_are_left_out(tool, log, tmp_path, capsys):
    spec = networks(8)[7]
    append_record(log, record(spec, 1.0, disturbed=("load 9",)))
    append_record(log, record(spec, 1.0, spec=None, spec_hash="", spec_name="timm/resnet18"))
    assert len(read_measurements(log).observations) == 6
    assert tool.main(["fit", str(log), "--out", str(tmp_path / "m.json")]) == 0
    assert "records left out: 1 disturbed, 1 without a spec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"), [("device", "GPU 8"), ("backend", "tensorrt"), ("dtype", "fp32"), ("batch", 2)]
)
def test_records_of_two_places_are_refused(log, field, value):
    append_record(log, record(networks(1)[0], 1.0, **{field: value}))
    with pytest.raises(LatencyError, match=f"holds records of {field} .* and {value!r}"):
        read_measurements(log)


@pytest.mark.parametrize(
    ("like", "backend", "message"),
    [
        ("v100-pytorch-fp16", "trtexec", "fuses layers, but 'v100-pytorch-fp16' .* layer by layer"),
        ("v100-tensorrt-fp16", "torch", "runs layer by layer, but"),
    ],
)
def test_a_likeness_of_another_kind_is_refused(tmp_path, like, backend, message):
    path = tmp_path / "records.jsonl"
    for spec in networks(4):
        append_record(path, record(spec, 1.0, backend=backend))
    with pytest.raises(LatencyError, match=message):
        fit_device(read_measurements(path), "x", Predictor.load(like))


def test_peaks_of_another_dtype_are_refused_unless_given(tmp_path):
    path = tmp_path / "records.jsonl"
    for spec in networks(4):
        append_record(path, record(spec, 1.0, dtype="fp32"))
    measured, like = read_measurements(path), Predictor.load("v100-tensorrt-fp16")
    with pytest.raises(LatencyError, match=r"in fp32, but the peaks of 'v100-.*' are those of fp16; .*--peak-tflops N"):
        fit_device(measured, "x", like)
    assert fit_device(measured, "x", like, {"matrix_tflops": 15.7}).peaks.matrix_tflops == 15.7


def test_networks_that_the_likeness_was_fitted_to_are_told(tool, log, tmp_path, capsys):
    out, like = tmp_path / "mine.json", ["--like", "v100-tensorrt-fp16"]
    assert tool.main(["fit", str(log), "--out", str(out), *like]) == 0
    assert "not fully left out" not in capsys.readouterr().out
    append_record(log, record(load_spec("prunet_p0"), 0.7, input_size=(224, 224)))
    assert tool.main(["fit", str(log), "--out", str(out), *like]) == 0  # over its own predictor
    told = "v100-tensorrt-fp16, whose rates are expected, was fitted to prunet_p0 too"
    assert f"not fully left out: {told}" in capsys.readouterr().out
    assert told in Predictor.load(out).model.sources["left out"]


@pytest.mark.parametrize("content", [None, '{"kind": "spec"}'])
def test_fit_writes_over_nothing_but_predictors(tool, tmp_path, capsys, content):
    path = tmp_path / "records.json"
    for spec in networks(4):
        append_record(path, record(spec, 1.0))
    out = tmp_path / "mine.json"
    if content is not None:
        out.write_text(content)
    else:
        out.symlink_to(path)
    before = out.read_text()
    assert status(tool, ["fit", str(path), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("exists and is no predictor" if content else "is the file of the measurements") in line
    assert out.read_text() == before


def test_inductor_runs_batchnorm_apart_from_its_convolution(tmp_path):
    path = tmp_path / "records.jsonl"
    for spec in networks(4):
        append_record(path, record(spec, 1.0, backend="torch-compile"))
    runtime = fit_device(read_measurements(path), "x").runtime
    block = BlockSpec(type="fused_irb", out_channels=16, hidden=32, act="silu")
    names = [kernel.name for kernel in block_kernels(block, 16, (8, 8), runtime)]
    assert names == ["expand", "expand.norm", "project", "project.norm"]


def test_a_likeness_of_another_accelerator_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    for spec in networks(4):
        append_record(path, record(spec, 1.0, accelerator="cpu", backend="openvino", dtype="fp32"))
    with pytest.raises(LatencyError, match="of a 'cpu' device"):
        fit_device(read_measurements(path), "x", Predictor.load("v100-tensorrt-fp16"))


def test_a_latency_table_serves_too(tmp_path, space, make_backend, effort):
    path = tmp_path / "table.jsonl"
    table = build_table(space, path, backend=make_backend(), effort=effort)
    rows = [json.loads(line) for line in path.read_text().splitlines()]  # this machine may be busy, the device is fake
    path.write_text("".join(json.dumps({**r, "slow": False} if "slow" in r else r) + "\n" for r in rows))
    measured = read_measurements(path)
    assert [o.ms for o in measured.observations] == list(table.networks.values())
    assert (measured.place.device, measured.place.accelerator) == ("fake device", "cpu")
    model = fit_device(measured, "fake")
    assert len(model.fit.networks) == len(LatencyTable.load(path).networks)
    smallest, largest = min(table.networks, key=table.networks.get), space.largest()
    predicted = [Predictor(model)(space.decode(e)) for e in (smallest, largest)]
    assert predicted[0] < predicted[1]


def test_networks_measured_on_a_slow_processor_are_left_out(tmp_path, space, make_backend, effort):
    path = tmp_path / "table.jsonl"
    build_table(space, path, backend=make_backend(), effort=effort)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    encodings = list(dict.fromkeys(json.dumps(row["encoding"]) for row in rows if row["kind"] == "network"))

    def mark(slow):
        marked = [{**r, "slow": json.dumps(r["encoding"]) in slow} if r["kind"] == "network" else r for r in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))

    mark(encodings[:1])
    measured = read_measurements(path)
    assert len(measured.observations) == len(encodings) - 1
    assert measured.skipped == {"measured on a slow processor": 1}
    mark(encodings)
    with pytest.raises(LatencyError, match=r"was slow whenever networks .* run the command that built it again"):
        read_measurements(path)


def test_the_memory_format_is_kept_and_told(tool, log, tmp_path, capsys):
    path, out = tmp_path / "last.jsonl", tmp_path / "mine.json"
    for spec in networks(4):
        append_record(path, record(spec, 1.0, memory_format="channels_last"))
    assert tool.main(["fit", str(path), "--out", str(out)]) == 0
    predictor = Predictor.load(out)
    assert predictor.model.memory_format == predictor.describe()["memory_format"] == "channels_last"
    capsys.readouterr()
    assert tool.main(["predict", "prunet_p0", "--device", str(out)]) == 0
    assert ", channels_last, " in capsys.readouterr().out
    data = json.loads(out.read_text())
    del data["memory_format"]  # as files were before
    out.write_text(json.dumps(data))
    assert Predictor.load(out).model.memory_format == "contiguous"


def test_missing_records_are_told_where_the_predictor_exists(tool, log, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert tool.main(["fit", str(log), "--out", str(out)]) == 0
    capsys.readouterr()
    assert status(tool, ["fit", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_a_table_without_networks_is_refused(tmp_path, space, make_backend, effort):
    path = tmp_path / "table.jsonl"
    build_table(space, path, backend=make_backend(), effort=effort)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"network"' not in line))
    with pytest.raises(LatencyError, match="no whole networks yet"):
        read_measurements(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "no record to fit to|not a log"), ("hello\n", "not a log|no record|damaged")],
)
def test_a_file_of_something_else_is_refused(tool, tmp_path, capsys, content, message):
    import re

    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    assert status(tool, ["fit", str(path), "--out", str(tmp_path / "o.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "mine.txt"], "ends in .json, got 'mine.txt'"),
        (["--out", "mine.json", "--peak-tflops", "-1"], "--peak-tflops takes a positive number, got -1"),
        (["--out", "mine.json", "--units", "0"], "--units takes a positive number, got 0"),
        (["--out", "mine.json", "--like", "v100"], "unknown latency predictor 'v100'"),
    ],
)
def test_fit_refuses_in_one_line(tool, log, capsys, argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert status(tool, ["fit", str(log), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_record_with_a_damaged_spec_is_refused(log):
    spec = networks(1)[0]
    append_record(log, record(spec, 1.0, spec={**spec.to_dict(), "stages": []}))
    with pytest.raises(SpecError, match="stages"):
        read_measurements(log)


def test_a_failed_write_leaves_the_old_predictor(tool, log, tmp_path, monkeypatch):
    out = tmp_path / "mine.json"
    assert tool.main(["fit", str(log), "--out", str(out)]) == 0
    old = out.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(WriteError):
        tool.main(["fit", str(log), "--out", str(out)])
    assert out.read_text() == old
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".jsonl", ".lock"}


def test_the_shipped_devices_are_what_the_benchmark_fits(load_benchmark):
    bench = load_benchmark("latency_published")
    for stack in bench.VARIANTS:
        for model in bench.device_models(stack):
            shipped = Predictor.load(model.name).model
            assert shipped.model_dump(exclude={"rates", "fit"}) == model.model_dump(exclude={"rates", "fit"})
            for name, value in model.rates.model_dump().items():
                assert getattr(shipped.rates, name) == (value and pytest.approx(value, rel=1e-3)), name
            for mine, again in zip(shipped.fit.networks, model.fit.networks, strict=True):
                assert mine.left_out_ms == pytest.approx(again.left_out_ms, rel=1e-3)
    committed = json.loads((ROOT / "benchmarks" / "results" / "latency_published.json").read_text())["published"]
    for column in ("v100_tensorrt8_fp16_b1", "a100_tensorrt8_fp16_b1"):
        assert committed[column]["mean_abs"] <= 0.08
        assert committed[column]["worst"] <= 0.15
        assert committed[column]["mean_abs"] < committed[column]["baseline"]["mean_abs"]
    for name in ("v100", "a100"):
        fit = Predictor.load(f"{name}-tensorrt-fp16").model.fit
        assert committed[f"{name}_tensorrt8_fp16_b1"]["mean_abs"] == fit.mean_abs
