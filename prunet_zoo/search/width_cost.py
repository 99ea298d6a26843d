"""What a masked network costs by how many channels each group keeps, for any `Cost`. The interpolation is ours."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prunet_zoo.cost import Cost, choice_cost
from prunet_zoo.supernet.masked import MaskedNet

_KEPT = 20_000  # whole networks whose cost is remembered


class WidthCost:
    """M(widths): the cost of a masked network with so many channels a group, and its slopes.

    In an additive space M is the start network's cost and, for each group, what its layer costs less; between two
    widths of a group's grid on the straight line, which is exact for MACs and what a table knows. In any other space
    whole networks are asked for, as `MaskedNet.at` gives them.

    Args:
        net: the masked network.
        cost: of its networks.

    Attributes:
        grids: of each group.
        start, least: cost of the start network, and of that with every group at its least width.
    """

    def __init__(self, net: MaskedNet, cost: Cost) -> None:
        self.net, self.cost = net, cost
        self.grids = [group.widths for group in net.groups]
        self.additive = bool(net.space.additive)
        self._whole: dict[tuple[int, ...], float] = {}
        self._parts: dict[tuple[int, int], float] = {}
        self._full = tuple(group.channels for group in net.groups)
        self._start_encoding = net.encode(self._full)
        self.start = cost(net.at(self._full))
        self.least = self.exact([grid[0] for grid in self.grids])

    def __call__(self, widths: Sequence[int]) -> float:
        """M, in the unit of the cost; any widths from the least to the full one of each group."""
        key = tuple(widths)
        if key not in self._whole:
            if len(self._whole) >= _KEPT:
                self._whole.clear()
            self._whole[key] = self._sum(key) if self.additive else self.cost(self.net.at(key))
        return self._whole[key]

    def exact(self, widths: Sequence[int]) -> float:
        """The cost of the network that these widths, rounded up to the grid, give: what `Cost` says of its spec."""
        return self.cost(self.net.space.decode(self.net.encode(widths)))

    def slopes(self, widths: Sequence[int]) -> list[float]:
        """∂M by the width of each group, per channel: the difference over the step of the grid that the width is in
        (the step beneath it, where it is on the grid), all other groups left as they are."""
        found = []
        for g, width in enumerate(widths):
            low, high = self._step(g, width)
            if self.additive:
                rise = self._part(g, high) - self._part(g, low)
            else:
                rise = self._with(widths, g, high) - self._with(widths, g, low)
            found.append(rise / (high - low))
        return found

    def _with(self, widths: Sequence[int], group: int, width: int) -> float:
        return self([*widths[:group], width, *widths[group + 1 :]])

    def _step(self, group: int, width: int) -> tuple[int, int]:
        grid = self.grids[group]
        at = max(1, bisect_left(grid, width))
        return grid[at - 1], grid[at]

    def _sum(self, widths: tuple[int, ...]) -> float:
        return self.start + sum(
            self._part(g, width) - self._part(g, full)
            for g, (width, full) in enumerate(zip(widths, self._full, strict=True))
            if width != full
        )

    def _part(self, group: int, width: int) -> float:
        """What the group's layer costs with ``width`` channels."""
        key = (group, width)
        if key not in self._parts:
            if width in self.grids[group]:
                layer = self.net.layers[group]
                choice = self._start_encoding[layer]
                assert choice is not None
                self._parts[key] = choice_cost(self.cost, self.net.space.layers[layer], (choice[0], width))
            else:
                low, high = self._step(group, width)
                a, b = self._part(group, low), self._part(group, high)
                self._parts[key] = a + (b - a) * (width - low) / (high - low)
        return self._parts[key]
