"""What a pipeline found: report.json, report.html (one file, pictures inside), and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.jsonfile import list_named
from prunet_zoo.mm.detector_latency import LATENCY_PARTS
from prunet_zoo.mm.pipeline import REPORT, Pipeline
from prunet_zoo.mm.pipeline_config import CLASSIFIER, MEASURED
from prunet_zoo.mm.training import METRICS
from prunet_zoo.page import figure_png, html_page, html_picture, html_table
from prunet_zoo.search.report import draw_history, draw_network
from prunet_zoo.space import load_space
from prunet_zoo.spec import NetSpec, load_spec
from prunet_zoo.version import __version__


def write_report(pipeline: Pipeline) -> dict[str, Any]:
    """Collect what the stages left behind, write ``report.json`` and ``report.html``; returns the former's content."""
    report = collect(pipeline)
    write_json(pipeline.dir / REPORT[0], report)
    write_atomic(pipeline.dir / REPORT[1], render(pipeline, report))
    return report


def collect(pipeline: Pipeline) -> dict[str, Any]:
    """The figures of all stages."""
    config, folder = pipeline.config, pipeline.dir
    spec, search, measured = load_spec(str(folder / "search/spec.json")), _read(folder / "search/report.json"), None
    if (folder / MEASURED).is_file():
        measured = _read(folder / MEASURED)
    report: dict[str, Any] = {
        "title": config.title,
        "network": {"name": spec.name, "hash": spec.hash, "params": spec.params(), "macs": spec.macs()},
        "input_size": spec.input_size,
        "target_ms": search["target"],
        "predicted_ms": search["predicted"],
        "predicted_for": (search.get("cost") or {}).get("predictor"),
        "measured": measured,
        "top1_inherited": search.get("top1_inherited"),
        "seed": config.seed,
        "seconds": pipeline.seconds,
    }
    if (config.cfg.get("table") or {}).get("space"):
        report["reach_ms"] = list(config.reach())
    if config.cfg.get(CLASSIFIER):
        report["classifier"] = _run(folder / CLASSIFIER)
    report["detectors"] = {}
    for name in config.detectors:
        latency = _read(folder / config.speed_file(name))
        report["detectors"][name] = {**_run(folder / name), "latency": latency, "picture": config.pictures()[name]}
    report["commands"] = {name: record["commands"] for name, record in pipeline.state["stages"].items()}
    report["versions"] = {"prunet_zoo": __version__}
    return report


def _run(folder: Path) -> dict[str, Any]:
    """What a training run says of itself, without what the whole report says."""
    record = _read(folder / METRICS)
    keys = ("config", "metrics", "best", "params", "backbone_params", "macs", "input_size", "device", "date")
    return {key: record[key] for key in keys if key in record}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report's figures as (what, value), for the terminal and the page."""
    network, rows = report["network"], []
    reach = report.get("reach_ms")
    told = f"  (the space reaches {reach[0]:.3g} to {reach[1]:.3g})" if reach else ""
    rows.append(("latency target", f"{report['target_ms']:.4g} ms{told}"))
    elsewhere = report["predicted_for"]  # a device that the target is meant for, which was not measured on
    rows.append((f"predicted for {elsewhere or 'this machine'}", f"{report['predicted_ms']:.4g} ms"))
    measured = report["measured"]
    if measured and elsewhere:
        rows.append((f"measured on {measured['device']}", f"{measured['median_ms']:.4g} ms"))
    elif measured:
        error = 100 * (measured["median_ms"] / report["target_ms"] - 1)
        rows.append(("measured", f"{measured['median_ms']:.4g} ms  ({error:+.1f}% of the target)"))
    px = report["input_size"]
    rows.append((f"parameters, MACs at {px} px", f"{network['params']:,}, {network['macs']:,}"))
    if "classifier" in report:
        top1 = report["classifier"]["metrics"].get("top1")
        rows.append(("classifier top-1, last epoch", "not evaluated" if top1 is None else f"{top1:.2f} %"))
    for name, item in report["detectors"].items():
        metrics = item["metrics"]
        shown = [f"{metrics[f'coco/{key}']:.3f}" for key in ("bbox_mAP_50", "bbox_mAP") if f"coco/{key}" in metrics]
        rows.append((f"{name}: box mAP50 / mAP", " / ".join(shown) or "not evaluated"))
        latency = item["latency"]
        size = "×".join(map(str, latency["input_size"]))
        split = ", ".join(f"{part} {latency[f'{key}_ms']:.3g}" for key, part in LATENCY_PARTS.items())
        told = f"{latency['total_ms']:.4g} ms ({split}), PyTorch, {latency['threads']} thread(s)"
        rows.append((f"{name}: one image of {size} px", told))
    rows.append(("seconds by stage", ", ".join(f"{key} {value:.0f}" for key, value in report["seconds"].items())))
    return rows


def show(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the table at the end."""
    measured = report["measured"]
    title = report["title"]
    if measured:
        setting = f"{measured['backend']}, {measured['threads']} thread(s), batch {measured['batch']}"
        title = f"{title}: {measured['device']}, {setting}"
    table = Table(title=title, show_header=False)
    for row in rows_of(report):
        table.add_row(*row)
    console.print(table)
    for what, name in (("report", REPORT[1]), ("figures", REPORT[0])):
        console.print(f"{what}: {folder / name}", highlight=False, soft_wrap=True)


def render(pipeline: Pipeline, report: Mapping[str, Any]) -> str:
    """report.html: figures, network, search, training, detections."""
    folder = pipeline.dir
    spec, search = load_spec(str(folder / "search/spec.json")), _read(folder / "search/report.json")
    parts = [html_table(["", ""], [list(row) for row in rows_of(report)]), "<h2>Network</h2>"]
    parts.append(html_picture(figure_png(_draw_found(spec, search))))
    if search.get("history"):
        parts += ["<h2>Search</h2>", html_picture(figure_png(draw_history(search)))]
    runs = [*(["classifier"] if "classifier" in report else []), *report["detectors"]]
    curves = {name: read_scalars(folder / name) for name in runs}
    if any(curves.values()):
        parts += ["<h2>Training</h2>", html_picture(figure_png(draw_training(curves)))]
    for name, item in report["detectors"].items():
        parts += [f"<h2>Detections: {name}</h2>", html_picture((folder / item["picture"]).read_bytes())]
    commands = [[name, f"{report['seconds'][name]:.0f}", line] for name, c in report["commands"].items() for line in c]
    parts += ["<h2>Commands</h2>", html_table(["stage", "seconds", "command"], commands)]
    return html_page(f"{report['title']}: {report['network']['name']}", "".join(parts))


def _draw_found(spec: NetSpec, search: Mapping[str, Any]) -> Figure:
    space = (search.get("space") or {}).get("name")
    if space in list_named("spaces") and search.get("encoding"):
        return draw_network(spec, load_space(space), search["encoding"])
    return draw_network(spec)


def read_scalars(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Name → (step, value) of the losses, and of the metrics of each validation, from MMEngine's log of a run.

    A run that was stopped has several logs; where two of them have a step, the later one counts.
    """
    found: dict[str, dict[float, float]] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a log whose process was killed
            for name in ("loss", "top1", "coco/bbox_mAP_50", "coco/bbox_mAP"):
                if name in row and "step" in row:
                    found.setdefault(name, {})[row["step"]] = row[name]
    return {name: sorted(points.items()) for name, points in found.items()}


def draw_training(curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> Figure:
    """One row a run: its loss by step, and what its validations gave by epoch."""
    runs = {name: series for name, series in curves.items() if series}
    fig, axes = plt.subplots(len(runs), 2, figsize=(10, 2.6 * len(runs)), squeeze=False)
    for (loss, metric), (name, series) in zip(axes, runs.items(), strict=True):
        if series.get("loss"):
            marker = "o" if len(series["loss"]) < 8 else ""  # a line of one point is not seen
            loss.plot(*zip(*series["loss"], strict=True), color="#2a6f97", lw=1.2, marker=marker, ms=3)
        loss.set_title(f"{name}: loss by step", fontsize=9)
        loss.set_ylim(bottom=0)
        for key, points in series.items():
            if key != "loss":
                metric.plot(*zip(*points, strict=True), marker="o", ms=3, label=key)
                step, value = points[-1]
                metric.annotate(f"{value:.4g}", (step, value), textcoords="offset points", xytext=(4, 4), fontsize=8)
        metric.set_title(f"{name}: validation by epoch", fontsize=9)
        metric.set_ylim(bottom=0)
        if metric.has_data():
            metric.legend(fontsize=7)
        else:
            metric.text(
                0.5, 0.5, "not evaluated", ha="center", va="center", transform=metric.transAxes, color="#999999"
            )
    fig.tight_layout()
    return fig
