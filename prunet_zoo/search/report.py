"""report.html: the network found, layer by layer, and how the search went. One self-contained file."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from prunet_zoo.page import figure_png, html_page, html_picture, html_table
from prunet_zoo.search.report_methods import MASKED, SURE, draw_method
from prunet_zoo.spec import NetSpec

_COLORS = {"conv": "#8d99ae", "irb": "#2a6f97", "fused_irb": "#e07a5f", "rep": "#6a994e", "channels": "#2a6f97"}


def draw_network(spec: Any, space: Any = None, encoding: list[Any] | None = None) -> Figure:
    """Bars, one a layer: hidden width found (of a rep block, and in a `PrunedSpec`, output channels) over the greatest
    width of the space; removed layers stand empty."""
    rows = _rows(spec, space, encoding)
    fig, ax = plt.subplots(figsize=(max(6.0, 0.62 * len(rows) + 1.5), 3.8))
    top = max((r["max"] for r in rows), default=1)
    for x, row in enumerate(rows):
        ax.bar(x, row["max"], color="none", edgecolor="#bbbbbb", linewidth=0.8, linestyle=":", width=0.8)
        if row["type"] is None:
            ax.text(x, top * 0.02, "removed", rotation=90, ha="center", va="bottom", color="#999999", fontsize=8)
            continue
        ax.bar(x, row["width"], color=_COLORS[row["type"]], width=0.8)
        kernel = f"\nk{row['kernel']}" if row["kernel"] else ""
        ax.text(x, row["width"] + top * 0.01, f"{row['width']}{kernel}", ha="center", va="bottom", fontsize=7)
    labels = [f"s{r['stage']}" + (f"\n/{r['stride']}" if r["stride"] else "") for r in rows]
    ax.set_xticks(range(len(rows)), labels, fontsize=7)
    ax.set_ylim(0, top * 1.16)
    ax.set_ylabel("channels" if "channels" in {r["type"] for r in rows} else "channels (hidden width)")
    ax.set_title(f"{spec.name}: {spec.params() / 1e6:.2f} M parameters, {spec.macs() / 1e6:.1f} MMACs", fontsize=10)
    used = {r["type"] for r in rows} - {None}
    ax.legend(handles=[Patch(color=_COLORS[k], label=k) for k in _COLORS if k in used], fontsize=8, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    return fig


def _rows(spec: Any, space: Any, encoding: list[Any] | None) -> list[dict[str, Any]]:
    if not isinstance(spec, NetSpec):
        return [
            {"stage": la.index, "stride": None, "type": "channels", "width": choice[1], "kernel": 0,
             "max": la.candidate_widths(0)[-1]}
            for la, choice in zip(space.layers, encoding or [], strict=True)
        ]  # fmt: skip
    placed = iter(spec.placed())
    rows = []
    if space is None or encoding is None:
        return [_row(p.stage, p.stride, p.block, p.block.hidden or p.block.out_channels) for p in placed]
    for _ in range(sum(len(s.blocks) for s in space.stem)):
        p = next(placed)
        rows.append(_row(p.stage, p.stride, p.block, p.block.out_channels))
    for layer, choice in zip(space.layers, encoding, strict=True):
        greatest = layer.widths[-1] if layer.widths else layer.out_channels
        if choice is None:
            rows.append({"stage": layer.stage, "stride": None, "type": None, "width": 0, "max": greatest, "kernel": 0})
        else:
            p = next(placed)
            rows.append(_row(p.stage, p.stride, p.block, greatest))
    return rows


def _row(stage: int, stride: int, block: Any, greatest: int) -> dict[str, Any]:
    width = block.hidden or block.out_channels
    return {
        "stage": stage, "stride": stride, "type": block.type, "width": width, "max": max(greatest, width),
        "kernel": block.kernel_size,
    }  # fmt: skip


def draw_history(report: dict[str, Any]) -> Figure:
    """Expected cost against the target, candidates and depth, loss and accuracy, speed and memory, by epoch."""
    rows, unit = report["history"], report["unit"]
    epochs = [r["epoch"] for r in rows]
    fig, axes = plt.subplots(2, 2, figsize=(10, 5.6), sharex=True)
    (a, b), (c, d) = axes
    a.plot(epochs, [r["expected"] for r in rows], marker="o", ms=3, label=f"expected, {unit}")
    a.axhspan(0.97 * report["target"], report["target"], color="#2a9d8f", alpha=0.25, label="(0.97 T, T]")
    a.set_title(f"expected cost and target ({unit})", fontsize=9)
    masked = report["method"] in MASKED
    left = "channels left" if masked else "candidate blocks left"
    b.step(epochs, [r["candidates"] for r in rows], where="post", label=left)
    if not masked:
        b.step(epochs, [r["depth"] for r in rows], where="post", label="layers in the likeliest network")
    b.set_ylim(bottom=0)
    b.set_title("what is left", fontsize=9)
    c.plot(epochs, [r["acc"] for r in rows], marker="o", ms=3, label="weights' part")
    held = [(r["epoch"], r["arch_acc"]) for r in rows if r.get("arch")]
    if held:
        c.plot(*zip(*held, strict=True), marker="o", ms=3, label="architecture's part")
    c.set_title("top-1 of what is trained (%)", fontsize=9)
    d.plot(epochs, [r["steps_per_s"] for r in rows], marker="o", ms=3, color="#2a6f97", label="steps/s")
    d.set_ylim(bottom=0)
    twin = d.twinx()
    twin.plot(epochs, [r["state_mb"] for r in rows], color="#e07a5f", ls="--", label="weights, gradients, moments, MB")
    twin.set_ylim(bottom=0)
    d.set_title("speed (left) and memory held between steps (right, MB)", fontsize=9)
    handles = [*d.get_lines(), *twin.get_lines()]
    d.legend(handles, [str(h.get_label()) for h in handles], fontsize=7)
    for ax in (a, b, c):
        ax.legend(fontsize=7)
    for ax in (c, d):
        ax.set_xlabel("epoch")
    if report["decided_epoch"] < report["epochs"]:
        for ax in (a, b, c, d):
            ax.axvline(report["decided_epoch"] + 0.5, color="#888888", lw=0.8, ls=":")
    fig.tight_layout()
    return fig


def render_report(report: dict[str, Any], spec: Any, space: Any) -> str:
    """The whole report as HTML text with embedded pictures.

    Args:
        report: what `report.json` holds.
        spec: the network found, `NetSpec` or `PrunedSpec`.
        space: where it was searched for, `SearchSpace` or `TracedSpace`.
    """
    pictures = [draw_network(spec, space, report["encoding"])]
    if report["history"]:
        pictures.append(draw_history(report))
    own = draw_method(report)
    pictures += [own] if own is not None else []
    images = "\n".join(html_picture(figure_png(f)) for f in pictures)
    table = html_table(["", ""], [[k, v] for k, v in _facts(report).items()])
    layers = _layers(spec, space, report["encoding"])
    events = html_table(["epoch", "layer", "pruned", "what", "probability"], [_event(e) for e in report["events"]])
    rest = f"{_trials(report)}<h2>Layers</h2>{layers}<h2>Pruned during the search</h2>{events}"
    return html_page(spec.name, f"{table}{images}{rest}")


def _event(event: dict[str, Any]) -> list[Any]:
    probability = "" if event["kind"] in SURE else f"{event['probability']:.3f}"
    return [event["epoch"] + 1, event["layer"], event["kind"], event["what"], probability]


def _layers(spec: Any, space: Any, encoding: list[Any]) -> str:
    """The network's layers; of one that is no `NetSpec`, those with fewer channels."""
    if isinstance(spec, NetSpec):
        return html_table(
            ["block", "type", "kernel", "hidden", "in → out", "stride", "map"],
            [
                [p.name, p.block.type, p.block.kernel_size, p.block.hidden or "",
                 f"{p.in_channels} → {p.block.out_channels}", p.stride, f"{p.out_size[0]}×{p.out_size[1]}"]
                for p in spec.placed()
            ],
        )  # fmt: skip
    rows = [[la.name, ch[1], la.candidate_widths(0)[-1]] for la, ch in zip(space.layers, encoding, strict=True)]
    return html_table(["layer", "channels", "of"], rows)


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    measured, unit, correction = report["measured"], report["unit"], report["correction"]
    source = {k: v for k, v in report["cost"].items() if not isinstance(v, dict)}
    if "predictor" in report["cost"]:
        fit = report["cost"]["fit"]
        source["error of the fit, each network left out"] = f"mean {fit['mean_abs']:.1%}, worst {fit['worst']:.1%}"
    inherited, tuned = report["top1_inherited"], report["epochs"] - report["decided_epoch"]
    weights = f"inherited weights, trained since the decision (epochs: {tuned})" if tuned else "inherited weights"
    return {
        "method": report["method"],
        "search space": f"{report['space']['name']} ({report['space']['count']:.3g} encodings)",
        f"target ({unit})": f"{report['target']:.4g}",
        f"predicted ({unit})": f"{report['predicted']:.4g}"
        + (f"; by measured networks like it, × {correction:.3f}" if correction != 1.0 else ""),
        "measured (ms)": f"not measured: {report['reason']}" if measured is None else f"{measured['median_ms']:.4g} "
        f"(95% interval {measured['ci_low_ms']:.4g} to {measured['ci_high_ms']:.4g}; p10 {measured['p10_ms']:.4g}, "
        f"p90 {measured['p90_ms']:.4g}, n {measured['n']})",
        "latency is": report["status"]
        + (f" ({report['reason']})" if report["status"] == "measured" and report["reason"] else ""),
        "cost from": ", ".join(f"{k} {v}" for k, v in source.items()),
        f"top-1 (%) with {weights}": "no validation data" if inherited is None else f"{inherited:.2f}",
        "parameters": f"{report['params']:,}",
        "MACs": f"{report['macs']:,}",
        "seed": report["seed"],
        "decided": "at the end" if report["decided_epoch"] == report["epochs"]
        else f"after epoch {report['decided_epoch']} of {report['epochs']}",
        "time (s)": f"{report['search_seconds']:.1f}, of which {report['seconds']:.1f} of training",
        "peak memory (MB)": f"{report['peak_mb']:.0f}",
    }  # fmt: skip


def _trials(report: dict[str, Any]) -> str:
    """The networks that were measured on the way to the target."""
    if not report["trials"]:
        return ""
    rows = [
        [f"{t['predicted']:.4g}", f"{t['measured']:.4g}", f"{t['ci_low']:.4g} to {t['ci_high']:.4g}",
         f"{t['measured'] / report['target'] - 1:+.1%}", t["measurements"], "; ".join(t["disturbed"]) or "no"]
        for t in report["trials"]
    ]  # fmt: skip
    head = ["predicted (ms)", "measured (ms)", "95% interval", "off the target", "measurements", "disturbed"]
    return "<h2>Networks measured on the way to the target</h2>" + html_table(head, rows)
