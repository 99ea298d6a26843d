"""Bench of the tests of Archtree: a tiny trained network, data, and a device that is a formula."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch

from prunet_zoo.search import MacsCost
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.archtree_workers import RecoverJob, recover
from prunet_zoo.search.strategy import Services
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import NetSpec
from prunet_zoo.supernet.masked import MaskedNet
from prunet_zoo.supernet.masked_spec import SpecNet

HIDDEN = {"step": 2, "max_expansion": 3}
SPACE = SearchSpace.from_dict(
    {
        "name": "test",
        "input_size": 16,
        "stem": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
        "stages": [
            {
                "out_channels": 12,
                "layers": [
                    {"stride": 2, "kernel_sizes": [3], "hidden": HIDDEN},
                    {"kernel_sizes": [3], "hidden": HIDDEN, "types": ["fused_irb"]},
                    {"kernel_sizes": [3], "hidden": HIDDEN, "se_ratios": [0.25]},
                ],
            }
        ],
        "tail": {"out_channels": 16},
        "num_classes": 4,
    }
)


class MsCost(MacsCost):
    """A table for a device whose time goes with MACs."""

    unit = "ms"


COST = MsCost()
Latency = Callable[[NetSpec], float]


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that differ in where the image is bright."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (n,), generator=g)
    x = torch.randn(n, 3, 16, 16, generator=g) * 0.5
    for i, k in enumerate(label.tolist()):
        x[i, :, 8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 0.4
    return x, label


X, LABEL = data(160)


def train(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(0, 96, (16,), generator=g)
        yield X[pick], LABEL[pick]


def held() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(X[96:].split(32), LABEL[96:].split(32), strict=True)


def record(ms: float, *disturbed: str) -> dict:
    figures = {"ci_low_ms": ms * 0.998, "ci_high_ms": ms * 1.002, "p10_ms": ms * 0.99, "p90_ms": ms * 1.01, "n": 9}
    return {"median_ms": ms, **figures, "disturbed": list(disturbed)}


def trained(space: SearchSpace = SPACE, steps: int = 25) -> SpecNet:
    torch.manual_seed(0)
    net = SpecNet(space)
    state = recover(
        RecoverJob(net.remove(full(net), "start")[1], 0, steps, 0.1), list(islice(train(1), steps)), [], "cpu"
    )
    return SpecNet(space, state=state.state)


def full(net: MaskedNet) -> list[torch.Tensor]:
    return [torch.ones(group.channels, dtype=torch.bool) for group in net.groups]


START = trained()
HIGH = COST(SPACE.decode(SPACE.largest()))
LOW = COST(START.at([group.widths[0] for group in START.groups]))


def grow(folder: Path, true: Latency | None = COST, share: float = 0.6, **options) -> SimpleNamespace:
    """An explored `Archtree`; how often each network was measured; the lines told."""
    made: Counter[str] = Counter()
    lines: list[str] = []
    full: Counter[str] = Counter()
    noise = options.pop("noise", lambda n: ())
    shake = options.pop("shake", lambda n: 1.0)  # what the nth full measurement of a network is off
    fail = options.pop("fail", math.inf)

    def measure(spec: NetSpec, quick: bool = False) -> dict:
        if made.total() >= fail:
            raise KeyboardInterrupt
        made[spec.hash] += 1
        full[spec.hash] += not quick
        assert true is not None
        return record(true(spec) * (1.0 if quick else shake(full[spec.hash])), *noise(made.total()))

    net = copy.deepcopy(options.pop("net", START))
    services = options.pop("services", None) or Services(train, held, measure if true else None, folder, lines.append)
    base = {"beam": 2, "children": 2, "rounds": 3, "recovery_steps": 2, "recovery_lr": 0.05, "pretrain": 0.0}
    base["importance_batches"] = 2
    strategy = Archtree(options.pop("target", LOW + share * (HIGH - LOW)), **{**base, **options})
    strategy.setup(net, COST if true else MacsCost(), 4, 0, 8, services)
    found = SimpleNamespace(strategy=strategy, net=net, made=made, full=full, lines=lines)
    strategy.explore()
    return found


def rows(found: SimpleNamespace) -> list[dict]:
    return found.strategy.details()["tree"]
