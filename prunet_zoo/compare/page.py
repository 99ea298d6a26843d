"""``report.html``, ``report.json`` and the picture of a comparison, and the table for the terminal."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prunet_zoo.compare.draw import draw_comparison
from prunet_zoo.compare.reports import Found, Unfinished
from prunet_zoo.compare.rows import Panel, Setting, compare
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.page import figure_png, html_page, html_picture, html_table

PAGE, DATA, PICTURE = "report.html", "report.json", "accuracy_latency.png"
TUNED = "epochs after"  # the decision
HEAD = (
    "method", "space", "device", "seed", "target", "cost", "", "top-1 (%)", TUNED, "MMACs", "M params", "s", "peak MB"
)  # fmt: skip
_DASH = "–"


def cells(found: Found, label: str = "") -> list[str]:
    """One search as a row under `HEAD`; ``label``: what tells its settings from others of the method."""
    told = dict(found.setting)
    device = ", ".join(str(told[key]) for key in ("device", "backend") if key in told) or "none"
    threads = f", {told['threads']} thr." if "threads" in told else ""
    missed = " (missed)" if found.status.startswith("missed") else ""
    noise = " (disturbed)" if found.disturbed else ""
    return [
        f"{found.method} ({label})" if label else found.method,
        found.space,
        device + threads,
        _DASH if found.seed is None else str(found.seed),
        f"{found.target:.4g} {found.unit}",
        f"{found.cost:.4g} {found.unit}",
        found.kind + missed + noise,
        _DASH if found.top1 is None else f"{found.top1:.2f}",
        _DASH if found.tuned is None else str(found.tuned),
        f"{found.macs / 1e6:.2f}",
        f"{found.params / 1e6:.3f}",
        f"{found.seconds:.0f}",
        _DASH if found.peak_mb is None else f"{found.peak_mb:.0f}",
    ]


def terminal_table(panels: Sequence[Panel]) -> Table:
    """All searches, a section a panel."""
    table = Table(title=f"searches; top-1 with the weights left; '{TUNED}': epochs trained since the decision")
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for panel in panels:
        for setting in panel.settings:
            for found in setting.found:
                table.add_row(*map(escape, cells(found, setting.label)))
        table.add_section()
    return table


def write_comparison(out: Path, found: Sequence[Found], unfinished: Sequence[Unfinished]) -> list[Panel]:
    """Write page, data and (where a network was evaluated) the picture into ``out``; returns the panels."""
    panels = compare(found)
    figure = draw_comparison(panels)
    png = None if figure is None else figure_png(figure)
    if png is None:
        (out / PICTURE).unlink(missing_ok=True)
    else:
        write_atomic(out / PICTURE, png)
    rows = [f.to_dict() for p in panels for s in p.settings for f in s.found]
    about = {"searches": rows, "panels": [p.to_dict() for p in panels]}
    write_json(out / DATA, {**about, "unfinished": [u.to_dict() for u in unfinished]})
    write_atomic(out / PAGE, render(out, panels, png, unfinished))
    return panels


def render(out: Path, panels: Sequence[Panel], png: bytes | None, unfinished: Sequence[Unfinished]) -> str:
    """The page; ``out`` is where it will stand, for its links to the searches' own pages."""
    parts = [html_picture(png)] if png else [_paragraph("No network was evaluated, so there is no picture.")]
    parts.append(
        _paragraph(
            f"Accuracy is that of the weights that the search leaves: inherited and, where '{TUNED}' is not 0, trained "
            "for so many epochs since the decision. No network found was trained anew. Latencies of different "
            "devices, units or ways of running stand in panels of their own. Bars go from the lowest to the highest "
            "seed; of a single search, over the 95% interval of its latency."
        )
    )
    for panel in panels:
        found = [f for s in panel.settings for f in s.found]
        rows = [cells(f, s.label) for s in panel.settings for f in s.found]
        parts += [f"<h2>{html.escape(panel.title)}</h2>", html_table(list(HEAD), rows)]
        several = [s for s in panel.settings if len(s.found) > 1]
        if several:
            parts.append(html_table(*_means(several, panel.unit)))
        told = [
            [f"{s.method} ({s.label})", s.space, f"{s.target:.4g}", ", ".join(f"{k}: {v}" for k, v in s.differs)]
            for s in panel.settings
            if s.differs
        ]
        if told:
            head = ["method", "space", "target", "what differs"]
            parts.append("<h3>Settings that differ in more than the seed</h3>" + html_table(head, told))
        again = [[f.folder, s.method, str(f.seed)] for s in panel.settings for f in s.repeated]
        if again:
            head = ["search", "method", "seed"]
            parts.append("<h3>The same seed again, not counted</h3>" + html_table(head, again))
        missed = [[f.folder, f.status] for f in found if f.status.startswith("missed")]
        if missed:
            parts.append("<h3>Targets that were missed</h3>" + html_table(["search", "status"], missed))
        parts.append(_links(out, found))
    if unfinished:
        rows = [[u.folder, u.method or _DASH, u.why] for u in unfinished]
        parts.append("<h2>Left out</h2>" + html_table(["folder", "method", "why"], rows))
    return html_page("Searches compared", "".join(parts))


def _means(settings: Sequence[Setting], unit: str) -> tuple[list[str], list[list[Any]]]:
    head = ["method", "space", "target", "seeds", f"{unit}: mean (range)", "top-1: mean (range)", "deviation"]
    rows = []
    for setting in settings:
        s = setting.to_dict()
        low, high = s["cost_range"]
        top1 = _DASH
        if s["top1"] is not None:
            top1 = f"{s['top1']:.2f} ({s['top1_range'][0]:.2f} to {s['top1_range'][1]:.2f})"
        spread = s["top1_deviation"]
        cost = f"{s['cost']:.4g} ({low:.4g} to {high:.4g})"
        shown = _DASH if spread is None else f"{spread:.2f}"
        method = f"{setting.method} ({setting.label})" if setting.label else setting.method
        rows.append([method, s["space"], f"{s['target']:.4g}", len(s["seeds"]), cost, top1, shown])
    return head, rows


def _links(out: Path, found: Sequence[Found]) -> str:
    links = []
    for f in found:
        path = Path(f.folder) / PAGE
        if path.is_file():
            href = html.escape(Path(os.path.relpath(path, out)).as_posix(), quote=True)
            links.append(f"<li><a href='{href}'>{html.escape(f.folder)}</a></li>")
    return f"<p>The searches' own pages:</p><ul>{''.join(links)}</ul>" if links else ""


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
