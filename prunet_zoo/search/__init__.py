"""Search strategies behind one interface; none of them knows MMEngine or a latency backend."""

from prunet_zoo.cost import Cost, MacsCost, cost_range, default_target, space_cost
from prunet_zoo.search.knapsack import Option, grouped_knapsack
from prunet_zoo.search.strategy import PruneEvent, SearchStrategy
from prunet_zoo.search.tiered import TieredPruning

__all__ = [
    "Cost",
    "MacsCost",
    "Option",
    "PruneEvent",
    "SearchStrategy",
    "TieredPruning",
    "cost_range",
    "default_target",
    "grouped_knapsack",
    "space_cost",
]
