"""`measure` and `measure_together`: repeats, marks, groups, networks of timm."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.errors import LatencyError, SpecError, UnknownNameError
from prunet_zoo.latency import Backend, Record, Session, Setting, conditions, measure, measure_together, measurement
from prunet_zoo.latency.backends import example_input
from prunet_zoo.latency.commands import measure as command
from prunet_zoo.latency.conditions import Verdict, Watch
from prunet_zoo.latency.machine import Meanwhile, Snapshot
from prunet_zoo.latency.measurement import AGREE, Visit, settle
from prunet_zoo.latency.references import References
from prunet_zoo.latency.subject import load_subject, subject_groups
from prunet_zoo.latency.timing import Series, summarise
from prunet_zoo.models import create_model
from prunet_zoo.space import load_space

QUIET = Meanwhile(others=0.1, steal=0.0, throttled=0, load=0.5, pressure=0.0, governor="performance", mhz=3000.0)


class Scripted(Session):
    """Latencies from a list of levels, one a measurement's share of calls."""

    def __init__(self, levels, per_level=40, **options):
        super().__init__(lambda: None, **options)
        self.levels, self.per_level, self.calls = levels, per_level, 0

    def sample(self, n):
        level = self.levels[min(self.calls // self.per_level, len(self.levels) - 1)]
        self.calls += 1
        return [level] * n


class ScriptedBackend(Backend):
    name, install = "scripted", "nothing"
    dtypes = {"cpu": ("fp32",), "cuda": ("fp32",)}  # noqa: RUF012
    memory_formats = ("contiguous", "channels_last")

    def __init__(self, make=lambda module: Scripted([10.0])):
        self.make, self.prepared, self.most = make, [], 0

    @property
    def version(self):
        return "1"

    def device_name(self, accelerator):
        return "scripted device"

    @contextmanager
    def environment(self, setting):
        before = len(self.prepared)
        yield
        self.most = max(self.most, len(self.prepared) - before)

    def prepare(self, module, input_shape, setting):
        self.prepared.append((module, input_shape, setting))
        session = self.make(module)
        session._output = lambda: np.asarray(module.eval()(torch.from_numpy(example_input(input_shape))).detach())
        return session


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """A machine on which nothing else happens and the references always take the same time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        References, "__call__", lambda self: self.looks.append((10.0, 16.0, 200.0)) or (10.0, 16.0, 200.0)
    )
    monkeypatch.setattr(conditions, "meanwhile", lambda before, after: QUIET)


@pytest.fixture(scope="module")
def spec():
    return load_space("prunet_cpu_small").decode(load_space("prunet_cpu_small").largest(), "small")


def test_a_quiet_measurement_is_confirmed_once_and_not_marked(spec):
    record = measure(spec, ScriptedBackend(), batch=2, memory_format="channels_last", seconds=0.1)
    assert (record.median_ms, record.ci_low_ms, record.ci_high_ms) == (10.0, 10.0, 10.0)
    assert (record.disturbed, record.attempts, record.batch, record.memory_format) == ((), 2, 2, "channels_last")
    assert record.spec == spec.to_dict()
    assert record.clock["governor"] == "performance"
    assert record.clock["reference_us"] == {"clock": 10.0, "compute": 16.0, "cache": 200.0}
    assert record.fingerprint["device"] == "scripted device"
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    ("change", "threads", "reason"),
    [
        ({"steal": 0.2}, 1, "the hypervisor gave 20% of a core"),
        ({"throttled": 3}, 1, "the CPU was throttled for its heat 3 times"),
        ({"others": 2.0}, 2, "other processes used 2.0 cores, 0 were free"),
        ({"others": 2.0}, 1, "other processes used 2.0 cores, 1 were free"),
        ({"others": 1.1}, 1, None),  # they have the other core
        ({"others": None, "steal": None, "throttled": None, "load": None, "pressure": None}, 1, None),  # not Linux
    ],
)
def test_what_happened_on_the_machine_marks(spec, monkeypatch, change, threads, reason):
    seen = Meanwhile(**{**vars(QUIET), **change})
    monkeypatch.setattr(conditions, "meanwhile", lambda before, after: seen)
    monkeypatch.setattr(measurement, "usable_cores", lambda: 2.0)
    record = measure(spec, ScriptedBackend(), threads=threads, seconds=0.1, attempts=3)
    if reason is None:
        assert (record.disturbed, record.attempts) == ((), 2)
    else:
        assert len(record.disturbed) == 1
        assert record.disturbed[0].startswith(reason)
        assert record.attempts == 3


def test_a_slow_processor_marks_and_is_compared_with_what_the_machine_could_before(spec, monkeypatch):
    first = measure(spec, ScriptedBackend(), seconds=0.1)
    assert first.clock["remembered"]
    monkeypatch.setattr(
        References, "__call__", lambda self: self.looks.append((11.0, 17.6, 210.0)) or (11.0, 17.6, 210.0)
    )
    record = measure(spec, ScriptedBackend(), seconds=0.1, attempts=1)
    assert record.disturbed == (
        f"the processor was slower than its best in 100% of {record.rounds} rounds, in the middle by 10%",
    )
    assert record.clock["best_us"] == {"clock": 10.0, "compute": 16.0, "cache": 200.0}


def test_rounds_on_a_slow_processor_are_left_out(spec):
    """Every fifth round is slow and the look says so: the figure is of the others, and nothing is marked."""
    references = References()
    fast, slow = (10.0, 16.0, 200.0), (11.0, 18.0, 200.0)
    references.looks = [fast] * 40 + [slow] * 10
    series = Series(rounds=[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.9, 0.9]] * 6, wall_s=1.0, cpu_s=1.0)
    series.looks = [(fast, fast)] * 4 + [(fast, slow)]
    series.looks *= 6
    assert series.clean(references) == [True, True, True, True, False] * 6
    assert series.timing(references).median_ms == 1.0
    assert series.timing(references).n == 60
    watch = Watch(Setting(), 2.0, references, None)
    watch.stop()
    assert watch.judge(Session(lambda: None), series).reasons == ()
    series.looks = [(slow, slow)] * 30  # too few clean ones: all count, and it says so
    verdict = watch.judge(Session(lambda: None), series)
    assert verdict.timing.median_ms == pytest.approx(0.9)
    assert "the processor was slower than its best in 100% of 30 rounds, in the middle by 12%" in verdict.reasons


def test_time_taken_by_others_marks_one_thread_only(spec):
    series = Series(rounds=[[1.0]] * 20, wall_s=1.0, cpu_s=0.5)
    for in_thread, expected in ((True, ("other processes had the processor for 50% of the time",)), (False, ())):
        watch = Watch(Setting(), 2.0, None, None)
        watch.stop()
        assert watch.judge(Session(lambda: None, in_thread=in_thread), series).reasons == expected


@pytest.mark.parametrize(("accelerator", "solo", "marks"), [("cuda", False, True), ("cuda", True, False)])
def test_a_crowded_processor_marks_where_it_starts_the_runs(monkeypatch, accelerator, solo, marks):
    monkeypatch.setattr(conditions, "meanwhile", lambda before, after: Meanwhile(**{**vars(QUIET), "others": 2.0}))
    watch = Watch(Setting(accelerator=accelerator), 2.0, None, None)
    watch.stop()
    reasons = watch.judge(Session(lambda: None, solo=solo), Series(rounds=[[1.0]] * 20, solo=solo)).reasons
    assert reasons == (("other processes used 2.0 cores, 1 were free",) if marks else ())


def test_a_network_that_does_not_compute_is_not_measured(spec, monkeypatch):
    """Once a network, wherever arithmetic may leave its range."""
    backend = ScriptedBackend()
    monkeypatch.setattr(measurement, "fingerprint", lambda backend, setting: {"device": "a GPU", "hash": "0"})
    monkeypatch.setattr(measurement, "gpu_id", lambda: "0")
    monkeypatch.setattr(measurement, "GPU_WARM_SECONDS", 0.0)
    checked = []
    check = measurement.check_output
    monkeypatch.setattr(measurement, "check_output", lambda *args: checked.append(args[-1]) or check(*args))
    measure(spec, backend, seconds=0.0, accelerator="cuda")
    assert checked == ["fp32"]
    measure(spec, backend, seconds=0.0)  # fp32 on the CPU
    assert len(checked) == 1
    prepare = ScriptedBackend.prepare

    def overflown(self, module, input_shape, setting):
        session = prepare(self, module, input_shape, setting)
        session._output = lambda: np.full((1, spec.num_classes), np.nan)
        return session

    monkeypatch.setattr(ScriptedBackend, "dtypes", {"cpu": ("fp32", "fp16")})
    monkeypatch.setattr(ScriptedBackend, "prepare", overflown)
    with pytest.raises(LatencyError, match=r"small with backend 'scripted': .* not finite.*measure it in fp32"):
        measure(spec, backend, dtype="fp16", seconds=0.0)


def test_drift_and_a_wide_interval_are_doubts():
    watch = Watch(Setting(), 2.0, None, None)
    watch.stop()
    steps = Series(rounds=[[1.0]] * 15 + [[1.1]] * 15)
    assert "one half of the time was 10.0% slower than the other" in watch.judge(Session(lambda: None), steps).doubts
    wide = Series(rounds=[[1.0 + 0.1 * i] for i in range(15)])
    assert any("the interval is ±" in doubt for doubt in watch.judge(Session(lambda: None), wide).doubts)


def test_a_verdict_needs_the_end():
    with pytest.raises(RuntimeError, match="stop comes before"):
        Watch(Setting(), 2.0, None, None).judge(Session(lambda: None), Series(rounds=[[1.0]]))


def _visit(ms, *reasons):
    return Visit(Series(rounds=[[ms]] * 3), Verdict(summarise([[ms]] * 3), reasons, (), {}), None)


def test_the_fastest_two_must_agree():
    agreed = settle([_visit(1.0, "a"), _visit(1.3), _visit(1.01)])
    assert (agreed.reasons, agreed.timing.n, agreed.timing.rounds) == ((), 9, 9)  # of all
    assert 1.0 <= agreed.timing.median_ms <= agreed.timing.ci_high_ms <= 1.01  # of those that agree
    assert (agreed.timing.p10_ms, agreed.timing.p90_ms) == (1.0, 1.3)
    assert agreed.clock["visits_ms"] == [1.0, 1.3, 1.01]
    assert settle([_visit(1.0, "a"), _visit(1.01, "a", "b")]).reasons == ("a",)
    alone = settle([_visit(1.1), _visit(1.0, "a"), _visit(1.2)])
    assert alone.reasons == ("a", "no other of 3 measurements agrees: the next was 10.0% slower")
    assert (alone.timing.median_ms, alone.timing.ci_high_ms, alone.timing.p90_ms) == (1.0, 1.0, 1.2)
    assert settle([_visit(1.0)]).reasons == ()  # one was asked for


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 2)), min_size=1, max_size=5))
@settings(deadline=None)
def test_unmarked_means_that_another_confirms_and_none_was_faster(attempts):
    settled = settle([_visit(ms, *["reason"] * count) for ms, count in attempts])
    fastest, *others = sorted(ms for ms, _ in attempts)
    assert fastest <= settled.timing.median_ms <= fastest * (1 + AGREE) * (1 + 1e-12)
    if not settled.reasons and others:
        assert others[0] <= fastest * (1 + AGREE)


def test_together_in_order_with_progress_and_repeats_of_the_disturbed_alone(spec, monkeypatch):
    steady, unsteady = Scripted([10.0]), Scripted([12.0, 10.0], per_level=25)
    sessions = iter([steady, unsteady])
    backend = ScriptedBackend(lambda module: next(sessions))
    seen, kept = [], []
    records = measure_together(
        [spec, "prunet_p0"], backend, 32, seconds=0.15, progress=lambda *row: seen.append(row), keep=kept.append
    )
    assert [r.spec_name for r in records] == ["small", "prunet_p0"]
    assert kept == records
    assert (records[0].attempts, records[0].disturbed) == (2, ())
    assert (records[1].attempts > 2, records[1].disturbed) == (True, ())
    assert records[1].median_ms == 10.0
    assert unsteady.calls > steady.calls
    assert seen == [(0, 2, "small, prunet_p0"), (2, 2, "done")]
    assert measure_together([], backend) == []


def test_groups_fit_into_memory(spec, monkeypatch):
    monkeypatch.setattr("prunet_zoo.latency.subject.MAX_PARAMS_TOGETHER", 3 * spec.params())
    groups = list(subject_groups([spec] * 7, None))
    assert [len(group) for group in groups] == [3, 3, 1]
    backend = ScriptedBackend()
    assert len(measure_together([spec] * 7, backend, seconds=0.0)) == 7
    assert backend.most == 3
    assert len(list(subject_groups(["prunet_p0"] * 2, 32))) == 2  # each alone is larger than the limit


def test_solo_sessions_make_all_runs_in_one_call(spec):
    class Solo(Session):
        calls = 0

        def sample(self, n):
            self.calls += 1
            return [3.0] * n

    session = Solo(lambda: None, solo=True)
    record = measure(spec, ScriptedBackend(lambda module: session), seconds=0.1)
    assert (session.calls, record.attempts, record.warmup_runs, record.n) == (2, 2, 0, 600)
    assert record.median_ms == 3.0


def test_on_a_gpu_its_state_counts_and_the_warm_up_is_long(spec, monkeypatch):
    asked = []
    states = iter([{"clocks_sm": 1800.0}, {"clocks_sm": 1500.0, "throttled": ["power cap"]}])
    monkeypatch.setattr(conditions.nvidia, "gpu_state", lambda gpu: asked.append(gpu) or next(states))
    monkeypatch.setattr(conditions.nvidia, "other_processes", lambda gpu: [7])
    monkeypatch.setattr(measurement, "gpu_id", lambda: "GPU-x")
    monkeypatch.setattr(measurement, "fingerprint", lambda backend, setting: {"device": "a GPU", "hash": "0"})
    monkeypatch.setattr(measurement, "GPU_WARM_SECONDS", 0.01)
    record = measure(spec, ScriptedBackend(), accelerator="cuda", seconds=0.1, attempts=1)
    assert asked == ["GPU-x", "GPU-x"]
    assert record.disturbed == (
        "GPU throttled: power cap",
        "GPU clock went from 1800 to 1500 MHz",
        "1 other process on the GPU",
    )
    assert [state["clocks_sm"] for state in record.clock["gpu"]] == [1800.0, 1500.0]
    assert record.clock["gpu_others"] == [7]
    assert "reference_us" not in record.clock
    assert record.warmup_runs >= 5


def test_networks_of_timm():
    record = measure("timm/lcnet_050", ScriptedBackend(), seconds=0.0)
    assert (record.spec_name, record.spec_hash, record.spec, record.input_size) == (
        "timm/lcnet_050",
        "",
        None,
        (224, 224),
    )
    assert measure("timm/lcnet_050", ScriptedBackend(), (64, 96), seconds=0.0).input_size == (64, 96)
    with pytest.raises(UnknownNameError, match=r"unknown network of timm 'resnet5'; did you mean .*'resnet50'"):
        measure("timm/resnet5", ScriptedBackend())
    with pytest.raises(UnknownNameError, match=r"unknown network of timm 'lcnet_050\.bogus'; .*lcnet_050"):
        measure("timm/lcnet_050.bogus", ScriptedBackend())
    with pytest.raises(LatencyError, match=r"tiny_patch16_224 does not run on input of 96×96 px .*own size is 224×224"):
        measure("timm/vit_tiny_patch16_224", ScriptedBackend(), 96)
    state = torch.random.get_rng_state()
    one, two = (load_subject("timm/lcnet_050") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    backend = ScriptedBackend()
    measure_together([("timm/lcnet_050", 32), ("prunet_p0", (64, 32))], backend, seconds=0.0)
    assert [shape for _, shape, _ in backend.prepared] == [(1, 3, 32, 32), (1, 3, 64, 32)]


def test_wrong_arguments(spec):
    with pytest.raises(LatencyError, match="attempts must be at least 1, got 0"):
        measure(spec, ScriptedBackend(), attempts=0)
    with pytest.raises(SpecError, match="input size"):
        measure(spec, ScriptedBackend(), -3)
    with pytest.raises(LatencyError, match=r"needs its NetSpec as \.spec; Linear has none"):
        measure(torch.nn.Linear(1, 1), ScriptedBackend())


def test_a_module_stays_as_it_was(spec):
    model = create_model(spec).train()
    measure(model, "torch", seconds=0.0, attempts=1)
    assert model.training


def test_the_line_says_that_it_was_disturbed(spec):
    record = measure(spec, ScriptedBackend(), seconds=0.0)
    assert "10 ms (95% interval 10 to 10; p10 10, p90 10, " in command.describe(record)
    assert "DISTURBED" not in command.describe(record)
    marked = record.model_copy(update={"disturbed": ("one thing", "another"), "attempts": 3})
    assert command.describe(marked).endswith("\n  DISTURBED (3 attempts): one thing; another")


def test_counters_that_a_system_lacks_are_none():
    before, after = Snapshot(0.0, 0.0, None, None, None), Snapshot(1.0, 0.5, None, None, None)
    from prunet_zoo.latency.machine import meanwhile

    seen = meanwhile(before, after)
    assert (seen.others, seen.steal, seen.throttled) == (None, None, None)
