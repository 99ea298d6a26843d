"""The pictures of a latency report: accuracy against latency, predicted against measured, time block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prunet_zoo.latency.accuracy import pareto
from prunet_zoo.latency.breakdown import Breakdown
from prunet_zoo.latency.labels import label_points
from prunet_zoo.latency.predictions import Prediction

_FAMILY = {  # colour, marker
    "PruNet": ("#c1121f", "*"),
    "GPUNet": ("#d1603d", "D"),
    "EfficientNet": ("#2a6f97", "o"),
    "EfficientNetV2": ("#3f8fc4", "s"),
    "MobileNetV3": ("#2a9d8f", "^"),
    "ResNet": ("#6c757d", "v"),
    "RegNet": ("#9d4edd", "P"),
}
DISTURBED = "#a8a8a8"
DPI = 110  # of the files that `prunet_zoo.page.figure_png` makes
_KIND = {"conv": "#8d99ae", "irb": "#2a6f97", "fused_irb": "#e07a5f", "rep": "#6a994e", "tail": "#c9ada7"}


class Point(NamedTuple):
    """A network in the picture of accuracy against latency."""

    label: str
    family: str
    ms: float
    top1: float
    low_ms: float
    high_ms: float
    distilled: bool = False
    disturbed: bool = False

    @property
    def color(self) -> str:
        """Of its mark and its name."""
        return DISTURBED if self.disturbed else _look(self.family)[0]


def draw_accuracy(points: Sequence[Point], title: str) -> Figure:
    """Published top-1 over measured latency (log axis) with 95% intervals; the Pareto line is dashed.

    Hollow marks: distilled weights. Grey ones: the latency was disturbed.
    """
    fig, ax = plt.subplots(figsize=(10, 7.2), dpi=DPI)  # names are placed pixel by pixel
    for family in dict.fromkeys(p.family for p in points):
        mine = sorted((p for p in points if p.family == family), key=lambda p: p.ms)
        color, marker = _look(family)
        xs, ys = [p.ms for p in mine], [p.top1 for p in mine]
        spread = [[p.ms - p.low_ms for p in mine], [p.high_ms - p.ms for p in mine]]
        ax.errorbar(xs, ys, xerr=spread, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.7, zorder=2)
        size = 11 if marker == "*" else 6
        for p in mine:
            face = "white" if p.distilled else p.color
            ax.plot(p.ms, p.top1, ls="", marker=marker, ms=size, mec=p.color, mfc=face, zorder=3)
        ax.plot([], [], ls="", marker=marker, ms=size, color=color, label=family)
    best = [points[i] for i in pareto((p.ms, p.top1) for p in points)]
    ax.plot(
        [p.ms for p in best], [p.top1 for p in best], color="black", ls="--", lw=1, zorder=1, label=_line_name(best)
    )
    _log_axis(ax, [p.ms for p in points])
    low, high = min(p.top1 for p in points), max(p.top1 for p in points)
    margin = max(0.5, 0.07 * (high - low))
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel("measured latency (ms, log axis)")
    ax.set_ylabel("published ImageNet-1k top-1 (%)")
    ax.set_title(title, fontsize=10)
    handles, names = ax.get_legend_handles_labels()
    for shown, face, edge, name in (
        (any(p.distilled for p in points), "white", "black", "hollow: distilled"),
        (any(p.disturbed for p in points), DISTURBED, DISTURBED, "grey: disturbed"),
    ):
        if shown:
            handles.append(Line2D([], [], ls="", marker="o", mfc=face, mec=edge))
            names.append(name)
    columns = math.ceil(len(names) / 2)
    fig.legend(handles, names, fontsize=8, ncols=columns, loc="lower center")  # inside it could cover a point
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, which="both")
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    line = [(p.ms, p.top1) for p in best]
    colors = [p.color for p in points]
    label_points(ax, [p.ms for p in points], [p.top1 for p in points], [p.label for p in points], colors, line)
    return fig


def _line_name(best: Sequence[Point]) -> str:
    return "Pareto line (uncertain: disturbed points on it)" if any(p.disturbed for p in best) else "Pareto line"


def _look(family: str) -> tuple[str, str]:
    return _FAMILY.get(family, ("#333333", "X"))


def _log_axis(ax: Axes, values: Sequence[float], both: bool = False) -> None:
    """A log axis with plain numbers around ``values``; ``both``: on y too, with the same limits."""
    low, high = min(values), max(values)
    limits = (low / 1.15 if low < high else low / 2, high * 1.15 if low < high else high * 2)
    for axis, scale, limit in ((ax.xaxis, ax.set_xscale, ax.set_xlim), (ax.yaxis, ax.set_yscale, ax.set_ylim))[
        : 2 if both else 1
    ]:
        scale("log")
        limit(*limits)
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def draw_predictions(predictions: Sequence[Prediction]) -> Figure:
    """A column a source: predicted over measured latency, and the error below; bands of ±5% and ±10%."""
    count = len(predictions)
    fig, axes = plt.subplots(
        2, count, figsize=(max(5.0, 3.6 * count), 6.4), squeeze=False, gridspec_kw={"height_ratios": (3, 1.4)}
    )
    for column, prediction in enumerate(predictions):
        top, bottom = axes[0][column], axes[1][column]
        measured = [n.measured_ms for n in prediction.networks]
        predicted = [n.predicted_ms for n in prediction.networks]
        _log_axis(top, measured + predicted, both=True)
        edge = list(top.get_xlim())
        for share, alpha in ((0.10, 0.12), (0.05, 0.2)):
            low, high = ([e * f for e in edge] for f in (1 - share, 1 + share))
            top.fill_between(edge, low, high, color="#2a9d8f", alpha=alpha, lw=0, label=f"±{share:.0%}")
            bottom.axhspan(-100 * share, 100 * share, color="#2a9d8f", alpha=alpha, lw=0)
        top.plot(edge, edge, color="black", lw=0.8)
        order = "" if prediction.tau is None else f"τ {prediction.tau:.3f}, "
        text = f"{order}median {prediction.typical:.1%}, worst {prediction.worst:.1%}"
        top.plot(measured, predicted, ls="", marker="o", ms=4, color="#c1121f", label=text)
        bottom.plot(measured, [100 * n.error for n in prediction.networks], ls="", marker="o", ms=4, color="#c1121f")
        bottom.axhline(0, color="black", lw=0.8)
        _log_axis(bottom, measured + predicted)
        reach = max(12.0, 115 * prediction.worst)
        bottom.set_ylim(-reach, reach)
        top.set_title("\n".join([prediction.source, *wrap(prediction.about, 42)]), fontsize=8)
        top.legend(fontsize=7, loc="best")  # the corner with the fewest points
        bottom.set_xlabel("measured (ms)" if not prediction.published else "published (ms)")
        for ax in (top, bottom):
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
    axes[0][0].set_ylabel("predicted (ms)")
    axes[1][0].set_ylabel("error (%)")
    fig.tight_layout()
    return fig


def draw_breakdowns(breakdowns: Sequence[Breakdown]) -> Figure:
    """A row a network: a bar a block, coloured by type, lines between stages, the map's side below each stage."""
    fig, axes = plt.subplots(len(breakdowns), 1, figsize=(10, 2.0 * len(breakdowns) + 0.5), squeeze=False)
    for ax, network in zip(axes[:, 0], breakdowns, strict=True):
        parts = network.parts
        ax.bar(range(len(parts)), [max(0.0, p.ms) for p in parts], color=[_KIND[p.kind] for p in parts], width=0.85)
        starts = [i for i in range(len(parts)) if i == 0 or parts[i].stage != parts[i - 1].stage]
        for i in starts[1:]:
            ax.axvline(i - 0.5, color="#bbbbbb", lw=0.8)
        ends = [*starts[1:], len(parts)]
        names = ["tail" if parts[a].kind == "tail" else f"s{parts[a].stage}\n{parts[a].in_size[0]} px" for a in starts]
        ax.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], names, fontsize=7)
        ax.tick_params(axis="x", length=0)
        ax.set_xlim(-0.6, len(parts) - 0.4)
        ax.set_ylabel("ms", fontsize=8)
        ax.tick_params(axis="y", labelsize=8)
        difference = network.sum_ms / network.whole_ms - 1
        ax.set_title(
            f"{network.spec_name}, {network.input_size} px: blocks sum to {network.sum_ms:.4g} ms, "
            f"the whole network takes {network.whole_ms:.4g} ms ({difference:+.1%})",
            fontsize=9,
        )
        ax.spines[["top", "right"]].set_visible(False)
    used = {part.kind for network in breakdowns for part in network.parts}
    handles = [Patch(color=color, label=kind.replace("_", " ")) for kind, color in _KIND.items() if kind in used]
    fig.legend(handles=handles, fontsize=8, ncols=len(handles), loc="lower center")
    fig.tight_layout(rect=(0, 0.25 / fig.get_figheight(), 1, 1))
    return fig
