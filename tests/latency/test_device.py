"""Fingerprints and what the system tells: on text as Linux and nvidia-smi write it."""

from __future__ import annotations

import json
import math
import os
import platform
import stat
import subprocess

import pytest

from prunet_zoo.latency import Setting, fingerprint, get_backend, list_backends, nvidia, references
from prunet_zoo.latency.backends.cuda import gpu_name
from prunet_zoo.latency.commands.setting import BACKENDS
from prunet_zoo.latency.device import cgroup_quota, cpu_flags, gpu_id, is_virtual, usable_cores
from prunet_zoo.latency.machine import Snapshot, cpu_seconds, highest_mhz, meanwhile, pressure, snapshot
from prunet_zoo.latency.references import References, recall, reference_file, reference_key, remember

EPYC = """processor	: 0
model name	: AMD EPYC
flags		: fpu vme fma hypervisor avx2 avx512f avx512bw avx512_vnni avx512_bf16
"""
GRACE = "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd asimdhp asimddp sve sve2 i8mm bf16\n"
STAT = """cpu  2498104 519239 368648 1068630 75672 0 3156 4702 0 0
cpu0 1065028 261058 159324 758379 21040 0 368 2338 0 0
cpu12 10 0 20 70 0 30 40 50 0 0
intr 15316871 0
"""
IDLE_V100 = "Tesla V100-SXM2-16GB, 535.104.05, 16384, 135, 1530, 0x0000000000000001, 34, Enabled\n"
HOT_A100 = "NVIDIA A100-SXM4-40GB, 550.54.14, 40960, 1095, 1410, 0x0000000000000024, 84, Disabled\n"
GEFORCE = "NVIDIA GeForce GTX 1050, 470.82, 4040, [N/A], [N/A], [Not Supported], 45, [N/A]\n"


def test_a_fingerprint_is_complete_stable_and_tells_no_names():
    backend = get_backend("torch")
    one, two = (fingerprint(backend, Setting()) for _ in range(2))
    assert one == two
    assert json.loads(json.dumps(one)) == one
    assert {
        "device",
        "cores",
        "memory_gib",
        "flags",
        "kernel",
        "python",
        "torch",
        "backend_version",
        "governor",
    } <= set(one)
    assert one["gpu"] is None
    assert one["usable_cores"] <= one["cores"]
    text = json.dumps(one)
    assert platform.node() not in text or len(platform.node()) < 3
    assert fingerprint(backend, Setting(threads=2, batch=8))["hash"] == one["hash"]  # of the hardware


def test_the_hash_is_of_the_hardware(monkeypatch):
    backend = get_backend("torch")
    before = fingerprint(backend, Setting())
    monkeypatch.setattr("platform.release", lambda: "99.0")
    assert fingerprint(backend, Setting())["hash"] == before["hash"]
    monkeypatch.setattr("prunet_zoo.latency.device.usable_cores", lambda: 0.5)
    assert fingerprint(backend, Setting())["hash"] != before["hash"]


def test_cpu_flags():
    assert cpu_flags(EPYC) == ["avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"]
    assert cpu_flags(GRACE) == ["asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"]
    assert cpu_flags("") == []
    assert (is_virtual(EPYC), is_virtual(EPYC.replace("hypervisor", "")), is_virtual(GRACE)) == (True, False, None)


def test_cgroup_quota(tmp_path):
    inner = tmp_path / "user.slice" / "job"
    inner.mkdir(parents=True)
    groups = "0::/user.slice/job\n"
    assert cgroup_quota(tmp_path, groups) == math.inf
    (inner / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path, groups) == math.inf
    (inner.parent / "cpu.max").write_text("150000 100000\n")  # the group around it
    assert cgroup_quota(tmp_path, groups) == 1.5
    (inner / "cpu.max").write_text("50000 100000\n")
    assert cgroup_quota(tmp_path, groups) == 0.5
    old = tmp_path / "cpu" / "docker" / "x"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("200000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path, "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n") == 2.0
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_quota(tmp_path, "3:cpu,cpuacct:/docker/x\n") == math.inf
    assert 0 < usable_cores() <= (os.cpu_count() or 1)


def test_proc_files():
    hertz = os.sysconf("SC_CLK_TCK")
    first = 1065028 + 261058 + 159324 + 368
    assert cpu_seconds(STAT) == ((first + 10 + 20 + 30 + 40) / hertz, {"cpu0": 2338 / hertz, "cpu12": 50 / hertz})
    assert cpu_seconds(STAT, {0, 1}) == (first / hertz, {"cpu0": 2338 / hertz})  # what others do elsewhere is no matter
    assert cpu_seconds("") == cpu_seconds(STAT, {1}) == (None, None)
    text = "some avg10=7.64 avg60=10.80 avg300=13.53 total=8301638273\nfull avg10=1.00 avg60=0 avg300=0 total=0\n"
    assert pressure(text) == 7.64
    assert pressure("") is None
    assert highest_mhz(["1500000\n", "2600000\n", "<unknown>\n"]) == 2600.0
    assert highest_mhz([]) is None


def test_meanwhile_is_the_difference():
    before = Snapshot(10.0, 1.0, 50.0, {"cpu0": 2.0, "cpu1": 1.0}, 4)
    seen = meanwhile(before, Snapshot(12.0, 2.5, 54.5, {"cpu0": 2.2, "cpu1": 1.1}, 5))
    assert seen.others == pytest.approx(1.5)  # 4.5 s of all, 1.5 s its own, in 2 s
    assert seen.steal == pytest.approx(0.1)  # of the core that lost most
    assert seen.throttled == 1
    here = snapshot()
    assert meanwhile(here, snapshot()).others is None or meanwhile(here, snapshot()).others >= 0


@pytest.mark.parametrize(
    ("text", "sm", "throttled"),
    [(IDLE_V100, 135.0, []), (HOT_A100, 1095.0, ["power cap", "software thermal slowdown"]), (GEFORCE, None, [])],
)
def test_the_answer_of_nvidia_smi(text, sm, throttled):
    state = nvidia.parse_state(text)
    assert (state["clocks_sm"], state["throttled"]) == (sm, throttled)
    assert state["idle"] is (text == IDLE_V100)
    assert isinstance(state["name"], str)
    assert state["temperature_gpu"] in (34.0, 84.0, 45.0)


@pytest.mark.parametrize("text", ["", "No devices were found\n", IDLE_V100 * 2])
def test_another_answer_is_an_error(text):
    with pytest.raises(ValueError, match="one line of 8 values was expected"):
        nvidia.parse_state(text)


def test_processes_of_nvidia_smi():
    assert nvidia.parse_processes("1234, 512\n77, [N/A]\n") == [1234, 77]
    assert nvidia.parse_processes("") == []
    assert nvidia.parse_processes("No running processes found\n") == []


def test_what_disturbs_a_gpu():
    quiet = {"clocks_sm": 1410.0, "throttled": [], "idle": False}
    assert nvidia.gpu_reasons([], None, 0.02) == []
    assert nvidia.gpu_reasons([quiet, quiet], [], 0.02) == []
    assert nvidia.gpu_reasons([{"nvidia_smi": "not found"}] * 2, None, 0.02) == []
    assert nvidia.gpu_reasons([{**quiet, "clocks_sm": None}, quiet], [], 0.02) == []
    assert nvidia.gpu_reasons([quiet, quiet], [3, 4], 0.02) == ["2 other processes on the GPU"]


def test_a_gpu_that_wakes_up_and_goes_to_sleep_is_not_disturbed():
    idle, waking, busy, slow = (
        nvidia.parse_state(IDLE_V100.replace(" 135,", f" {mhz},")) for mhz in (135, 900, 1530, 1380)
    )
    for state in (waking, busy, slow):
        state["idle"] = False
    assert nvidia.gpu_reasons([idle, waking, busy, busy, idle], [], 0.02) == []
    assert nvidia.gpu_reasons([idle, busy, slow, busy], [], 0.02) == ["GPU clock went from 1530 to 1380 MHz"]
    hot = nvidia.parse_state(HOT_A100)
    assert nvidia.gpu_reasons([{**hot, "idle": True}], [], 0.02) == []
    assert nvidia.gpu_reasons([hot], [], 0.02) == ["GPU throttled: power cap, software thermal slowdown"]


def test_nvidia_smi_is_asked_as_a_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.gpu_state("0") == {"nvidia_smi": "not found"}
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f"*--id=9*) echo 'Unable to determine the device handle' >&2; exit 6;;\n"
        f"*compute-apps*) echo '{os.getpid()}, 300'; echo '{os.getppid()}, 10'; echo '999999999, 1';;\n"
        f"*--id=1*) echo '{HOT_A100.strip()}';;\n"
        "*) echo 'Unable to determine the device handle' >&2; exit 6;;\nesac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    state = nvidia.gpu_state("1")
    assert state["driver_version"] == "550.54.14"
    assert nvidia.other_processes("1") == [os.getppid()]  # not this one, none of the host's that is not seen here
    assert nvidia.gpu_state("9")["nvidia_smi"].startswith("failed: ")
    assert nvidia.other_processes("9") is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    program.write_text("#!/bin/sh\necho $*\n")
    assert gpu_name().endswith("--id=1")

    def hang(*args, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "timed out" in nvidia.gpu_state("1")["nvidia_smi"]


def test_which_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu_id() == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_id() == "0"


def test_the_option_lists_every_backend():
    assert sorted(BACKENDS) == list_backends()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return reference_file()


def test_the_best_times_are_remembered_and_one_freak_is_not_believed(cache):
    assert recall("k") is None
    assert remember("k", (10.0, 16.0, 200.0))
    assert recall("k") == (10.0, 16.0, 200.0)
    for _ in range(4):
        remember("k", (10.2, 16.1, 201.0))
    remember("k", (5.0, 20.0, 300.0))  # an error of the clock
    assert recall("k") == (10.2, 16.1, 201.0)
    assert recall("other") is None
    for i in range(20):
        remember("k", (9.0 + i / 100, 15.0, 199.0))
    assert recall("k") == (9.01, 15.0, 199.0)
    assert all(len(times) == 8 for times in json.loads(cache.read_text())["k"])


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"k": 3}', '{"k": [[1.0], ["x"]]}', '{"k": [[], [], []]}', '{"k": [[1.0]]}']
)
def test_a_damaged_memory_is_made_anew(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    assert recall("k") is None
    assert remember("k", (10.0, 16.0, 200.0))
    assert recall("k") == (10.0, 16.0, 200.0)


def test_without_a_place_to_write_nothing_is_remembered_and_it_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert remember("k", (10.0, 16.0, 200.0)) is False
    assert recall("k") is None


def test_times_are_remembered_by_how_the_clock_is_set(monkeypatch):
    keys = []
    for setting in ((None, None), ("powersave", 3000.0), ("performance", 3000.0), ("performance", 2000.0)):
        monkeypatch.setattr(references, "governor", lambda setting=setting: setting[0])
        monkeypatch.setattr(references, "limit_mhz", lambda setting=setting: setting[1])
        keys.append(reference_key("hardware"))
    assert len(set(keys)) == 4


def test_references_take_their_time():
    looking = References()
    assert looking.looks == []
    looks = [looking() for _ in range(5)]
    assert looking.looks == looks
    assert all(us > 0 for look in looks for us in look)
    assert all(fast <= max(us) for fast, us in zip(looking.fast, zip(*looks, strict=True), strict=True))
    assert References((0.001, 0.001, 0.001)).remembered == (0.001, 0.001, 0.001)
    looking.remembered = (1e-3, 1e-3, 1e-3)
    assert looking.best == (1e-3, 1e-3, 1e-3)
    assert looking.slowness([looks[0]]) > 100
