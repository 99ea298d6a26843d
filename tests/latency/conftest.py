"""A backend that needs no clock: latency is a formula over the module, so a table must find the formula again."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from prunet_zoo.latency import Backend, Effort, Session, Setting, build, measurement
from prunet_zoo.latency.references import References
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import NetSpec

TINY_SPACE = {
    "name": "tiny",
    "input_size": 16,
    "stem": [{"blocks": [{"type": "conv", "out_channels": 4, "stride": 2}]}],
    "stages": [
        {
            "out_channels": 8,
            "layers": [
                {"stride": 2, "types": ["conv"], "kernel_sizes": [3]},
                {"repeat": 2, "types": ["irb", "fused_irb"], "hidden": {"step": 2, "max_expansion": 6}, "skip": True},
            ],
        },
        {"out_channels": 12, "layers": [{"stride": 2, "kernel_sizes": [3], "hidden": {"step": 4}}]},
    ],
    "tail": {"out_channels": 16},
    "num_classes": 5,
}
CALL_MS = 0.01  # what a run costs besides its convolutions
MS_PER_WEIGHT = 1e-4


class FakeSession(Session):
    """Returns the same latency at once."""

    def __init__(self, ms: float) -> None:
        super().__init__(lambda: None)
        self.ms = ms

    def sample(self, n: int) -> list[float]:
        return [self.ms] * n


class FakeBackend(Backend):
    """A run costs a constant and so much a convolution weight: exactly additive."""

    name = "fake"
    install = "nothing"
    dtypes = {"cpu": ("fp32", "fp16")}  # noqa: RUF012

    def __init__(self, device: str = "fake device", version: str = "1", fail_after: int | None = None) -> None:
        self.device, self.fake_version, self.fail_after = device, version, fail_after
        self.prepared: list[nn.Module] = []
        self.inside = False

    @property
    def version(self) -> str:
        return self.fake_version

    def device_name(self, accelerator: str) -> str:
        return self.device

    @contextmanager
    def environment(self, setting: Setting):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def prepare(self, module: nn.Module, input_shape: tuple[int, int, int, int], setting: Setting) -> Session:
        assert self.inside
        assert not module.training
        if self.fail_after is not None and len(self.prepared) >= self.fail_after:
            raise KeyboardInterrupt
        self.prepared.append(module)
        weights = sum(p.numel() for m in module.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())
        return FakeSession(CALL_MS + MS_PER_WEIGHT * weights)


EFFORT = Effort(first_widths=4, all_widths=3, networks=6, block_seconds=0.0, network_seconds=0.0)


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    return SearchSpace.from_dict(TINY_SPACE)


@pytest.fixture(scope="session")
def specs(space: SearchSpace) -> list[NetSpec]:
    """Twenty random networks of the space."""
    rng = random.Random(3)
    return [space.decode(space.sample(rng)) for _ in range(20)]


@pytest.fixture(scope="session")
def make_backend():
    return FakeBackend


@pytest.fixture(scope="session")
def effort() -> Effort:
    return EFFORT


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch) -> None:
    """Measurements that confirm each other are made at once."""
    monkeypatch.setattr(measurement, "APART_SECONDS", 0.0)


@pytest.fixture
def steady(monkeypatch) -> None:
    """A processor that is always at full speed."""
    speed = (10.0, 16.0, 200.0)
    monkeypatch.setattr(References, "__call__", lambda self: self.looks.append(speed) or speed)
    monkeypatch.setattr(build, "recall", lambda key: speed)


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    return tmp_path / "table.jsonl"
