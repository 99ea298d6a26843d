"""A tree search from the start, or from where it stopped: a file a round, and a line of progress."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunet_zoo.errors import TrainingError
from prunet_zoo.files import write_atomic
from prunet_zoo.search.archtree_tree import Tree
from prunet_zoo.search.target import CENTRE

_LAST = 3  # rounds that the pace is told of: later rounds take longer than the first ones


def run_tree(tree: Tree, folder: Path, about: dict[str, Any], tell: Callable[[str], None] = lambda line: None) -> float:
    """Grow a tree until no node is open; returns the seconds that it took, over all its runs.

    The whole state stands in ``round_NNN.pt`` after round NNN; the file of the round before is removed then. A run that
    is stopped at any time goes on from the last file, with the same result.

    Args:
        tree: without nodes.
        folder: for the files.
        about: what the result depends on; a file of another ``about`` is refused.

    Raises:
        TrainingError: the last file is damaged or of another search.
    """
    elapsed, before = 0.0, time.perf_counter()
    last: list[float] = []  # seconds of the last rounds, without planting
    files = sorted(folder.glob("round_*.pt"))
    if files:
        state = _load(files[-1], about)
        tree.load_state_dict(state["tree"])
        elapsed, last = state["seconds"], list(state["last"])
        tell(f"tree: goes on after round {tree.round}")
    while not files or tree.open:
        if files:
            tree.grow()
        else:
            tree.plant()
        now = time.perf_counter()
        if files:
            last = [*last, now - before][-_LAST:]
        elapsed, before = elapsed + now - before, now
        buffer = io.BytesIO()
        torch.save({"about": about, "seconds": elapsed, "last": last, "tree": tree.state_dict()}, buffer)
        path = folder / f"round_{tree.round:03d}.pt"
        write_atomic(path, buffer.getvalue())
        for old in files:
            old.unlink(missing_ok=True)
        files = [path]
        tell(_progress(tree, last))
    return elapsed


def _load(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = dict(state["about"])
        _ = state["seconds"], state["last"], state["tree"]
    except Exception as error:  # torch names no common class
        raise TrainingError(f"{path} is damaged ({error}); remove it to start the tree anew") from None
    differing = sorted(key for key in {*known, *about} if known.get(key) != about.get(key))
    if differing:
        raise TrainingError(
            f"the tree in {path.parent} is of another search ({', '.join(differing)} differ); give the run another "
            "--work-dir, or remove that folder"
        )
    return state


def _progress(tree: Tree, last: Sequence[float]) -> str:
    """One line on the state of the tree: nodes, latency, accuracy, pace and time left; ``last``: seconds of the last
    rounds, none after planting."""
    nodes = tree.open or [tree.best]
    best = min(nodes, key=lambda node: node.rank)
    latency = max(node.latency for node in nodes)
    line = (
        f"tree, round {tree.round}: {len(tree.open)} nodes open, {len(tree.finished)} at the budget; best "
        f"{best.accuracy:.1f}%, at most {latency:.4g} of {tree.target:.4g}"
    )
    if not last:
        return line
    pace = sum(last) / len(last)
    line = f"{line}; {pace:.1f} s a round"
    return f"{line}, at least about {_left(tree, pace):.0f} s left" if tree.open else line


def _left(tree: Tree, pace: float) -> float:
    """Seconds that are left at least, at ``pace`` seconds a round: as many rounds as the slowest open node needs where
    they save what those so far did, at least one, and the measurements of every open node with full effort. Finer
    removals, and rounds in which no node comes to the budget, are not foreseen."""
    latency = max(node.latency for node in tree.open)
    saved = (tree.root_latency - latency) / tree.round
    rounds = max(1, math.ceil((latency - CENTRE * tree.target) / saved)) if saved > 0 else 1
    return rounds * pace + len(tree.open) * tree.latencies.seconds_to_confirm()


def weights_hash(module: nn.Module) -> str:
    """12 hex digits of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
