"""The super-network as an MMEngine model, and its gradients over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.registry import MODELS
from torch import nn

from prunet_zoo.mm.search_model import average_buffers, average_gradients

SPACE = "prunet_cpu_small"


def test_modes_of_the_model():
    torch.manual_seed(0)
    model = MODELS.build({"type": "SuperNetClassifier", "space": SPACE, "num_classes": 7})
    x, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 6, 3, 2])
    assert model(x).shape == (4, 7) and model(x, mode="predict").shape == (4,)
    losses = model(x, label, mode="loss")
    assert losses["loss"].requires_grad and 0 <= float(losses["acc"]) <= 100
    loss, acc = model.arch_loss({"inputs": x, "label": label})
    assert loss.requires_grad and 0 <= float(acc) <= 100
    with pytest.raises(ValueError, match="labels"):
        model(x, mode="loss")


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    unused = nn.Parameter(torch.zeros(2))
    net(torch.full((4, 3), float(rank)) + torch.arange(12.0).view(4, 3)).square().sum().backward()
    own = [p.grad.clone() for p in net.parameters()]
    if rank == 0:  # an option that only one process sampled
        unused.grad = torch.ones(2)
    average_gradients([*net.parameters(), unused])
    average_buffers(net)
    torch.save((own, [p.grad for p in net.parameters()], unused.grad, net[1].running_mean), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gradients_and_buffers_are_averaged_over_two_processes(tmp_path: Path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for own_a, own_b, mean_a, mean_b in zip(a[0], b[0], a[1], b[1], strict=True):
        torch.testing.assert_close(mean_a, (own_a + own_b) / 2)
        assert torch.equal(mean_a, mean_b)
    assert a[2].tolist() == b[2].tolist() == [0.5, 0.5]
    assert torch.equal(a[3], b[3])


def test_a_single_process_keeps_its_gradients():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    average_gradients([p])
    assert p.grad.tolist() == [3.0, 3.0]
