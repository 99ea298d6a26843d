"""Archtree goes on exactly: after a kill, between rounds, in other processes, from its state; damage is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tree_bench import COST, START, grow, held, record, rows, train

from prunet_zoo.errors import TrainingError
from prunet_zoo.search.archtree import Archtree
from prunet_zoo.search.strategy import Services


@pytest.mark.parametrize("fail", [0, 2, 7, 11])
def test_goes_on_exactly_where_it_was_killed(whole, tmp_path, fail):
    with pytest.raises(KeyboardInterrupt):
        grow(tmp_path / "parts", fail=fail)
    rest = grow(tmp_path / "parts")
    assert _same(whole, rest)
    assert rest.made.total() <= whole.made.total() - fail  # nothing is measured again
    again = grow(tmp_path / "parts")
    assert _same(whole, again) and not again.made


def test_goes_on_exactly_between_rounds(whole, tmp_path):
    for stop in (1, 3):
        told: list[str] = []

        def tell(line: str, told: list[str] = told, stop: int = stop) -> None:
            told.append(line)
            if len(told) == stop:
                raise KeyboardInterrupt

        services = Services(train, held, lambda spec, quick=False: record(COST(spec)), tmp_path / str(stop), tell)
        with pytest.raises(KeyboardInterrupt):
            grow(tmp_path / str(stop), services=services)
        assert len(list((tmp_path / str(stop) / "archtree").glob("round_*.pt"))) == 1
        assert _same(whole, grow(tmp_path / str(stop)))


def _same(a: SimpleNamespace, b: SimpleNamespace) -> bool:
    first, second = a.strategy._nodes, b.strategy._nodes
    return rows(a) == rows(b) and all(
        x.lineage == y.lineage and all(torch.equal(x.state[k], y.state[k]) for k in x.state)
        for x, y in zip(first, second, strict=True)
    )


@pytest.mark.slow
def test_other_processes_give_the_same_bits(whole, tmp_path):
    assert _same(whole, grow(tmp_path / "2", workers=2))
    assert not (tmp_path / "2" / "archtree" / "jobs").exists()


def test_files_of_another_search_or_damaged_ones_are_refused(tmp_path):
    grow(tmp_path)
    with pytest.raises(TrainingError, match="beam differ"):
        grow(tmp_path, beam=1)
    (path,) = (tmp_path / "archtree").glob("round_*.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(TrainingError, match="damaged"):
        grow(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "archtree" / "latencies.json").write_text('{"a": 1}')
    with pytest.raises(TrainingError, match="measure again"):
        grow(tmp_path)


def test_continues_from_its_state(whole, tmp_path):
    found = whole
    torch.save(found.strategy.state_dict(), tmp_path / "state.pt")
    other = Archtree(found.strategy.target, pretrain=0.0)
    other.setup(copy.deepcopy(START), COST, 4, 0, 8)
    assert other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)) == []
    assert other.finish() == found.strategy.finish()
    assert other.measured_choice() == found.strategy.measured_choice() and other.status() == found.strategy.status()
    other.adopt(other.finish())
    assert other.supernet.best() == found.strategy.finish()
