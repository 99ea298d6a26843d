"""What a latency table measures: which widths of which blocks, in which sets, and which whole networks.

A small grid of widths is measured whole. Of a large one a few widths are measured first; where a measured point is far
off the line between its neighbours, the gaps beside it are halved, and so on (`finer_widths`).

Blocks are measured in sets. A set takes one width of every other candidate in every place of the space: all narrow in
the first sets, all wide in the last. Run in turn, the probes of a set fill the caches about as a network of that width
does, rather less than more, because the correction can add for caches and not take off.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prunet_zoo.latency.table import leave_out_errors, template_key
from prunet_zoo.space import Encoding, SearchSpace
from prunet_zoo.spec import BlockSpec


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        all_widths: a grid with at most so many widths is measured whole: a search finds the widths that interpolation
            flatters.
        first_widths: of a larger grid, measured first: evenly spread, both ends included.
        tolerance: error of interpolation, as a share of the latency, above which a gap is halved.
        max_widths: of one block at most.
        networks: whole networks for the correction.
        block_seconds, network_seconds: time on each probe and each whole network.
    """

    all_widths: int = 32
    first_widths: int = 6
    tolerance: float = 0.01
    max_widths: int = 24
    networks: int = 16
    block_seconds: float = 0.06
    network_seconds: float = 0.4


QUICK = Effort(all_widths=6, first_widths=5, max_widths=9, networks=8, block_seconds=0.03, network_seconds=0.15)


class Item(NamedTuple):
    """One block to be measured."""

    block: BlockSpec
    in_channels: int
    in_size: tuple[int, int]


class Template(NamedTuple):
    """A block without its width, in a place of its own: what a curve of the table is of."""

    key: str
    half: int  # sets hold every other candidate
    place: Item
    grid: tuple[int, ...]

    def items(self, widths: Sequence[int]) -> list[Item]:
        """The block at some widths."""
        if self.place.block.hidden is None:
            return [self.place]
        return [self.place._replace(block=self.place.block.model_copy(update={"hidden": w})) for w in widths]


def list_templates(space: SearchSpace) -> list[Template]:
    """The distinct blocks of a space, each once however many layers share it.

    Raises:
        SpecError: the space is not additive: its blocks stand behind any number of channels.
    """
    space.require_additive("a latency table")
    found: dict[str, Template] = {}
    for layer in space.layers:
        for c in range(len(layer.candidates)):
            widths = layer.candidate_widths(c)
            item = Item(layer.block(c, widths[-1]), layer.in_channels, layer.in_size)
            key = template_key(*item)
            found.setdefault(key, Template(key, c % 2, item, widths))
    return list(found.values())


def first_widths(grid: Sequence[int], effort: Effort) -> tuple[int, ...]:
    """The widths to begin with: all of a small grid, otherwise evenly spread ones, both ends included."""
    if len(grid) <= effort.all_widths:
        return tuple(grid)
    steps = effort.first_widths - 1
    return tuple(sorted({grid[round(i * (len(grid) - 1) / steps)] for i in range(steps + 1)}))


def finer_widths(grid: Sequence[int], points: Mapping[int, float], effort: Effort, quantum: int = 1) -> tuple[int, ...]:
    """Widths to be measured next: the middles of the gaps beside points that their neighbours predict badly.

    A point left out is predicted across twice the gap, where a straight line is off by four times as much (its error
    grows with the square of the gap), so the error inside of the gaps is taken as a quarter of it.

    Args:
        grid: all widths of the block.
        points: latency in ms at the widths measured so far.
        effort: tolerance, and the number of widths at most.
        quantum: channels that the device computes at a time (`LatencyTable.quantum`).
    """
    measured = sorted(points)
    wanted: dict[int, float] = {}
    for index, error in leave_out_errors(points, quantum).items():
        if error / 4 <= effort.tolerance:
            continue
        for low, high in ((measured[index - 1], measured[index]), (measured[index], measured[index + 1])):
            inside = [w for w in grid if low < w < high]
            if inside:
                middle = inside[(len(inside) - 1) // 2]
                wanted[middle] = max(error, wanted.get(middle, 0.0))
    room = max(0, effort.max_widths - len(measured))
    return tuple(sorted(sorted(wanted, key=lambda w: -wanted[w])[:room]))


def arrange(wanted: Mapping[Template, Sequence[int]], smallest: int) -> list[list[Item]]:
    """Sets from narrow to wide; each distinct block once. Sets with fewer than ``smallest`` blocks are put together."""
    groups = {template: template.items(widths) for template, widths in wanted.items() if widths}
    count = max((len(items) for items in groups.values()), default=0)
    sets: list[list[Item]] = [[] for _ in range(2 * count)]
    for template, items in groups.items():
        for i, item in enumerate(items):
            place = count // 2 if len(items) == 1 else round(i * (count - 1) / (len(items) - 1))
            sets[2 * place + template.half].append(item)
    joined: list[list[Item]] = []
    for half in (0, 1):
        current: list[Item] = []
        for items in sets[half::2]:
            current += items
            if len(current) >= smallest:
                joined.append(current)
                current = []
        if current:
            joined.append(current)
    return joined


def plan_networks(space: SearchSpace, count: int, seed: int = 0) -> list[Encoding]:
    """The smallest and the largest network of the space, and random ones of all sizes between (uniform sampling would
    give middling ones only)."""
    rng = random.Random(seed)
    found: dict[Encoding, None] = {_smallest(space): None, space.largest(): None}
    for i in range(count * 20):
        size = (i % count + 0.5) / count  # 0: small, 1: large
        choices: list[tuple[int, int] | None] = []
        for layer in space.layers:
            if layer.skip and rng.random() < 0.1 + 0.7 * (1 - size):
                choices.append(None)
                continue
            candidate = rng.randrange(len(layer.candidates))
            widths = layer.candidate_widths(candidate)
            share = min(1.0, max(0.0, rng.gauss(size, 0.25)))
            choices.append((candidate, widths[round(share * (len(widths) - 1))]))
        found[tuple(choices)] = None
        if len(found) >= count:
            break
    return list(found)


def _smallest(space: SearchSpace) -> Encoding:
    return tuple(None if layer.skip else (0, layer.candidate_widths(0)[0]) for layer in space.layers)
