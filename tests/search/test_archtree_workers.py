"""The processes that train children: they go when their parent does, and a job that fails is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from prunet_zoo.errors import TrainingError
from prunet_zoo.search.archtree_workers import Evaluator, RecoverJob
from prunet_zoo.search.memory import resident_peak_mb
from prunet_zoo.search.strategy import Services

SCRIPT = """
import itertools, pathlib, sys, torch
from torch import nn
from prunet_zoo.search.archtree_workers import Evaluator, RecoverJob
from prunet_zoo.search.strategy import Services

def batches(seed=0):
    return itertools.repeat((torch.ones(64, 4096), torch.zeros(64, dtype=torch.long)))

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    services = Services(batches, lambda: itertools.islice(batches(), 1), None, folder)
    with Evaluator(services, folder / "jobs", workers=1) as evaluator:
        evaluator.run([RecoverJob(nn.Linear(4096, 10), 0, 1, 0.1)])
        print(*evaluator._pool._processes, flush=True)
        while True:
            evaluator.run([RecoverJob(nn.Linear(4096, 10), 0, 50, 0.1)])
"""


@pytest.mark.slow
def test_a_killed_search_leaves_no_process_behind(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        (worker,) = (int(pid) for pid in parent.stdout.readline().split())
        assert _is_alive(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + 60
        while _is_alive(worker) and time.monotonic() < end:
            time.sleep(0.1)
    assert not _is_alive(worker)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"


class Deadly(nn.Linear):
    """Ends the process that trains it, as the system does when memory runs out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os._exit(9)


@pytest.mark.slow
def test_a_process_that_dies_is_told_with_what_to_do(tmp_path: Path) -> None:
    batch = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    services = Services(lambda seed: iter([batch]), lambda: iter([batch]), None, tmp_path)
    with (
        Evaluator(services, tmp_path / "jobs", workers=1) as evaluator,
        pytest.raises(TrainingError, match="fewer workers"),
    ):
        evaluator.run([RecoverJob(Deadly(4, 2), 0, 1, 0.1)])
    assert not (tmp_path / "jobs").exists()


def test_held_out_images_are_needed(tmp_path: Path) -> None:
    services = Services(lambda seed: iter([]), lambda: iter([]), None, tmp_path)
    with pytest.raises(TrainingError, match="held-out part"):
        Evaluator(services, tmp_path / "jobs")


@pytest.mark.slow
def test_the_memory_of_the_other_processes_is_told(tmp_path: Path) -> None:
    batch = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    services = Services(lambda seed: iter([batch]), lambda: iter([batch]), None, tmp_path)
    jobs = [RecoverJob(nn.Linear(4, 2), 0, 1, 0.1)]
    with Evaluator(services, tmp_path / "alone") as evaluator:
        evaluator.run(jobs)
        assert evaluator.workers_mb == 0
    with Evaluator(services, tmp_path / "jobs", workers=1) as evaluator:
        evaluator.run(jobs)
        assert 50 < evaluator.workers_mb < 10 * resident_peak_mb()
        evaluator._peaks |= {-1: 1e6, -2: 2e6}  # of two more
        assert 3e6 < evaluator.workers_mb < 3e6 + 10 * resident_peak_mb()
