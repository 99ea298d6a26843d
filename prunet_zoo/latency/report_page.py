"""The pictures and the page of a latency report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunet_zoo.files import write_atomic
from prunet_zoo.latency.accuracy import KnownNetwork
from prunet_zoo.latency.breakdown import Breakdown
from prunet_zoo.latency.draw import Point, draw_accuracy, draw_breakdowns, draw_predictions
from prunet_zoo.latency.predictions import Prediction
from prunet_zoo.latency.record import Record
from prunet_zoo.page import figure_png, html_page, html_picture, html_table

Networks = Sequence[tuple[KnownNetwork, Record]]


def write_page(
    out: Path,
    networks: Networks,
    predictions: Sequence[Prediction],
    breakdowns: Sequence[Breakdown],
    data: dict[str, Any],
) -> None:
    """Write ``report.html`` and its pictures as PNG files into a folder.

    Args:
        out: the folder.
        networks: each with its record.
        predictions: a column of a picture each.
        breakdowns: a row of a picture each.
        data: what `report.json` holds.
    """
    first = networks[0][1]
    title = f"{first.device}, {_how(first)}"
    pictures = {"accuracy.png": figure_png(draw_accuracy([_point(*pair) for pair in networks], title))}
    for name, published in (("tables.png", False), ("predictors.png", True)):
        some = [p for p in predictions if p.published == published]
        if some:
            pictures[name] = figure_png(draw_predictions(some))
    if breakdowns:
        pictures["blocks.png"] = figure_png(draw_breakdowns(breakdowns))
    for name, png in pictures.items():
        write_atomic(out / name, png)
    sections = [
        _accuracy_section(networks, data, pictures["accuracy.png"]),
        _prediction_section(predictions, pictures),
        _block_section(breakdowns, pictures.get("blocks.png")),
        _record_section(networks),
    ]
    write_atomic(out / "report.html", html_page(f"Latency: {title}", "".join(sections)))


def _how(record: Record) -> str:
    return (
        f"{record.backend} {record.backend_version}, {record.dtype}, batch {record.batch}, {record.threads} thread(s)"
    )


def _point(network: KnownNetwork, record: Record) -> Point:
    interval = (record.ci_low_ms, record.ci_high_ms)
    marks = (network.teacher is not None, bool(record.disturbed))
    return Point(network.label, network.family, record.median_ms, network.top1, *interval, *marks)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _accuracy_section(networks: Networks, data: dict[str, Any], picture: bytes) -> str:
    reference, dates = data["reference"], sorted(record.date for _, record in networks)
    count = len(reference["median_ms"])
    teachers = [f"{network.label} ({network.teacher})" for network, _ in networks if network.teacher]
    unsure = {network.label for network, record in networks if record.disturbed}
    line = [f"{label} (disturbed)" if label in unsure else label for label in data["pareto"]]
    text = [
        "Latency was measured on this device with random weights, at the input size that the top-1 was published for. "
        "Top-1 is as published, each with its own training recipe, so it compares weights, "
        "not architectures alone. Bars, mostly smaller than the marks, are 95% intervals of the latency.",
        f"Measured {dates[0]} to {dates[-1]}. {reference['name']} was measured {count} times, once in every group of "
        f"networks: its figures lie {reference['spread']:.1%} apart.",
        f"On the Pareto line: {', '.join(line)}."
        + (" Where disturbed figures are shown (grey), it may run elsewhere." if unsure else ""),
        *([f"Hollow marks: distilled, from the teachers {', '.join(teachers)}."] if teachers else []),
        *(f"Source, {key.replace('_', ' ')}: {text}" for key, text in data["sources"].items()),
    ]
    return "<h2>Accuracy against latency</h2>" + html_picture(picture) + "".join(map(_paragraph, text))


def _prediction_section(predictions: Sequence[Prediction], pictures: dict[str, bytes]) -> str:
    head = ["source", "of", "networks", "median error", "worst", "within ±5%", "within ±10%", "τ"]
    rows = [
        [p.source, p.about, len(p.networks), f"{p.typical:.1%}", f"{p.worst:.1%}", f"{p.within(0.05):.0%}",
         f"{p.within(0.10):.0%}", "–" if p.tau is None else f"{p.tau:.3f}"]
        for p in predictions
    ]  # fmt: skip
    shown = "".join(html_picture(pictures[name]) for name in ("tables.png", "predictors.png") if name in pictures)
    text = _paragraph(
        "A table is compared with networks that it was not corrected on, measured now. A predictor, which needs no "
        "device, is compared with published figures, each network predicted by a fit without it."
    )
    return "<h2>Predicted against measured</h2>" + text + shown + html_table(head, rows)


def _block_section(breakdowns: Sequence[Breakdown], picture: bytes | None) -> str:
    if picture is None:
        return ""
    kinds = list(dict.fromkeys(kind for b in breakdowns for kind in b.by_kind()))
    head = ["network", *(kind.replace("_", " ") for kind in kinds), "sum (ms)", "whole network (ms)", "difference"]
    rows = [
        [b.spec_name, *(f"{b.by_kind().get(kind, 0.0) / b.sum_ms:.0%}" for kind in kinds), f"{b.sum_ms:.4g}",
         f"{b.whole_ms:.4g}", f"{b.sum_ms / b.whole_ms - 1:+.1%}"]
        for b in breakdowns
    ]  # fmt: skip
    text = _paragraph(
        "Each block was measured in a probe, in turn with the whole network; below each stage (s) stands the side of "
        "the map that goes into it. The difference is what blocks do not show alone: the call, fusion across blocks, "
        "gaps between kernels, other contents of the caches."
    )
    return "<h2>Where the time goes</h2>" + text + html_picture(picture) + html_table(head, rows)


def _weights(network: KnownNetwork) -> str:
    return (network.weights or "zoo") + (f", distilled from {network.teacher}" if network.teacher else "")


def _record_section(networks: Networks) -> str:
    head = ["network", "weights", "px", "top-1 (%)", "latency (ms)", "95% interval", "runs", "disturbed", "date"]
    rows = [
        [r.spec_name, _weights(n), r.input_size[0], n.top1, f"{r.median_ms:.4g}",
         f"{r.ci_low_ms:.4g} – {r.ci_high_ms:.4g}", r.n, "; ".join(r.disturbed) or "no", r.date]
        for n, r in sorted(networks, key=lambda pair: pair[1].median_ms)
    ]  # fmt: skip
    prints = [[str(key), str(value)] for key, value in networks[-1][1].fingerprint.items()]
    return "<h2>Records</h2>" + html_table(head, rows) + "<h2>Device</h2>" + html_table(["", ""], prints)
