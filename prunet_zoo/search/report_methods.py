"""report.html: the picture that a method has of its own."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MASKED = ("PruningAsSearch", "Archtree")  # methods that search in a network with masks
SURE = ("channels", "widened")  # kinds of events that have no probability


def draw_method(report: dict[str, Any]) -> Figure | None:
    """Widths over the epochs (Pruning-as-Search), the tree (Archtree), θ of all choices (DDPNAS); None for others, and
    where there is nothing to draw."""
    method, details = report["method"], report["details"]
    if method == "PruningAsSearch" and report["history"]:
        return _draw_widths(report["history"])
    if method == "Archtree" and details.get("tree"):
        return _draw_tree(details, report["target"], report["unit"])
    if method == "DDPNAS" and details.get("theta"):
        return _draw_theta(details)
    return None


def _draw_widths(rows: list[dict[str, Any]]) -> Figure:
    """Width of each layer by epoch, as a share of its greatest."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    layers = list(zip(*(row["widths"] for row in rows), strict=True))
    colors = plt.get_cmap("viridis")
    epochs = [row["epoch"] for row in rows]
    for i, widths in enumerate(layers):
        if max(widths) > 0:
            share = [100 * w / max(widths) for w in widths]
            ax.plot(epochs, share, color=colors(i / max(1, len(layers) - 1)), lw=1.2)
    bar = fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, max(1, len(layers) - 1)), colors), ax=ax)
    bar.set_label("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 105)
    ax.set_xlabel("epoch")
    ax.set_ylabel("channels kept (%)")
    ax.set_title("width of every layer at the end of each epoch", fontsize=10)
    fig.tight_layout()
    return fig


def _draw_tree(details: dict[str, Any], target: float, unit: str) -> Figure:
    """Every node, accuracy against latency, joined with its parent; survivors filled, the chosen one ringed."""
    rows = details["tree"]
    place = {row["node"]: (row["latency"], row["accuracy"]) for row in rows}
    fig, ax = plt.subplots(figsize=(8, 4.2))
    for row in rows:
        if row["parent"] in place:
            (x0, y0), (x1, y1) = place[row["parent"]], place[row["node"]]
            ax.plot([x0, x1], [y0, y1], color="#bbbbbb", lw=0.7, zorder=1)
    for alive, face, label in ((True, "#2a6f97", "survived"), (False, "none", "dropped")):
        points = [place[row["node"]] for row in rows if row["survives"] is alive]
        if points:
            xs, ys = zip(*points, strict=True)
            ax.scatter(xs, ys, s=18, facecolor=face, edgecolor="#2a6f97", label=label, zorder=2)
    if details.get("chosen") in place:
        x1, y1 = place[details["chosen"]]
        ax.scatter(x1, y1, s=110, facecolor="none", edgecolor="#e07a5f", lw=2, label="chosen")
    ax.axvspan(0.95 * target, target, color="#2a9d8f", alpha=0.25, label="(0.95 T, T]")
    ax.invert_xaxis()  # the tree grows from the start network to the right
    ax.set_xlabel(f"latency ({unit})" if unit == "ms" else f"cost ({unit})")
    ax.set_ylabel("top-1 on the held-out part (%)")
    ax.set_title(f"the tree: {len(rows)} networks in {details['rounds']} rounds", fontsize=10)
    ax.legend(fontsize=7)
    fig.tight_layout()
    return fig


def _draw_theta(details: dict[str, Any]) -> Figure:
    """θ of each layer's choices at the end, those that survived filled."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    for layer, (values, alive) in enumerate(zip(details["theta"], details["survivors"], strict=True)):
        for choice, value in enumerate(values):
            left = choice in alive
            ax.scatter(layer, value, s=34 if left else 16, facecolor="#2a6f97" if left else "none", edgecolor="#2a6f97")
    ax.set_xlabel("layer")
    ax.set_ylabel("θ")
    ax.set_title("θ of every choice when it was last updated; filled: left at the end", fontsize=10)
    fig.tight_layout()
    return fig
