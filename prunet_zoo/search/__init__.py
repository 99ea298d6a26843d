"""Search strategies behind one interface; none of them knows MMEngine or a latency backend.

Names are imported when they are first used: most need torch, `prunet_zoo.search.ddpnas` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunet_zoo.cost import Cost, MacsCost, cost_range, default_target, space_cost
    from prunet_zoo.search.archtree import Archtree
    from prunet_zoo.search.ddpnas import DDPNASearch
    from prunet_zoo.search.ddpnas_strategy import DDPNAS
    from prunet_zoo.search.knapsack import Option, grouped_knapsack
    from prunet_zoo.search.pas import PruningAsSearch
    from prunet_zoo.search.strategy import PruneEvent, SearchNet, SearchStrategy, Services
    from prunet_zoo.search.tiered import TieredPruning

_HOME = {
    "cost": ("Cost", "MacsCost", "cost_range", "default_target", "space_cost"),
    "search.archtree": ("Archtree",),
    "search.ddpnas": ("DDPNASearch",),
    "search.ddpnas_strategy": ("DDPNAS",),
    "search.knapsack": ("Option", "grouped_knapsack"),
    "search.pas": ("PruningAsSearch",),
    "search.strategy": ("PruneEvent", "SearchNet", "SearchStrategy", "Services"),
    "search.tiered": ("TieredPruning",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DDPNAS",
    "Archtree",
    "Cost",
    "DDPNASearch",
    "MacsCost",
    "Option",
    "PruneEvent",
    "PruningAsSearch",
    "SearchNet",
    "SearchStrategy",
    "Services",
    "TieredPruning",
    "cost_range",
    "default_target",
    "grouped_knapsack",
    "space_cost",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"prunet_zoo.{_MODULE[name]}"), name)
