"""What searches found, side by side: `read_searches` → `compare` → a table, a picture, a page. No torch needed."""

from prunet_zoo.compare.reports import REPORT, Found, Unfinished, find_searches, read_searches
from prunet_zoo.compare.rows import Panel, Setting, compare, pareto_line

__all__ = [
    "REPORT",
    "Found",
    "Panel",
    "Setting",
    "Unfinished",
    "compare",
    "find_searches",
    "pareto_line",
    "read_searches",
]
