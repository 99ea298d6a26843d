"""Make what lists the zoo from its records: the documents' tables, OpenMMLab's metafiles and model-index.yml.

python tools/make_index.py             # write them from the zoo's index, the specs and checkpoints/results.csv
python tools/make_index.py --check     # say what does not agree, and write nothing
python tools/make_index.py --measure   # first measure the latency of the networks on this machine, into results.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import DataError
from prunet_zoo.files import write_atomic
from prunet_zoo.models.backbone import resolve_arch
from prunet_zoo.spec import NetSpec
from prunet_zoo.zoo import ModelEntry, load_index
from prunet_zoo.zoo.index import COLLECTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "checkpoints" / "results.csv"
FIELDS = [
    *("model", "task", "dataset", "metric", "value", "unit", "input_size"),
    *("source", "reference", "device", "command", "date"),
]
SOURCES = ("published", "computed", "measured")
BEGIN, END = "<!-- zoo table: made by tools/make_index.py -->", "<!-- end of the zoo table -->"
CPU_LATENCY = "latency onnxruntime 1 thread"
DEMO_BEGIN, DEMO_END = "<!-- demo table: made by tools/make_index.py -->", "<!-- end of the demo table -->"
DEMO_PAGES = ("docs/zoo.md", "checkpoints/README.md")
ACCURACY = {
    "top1": "Top 1 Accuracy",
    "bbox_mAP": "box AP",
    "bbox_mAP_50": "box AP50",
}  # metric → its name in a metafile
DEMO_METRICS = {"top1": "top-1", "bbox_mAP": "box mAP", "bbox_mAP_50": "mAP50"}
LAYERS = {
    "PruNet": ["Convolution", "Inverted Residual", "Batch Normalization"],
    "GPUNet": ["Convolution", "Inverted Residual", "Fused Inverted Residual", "Squeeze and Excitation"],
}  # of a collection
Row = dict[str, str]


def read_results(path: Path = RESULTS) -> list[Row]:
    """The rows of ``results.csv``.

    Raises:
        DataError: a row is incomplete; its line is named.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; it comes with the repository: git checkout {path.name}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != FIELDS:
        raise DataError(f"{path} has the columns {reader.fieldnames}, expected {FIELDS}")
    for number, row in enumerate(rows, start=2):
        check_row(row, f"{path.name}, line {number}")
    return rows


def check_row(row: Row, where: str) -> None:
    """Raise `DataError` where a figure does not say where it is from."""
    if row["model"] not in load_index():
        raise DataError(f"{where}: {row['model']!r} is not in the zoo's index")
    if row["source"] not in SOURCES:
        raise DataError(f"{where}: source {row['source']!r} must be one of {', '.join(SOURCES)}")
    try:
        float(row["value"])
    except ValueError:
        raise DataError(f"{where}: value {row['value']!r} is not a number") from None
    needed = {"published": ("reference", "date"), "computed": ("command",), "measured": ("device", "command", "date")}
    for field in ("metric", "unit", *needed[row["source"]], *(("device",) if row["unit"] == "ms" else ())):
        if not row[field]:
            raise DataError(f"{where}: a {row['source']} figure needs {field!r}")


def results_text(rows: Iterable[Row]) -> str:
    """``results.csv`` of these rows."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def value(rows: Sequence[Row], model: str, metric: str) -> float | None:
    """The figure of a model; None where there is none."""
    found = [row for row in rows if row["model"] == model and row["metric"] == metric]
    if len(found) > 1:
        raise DataError(f"{RESULTS.name} has {len(found)} rows for {metric!r} of {model!r}; keep one")
    return float(found[0]["value"]) if found else None


def listed() -> list[tuple[ModelEntry, NetSpec]]:
    """The published models, with their specs."""
    return [(entry, resolve_arch(entry.arch)) for entry in load_index().values() if entry.arch is not None]


def readme_table(rows: Sequence[Row]) -> str:
    """The Markdown table of the published networks."""
    columns = (
        ("ImageNet top-1", "top1", ".1f"),
        ("V100 TensorRT", "latency v100 tensorrt8 fp16", ".2f"),
        ("A100 TensorRT", "latency a100 tensorrt8 fp16", ".2f"),
        ("CPU", CPU_LATENCY, ".1f"),
    )
    lines = [
        "| name | px | parameters | MACs | " + " | ".join(name for name, _, _ in columns) + " |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for entry, spec in listed():
        cells = [f"`{entry.name}`", str(spec.input_size), f"{spec.params() / 1e6:.1f} M", f"{spec.macs() / 1e9:.2f} G"]
        for _, metric, digits in columns:
            figure = value(rows, entry.name, metric)
            unit = " %" if metric == "top1" else " ms"
            cells.append("–" if figure is None else f"{figure:{digits}}{unit}")
        lines.append("| " + " | ".join(cells) + " |")
    measured = next((row for row in rows if row["metric"] == CPU_LATENCY), None)
    here = (
        f"CPU: measured here,\nONNX Runtime, one thread, {measured['device']}, {measured['date']}. " if measured else ""
    )
    lines.append(
        f"\nBatch 1, at the network's own input size. Top-1, V100 and A100 (FP16): as published by NVIDIA. {here}"
        "Every figure with its source, command and date: [checkpoints/results.csv](checkpoints/results.csv)."
    )
    return "\n".join(lines)


def demo_table(rows: Sequence[Row]) -> str:
    """The table of the networks whose weights come with the repository, with what was measured of each."""
    lines = ["| name | parameters | measured | on | where and when |", "|---|---|---|---|---|"]
    for entry in load_index().values():
        if not entry.bundled:
            continue
        measured = [row for row in rows if row["model"] == entry.name and row["source"] == "measured"]
        params = value(rows, entry.name, "parameters")
        if not measured or params is None:
            raise DataError(f"{RESULTS.name} needs the parameters of {entry.name!r} and a measured figure")
        figures = ", ".join(f"{DEMO_METRICS[row['metric']]} {row['value']} {row['unit']}" for row in measured)
        on = "; ".join(dict.fromkeys(row["reference"] for row in measured))
        where = "; ".join(dict.fromkeys(f"{row['device']}, {row['date']}" for row in measured))
        lines.append(f"| `{entry.name}` | {params:,.0f} | {figures} | {on} | {where} |")
    return "\n".join(lines)


def with_table(page: str, text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The text of a page with the table between two lines replaced."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise DataError(f"{page} lacks the lines {begin!r} and {end!r} that the table stands between")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def metafile(folder: str, rows: Sequence[Row]) -> dict[str, Any]:
    """OpenMMLab's metafile of the models whose config lies in ``configs/<folder>/``."""
    entries = [entry for entry in load_index().values() if entry.config.partition("/")[0] == folder]
    models = [describe(entry, rows) for entry in entries]
    used = list(dict.fromkeys(model["In Collection"] for model in models))
    code = "prunet_zoo/models/classifier.py" if folder == "classification" else "prunet_zoo/mm/backbone.py"
    collections = []
    for name in used:
        about = COLLECTIONS[name]
        collections.append(
            {
                "Name": name,
                "Metadata": {"Architecture": LAYERS[name]},
                "Paper": {"Title": about.title, "URL": about.paper},
                "README": "docs/zoo.md",
                "Code": {"URL": code},
            }
        )
    return {"Collections": collections, "Models": models}


def describe(entry: ModelEntry, rows: Sequence[Row]) -> dict[str, Any]:
    """One model of a metafile. ``Weights`` is what MMEngine loads, ``Converted From`` where it was published."""
    own = [row for row in rows if row["model"] == entry.name]
    results: dict[tuple[str, str], dict[str, float]] = {}
    for row in own:
        if row["metric"] in ACCURACY:
            results.setdefault((row["task"], row["dataset"]), {})[ACCURACY[row["metric"]]] = float(row["value"])
    counted = {row["metric"]: int(row["value"]) for row in own if row["source"] == "computed"}
    times = [
        {
            "value": float(row["value"]),
            "hardware": row["device"],
            "backend": row["metric"].removeprefix("latency ").removeprefix(f"{row['device'].lower()} "),
            "batch size": 1,
            "resolution": f"({row['input_size']}, {row['input_size']})",
        }
        for row in own
        if row["unit"] == "ms"
    ]
    model: dict[str, Any] = {
        "Name": entry.name,
        "In Collection": entry.collection,
        "Config": f"configs/{entry.config}",
        "Metadata": {
            **({"FLOPs": counted["macs"]} if "macs" in counted else {}),
            **({"Parameters": counted["parameters"]} if "parameters" in counted else {}),
            "Training Data": next((row["dataset"] for row in own if row["dataset"]), ""),
            **({"inference time (ms/im)": times} if times else {}),
        },
        "Results": [{"Task": task, "Dataset": dataset, "Metrics": found} for (task, dataset), found in results.items()],
        "Weights": f"prunet://{entry.name}",
    }
    if entry.weights.url is not None:
        model["Converted From"] = {"Weights": entry.weights.url, "Code": COLLECTIONS[entry.collection].code}
    return model


def make_files(rows: Sequence[Row]) -> dict[Path, str]:
    """Path → text of everything that is made."""
    tables = {"README.md": (readme_table(rows), BEGIN, END)}
    tables |= {page: (demo_table(rows), DEMO_BEGIN, DEMO_END) for page in DEMO_PAGES}
    made = {
        ROOT / page: with_table(page, (ROOT / page).read_text(encoding="utf-8"), *table)
        for page, table in tables.items()
    }
    head = "# Made by tools/make_index.py; change the zoo's index or checkpoints/results.csv instead.\n"
    folders = list(dict.fromkeys(entry.config.partition("/")[0] for entry in load_index().values()))
    for folder in folders:
        made[ROOT / "configs" / folder / "metafile.yml"] = head + to_yaml(metafile(folder, rows))
    made[ROOT / "model-index.yml"] = head + to_yaml(
        {"Import": [f"configs/{folder}/metafile.yml" for folder in folders]}
    )
    return made


def to_yaml(data: Any) -> str:
    """YAML with keys in the order given."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def measure_rows(seconds: float) -> list[Row]:
    """Measure the published networks on this machine: ONNX Runtime, one CPU thread, batch 1, own input size."""
    from prunet_zoo.latency import measure

    rows = []
    for entry, spec in listed():
        record = measure(spec, backend="onnxruntime", threads=1, seconds=seconds)
        print(f"{entry.name}: {record.median_ms:.2f} ms ({record.n} runs)", file=sys.stderr)
        spread = f"p10 {record.p10_ms:.2f}, p90 {record.p90_ms:.2f}"
        rows.append(
            dict.fromkeys(FIELDS, "")
            | {
                "model": entry.name,
                "metric": CPU_LATENCY,
                "value": f"{record.median_ms:.2f}",
                "unit": "ms",
                "input_size": str(spec.input_size),
                "source": "measured",
                "reference": f"onnxruntime {record.backend_version}, {record.n} runs, {spread}",
                "device": record.device,
                "command": f"python tools/make_index.py --measure --seconds {seconds:g}",
                "date": record.date[:10],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, then write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a file is out of date")
    parser.add_argument("--measure", action="store_true", help="measure the CPU latency of the networks first")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each network with --measure (%(default)s)")
    args = parser.parse_args(argv)
    rows = read_results()
    if args.measure:
        rows = [row for row in rows if row["metric"] != CPU_LATENCY] + measure_rows(args.seconds)
        write_atomic(RESULTS, results_text(rows))
    made = make_files(rows)
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
        if not args.check:
            write_atomic(path, made[path])
    if not stale:
        print("everything agrees with the zoo's index and checkpoints/results.csv")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    run_plain_tool(main)
