"""The picture: accuracy against latency, a panel for each device and unit."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prunet_zoo.compare.rows import ORDER, Panel, Setting, pareto_line
from prunet_zoo.latency.labels import label_points

_LOOK = {  # colour, marker
    "tiered": ("#c1121f", "o"),
    "ddpnas": ("#2a6f97", "s"),
    "pas": ("#2a9d8f", "D"),
    "archtree": ("#e08e45", "^"),
}
_OTHERS = (("#6c757d", "v"), ("#9d4edd", "P"), ("#333333", "X"))
DPI = 110  # of the files that `prunet_zoo.page.figure_png` makes


def draw_comparison(panels: Sequence[Panel], accuracy: str = "top-1 (%)") -> Figure | None:
    """Accuracy over cost, a panel below the other; None where no network was evaluated.

    A large mark is the mean over the seeds of a setting, with bars from the lowest to the highest; small marks are the
    seeds; of a single search the bar is the 95% interval of its latency. Hollow: not measured. Dashed: Pareto line of
    the means.

    Args:
        panels: of `compare`.
        accuracy: what stands at the vertical axis.
    """
    drawn = [p for p in panels if any(s.top1 is not None for s in p.settings)]
    if not drawn:
        return None
    looks = _looks([s.method for p in drawn for s in p.settings])
    fig, axes = plt.subplots(len(drawn), 1, figsize=(9, 1.0 + 4.6 * len(drawn)), dpi=DPI, squeeze=False)
    for panel, ax in zip(drawn, axes[:, 0], strict=True):
        for setting in panel.settings:
            _draw_setting(ax, setting, *looks[setting.method])
        line = pareto_line(panel.settings)
        ax.plot([s.cost for s in line], [s.top1 or 0.0 for s in line], color="black", ls="--", lw=1, zorder=1)
        _frame(ax, panel, accuracy)
    handles, names = _legend([s for p in drawn for s in p.settings], looks)
    fig.legend(handles, names, fontsize=8, ncols=min(7, len(names)), loc="lower center")
    fig.tight_layout(rect=(0, 0.5 / fig.get_figheight(), 1, 1))
    for panel, ax in zip(drawn, axes[:, 0], strict=True):
        _label(ax, panel, looks)
    return fig


def _looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    others = [m for m in dict.fromkeys(methods) if m not in _LOOK]
    return {**_LOOK, **{m: _OTHERS[i % len(_OTHERS)] for i, m in enumerate(others)}}


def _draw_setting(ax: Axes, setting: Setting, color: str, marker: str) -> None:
    if setting.top1 is None:
        return
    (low, high), several = setting.cost_range, len(setting.found) > 1
    ax.errorbar(
        setting.cost,
        setting.top1,
        xerr=[[max(0.0, setting.cost - low)], [max(0.0, high - setting.cost)]],
        yerr=[[setting.top1 - min(setting.top1s)], [max(setting.top1s) - setting.top1]] if several else None,
        fmt="none",
        ecolor=color,
        elinewidth=1.0,
        alpha=0.7,
        zorder=2,
    )
    face = color if setting.kind == "measured" else "white"
    ax.plot(setting.cost, setting.top1, ls="", marker=marker, ms=7, mec=color, mfc=face, mew=1.4, zorder=4)
    if several:
        for f, top1 in zip(setting.found, setting.top1s, strict=True):
            fill = color if f.kind == "measured" else "white"
            ax.plot(f.cost, top1, ls="", marker=marker, ms=3.5, mec=color, mfc=fill, alpha=0.6, zorder=3)


def _frame(ax: Axes, panel: Panel, accuracy: str) -> None:
    """Limits with a margin, axes, title."""
    rated = [s for s in panel.settings if s.top1 is not None]
    xs = [x for s in rated for x in (*s.cost_range, s.cost, *(f.cost for f in s.found))]
    ys = [y for s in rated for y in s.top1s]
    for values, limit, least in ((xs, ax.set_xlim, 0.04 * max(xs)), (ys, ax.set_ylim, 0.5)):
        margin = max(least, 0.12 * (max(values) - min(values)))
        limit(min(values) - margin, max(values) + margin)
    if max(xs) > 4 * min(xs):
        ax.set_xscale("log")
        ax.set_xlim(min(xs) / 1.15, max(xs) * 1.15)
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    what = "latency (ms)" if panel.unit == "ms" else f"computed cost ({panel.unit})"
    ax.set_xlabel(what)
    ax.set_ylabel(accuracy)
    ax.set_title(panel.title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def _legend(settings: Sequence[Setting], looks: dict[str, tuple[str, str]]) -> tuple[list[Line2D], list[str]]:
    methods = list(dict.fromkeys(s.method for s in settings if s.top1 is not None))
    methods.sort(key=lambda m: ORDER.index(m) if m in ORDER else len(ORDER))
    handles = [Line2D([], [], ls="", marker=looks[m][1], color=looks[m][0], ms=7) for m in methods]
    names = list(methods)
    if any(s.kind != "measured" for s in settings):
        handles.append(Line2D([], [], ls="", marker="o", mfc="white", mec="black", ms=7))
        names.append("hollow: not measured")
    if any(len(s.found) > 1 for s in settings):
        handles.append(Line2D([], [], ls="", marker="o", color="#777777", ms=4, alpha=0.6))
        names.append("small: one seed")
    handles.append(Line2D([], [], ls="--", color="black", lw=1))
    names.append("Pareto line")
    return handles, names


def _label(ax: Axes, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    rated = [(s, s.top1) for s in panel.settings if s.top1 is not None]
    line = [(s.cost, s.top1 or 0.0) for s in pareto_line(panel.settings)]
    label_points(
        ax,
        [s.cost for s, _ in rated],
        [top1 for _, top1 in rated],
        [_name(s, panel) for s, _ in rated],
        [looks[s.method][0] for s, _ in rated],
        line,
    )


def _name(setting: Setting, panel: Panel) -> str:
    """Method, its settings where there are several, and of space and target what is not the same in the panel."""
    parts = [setting.method, *([f"({setting.label})"] if setting.label else [])]
    if len({s.space for s in panel.settings}) > 1:
        parts.append(setting.space)
    if len({s.target for s in panel.settings}) > 1:
        parts.append(f"≤ {setting.target:.3g}")
    return " ".join(parts)
