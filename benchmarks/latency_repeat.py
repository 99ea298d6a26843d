"""The same network measured twice, minutes apart: within 2%, or the record says that it was disturbed.

    python benchmarks/latency_repeat.py [--pairs 40] [--load] [--json F] [--records F] [--quick]

Networks of both shipped search spaces and of the zoo, 0.02 to 100 ms, with ONNX Runtime and torch on one CPU thread.
One process measures all of them, then another all once more: a network lies elsewhere in memory, as it does when a user
measures again. With ``--load``, a process beside it multiplies matrices of 64 MB meanwhile: another load on one core,
and on the memory that all cores share.

A pair counts as marked when either of its records names what disturbed it. Two figures together decide:
``unmarked_within2``, the share of pairs within 2% among those not marked, and ``marked``, the share of all that are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.latency import Record, measure, progress_bar
from prunet_zoo.latency.plan import plan_networks
from prunet_zoo.latency.record import append_record, now, read_records
from prunet_zoo.space import load_space
from prunet_zoo.spec import NetSpec, load_spec

BACKENDS = ("onnxruntime", "torch")
WITHIN = 0.02
ZOO = (("prunet_p0", 64), ("prunet_p1", 64), ("prunet_p0", 128), ("prunet_p1", 128), ("prunet_p0", 224))
NEIGHBOUR = """
import os
import numpy as np
parent = os.getppid()
a = np.random.default_rng(0).standard_normal((2364, 2364), dtype=np.float32)  # three matrices: 67 MB
product = np.empty_like(a)
while os.getppid() == parent:  # it ends with the benchmark, however that ends
    np.dot(a, a.T, out=product)
"""


def plan(pairs: int) -> list[tuple[str, NetSpec, int, str]]:
    """(name, network, input size, backend) of each pair."""
    networks: list[tuple[str, NetSpec, int]] = []
    per_backend = -(-pairs // len(BACKENDS))
    small, large = load_space("prunet_cpu_small"), load_space("prunet_gpu")
    zoo = ZOO[: max(1, per_backend // 4)]
    counts = {small: (per_backend - len(zoo) + 1) // 2}
    counts[large] = per_backend - len(zoo) - counts[small]
    for space, count in counts.items():
        side = min(space.input_size, 128)  # at its own size the largest network of prunet_gpu takes too long in torch
        for i, encoding in enumerate(plan_networks(space, max(2, count))[:count]):
            networks.append((f"{space.name} {i}", space.decode(encoding), side))
    networks += [(f"{name} {side} px", load_spec(name), side) for name, side in zoo]
    return [(*network, backend) for backend in BACKENDS for network in networks][:pairs]


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """A process that keeps a core and the memory busy, ended with the block."""
    if not wanted:
        yield
        return
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env={**os.environ, **one_thread})
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def run_pass(pairs: list[tuple[str, NetSpec, int, str]], seconds: float, log: Path, title: str) -> None:
    """Measure all networks in this process; the records go to ``log``."""
    with progress_bar(title) as progress:
        for i, (name, spec, side, backend) in enumerate(pairs):
            progress(i, len(pairs), name)
            append_record(log, measure(spec, backend, side, seconds=seconds))


def run_passes(count: int, seconds: float, folder: Path) -> list[list[Record]]:
    """Two passes, each in a process of its own."""
    passes = []
    for title in ("first", "second"):
        log = folder / f"{title}.jsonl"
        options = ["--pairs", str(count), "--seconds", str(seconds), "--one-pass", str(log)]
        done = subprocess.run([sys.executable, __file__, *options])
        if done.returncode:
            raise SystemExit(f"the {title} pass failed with status {done.returncode}")
        passes.append(read_records(log))
    return passes


def compare(name: str, first: Record, second: Record) -> dict[str, Any]:
    """One row: two measurements of a network."""
    reasons = sorted({*first.disturbed, *second.disturbed})
    return {
        "network": name,
        "backend": first.backend,
        "first_ms": first.median_ms,
        "second_ms": second.median_ms,
        "difference": abs(first.median_ms - second.median_ms) / min(first.median_ms, second.median_ms),
        "precision": [round(first.precision, 5), round(second.precision, 5)],
        "attempts": [first.attempts, second.attempts],
        "disturbed": reasons,
        "within2": abs(first.median_ms - second.median_ms) <= WITHIN * min(first.median_ms, second.median_ms),
    }


def summarise_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over all pairs."""
    clean = [row for row in rows if not row["disturbed"]]
    marked = [row for row in rows if row["disturbed"]]
    share = lambda some: sum(row["within2"] for row in some) / len(some) if some else None  # noqa: E731
    return {
        "n": len(rows),
        "unmarked": len(clean),
        "unmarked_within2": share(clean),
        "worst_unmarked": max((row["difference"] for row in clean), default=None),
        "marked": len(marked) / len(rows),
        "marked_within2": share(marked),
        "within2": share(rows),
        "median_difference": statistics.median(row["difference"] for row in rows),
    }


def show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print a table of all pairs."""
    table = Table("network", "backend", "first ms", "second ms", "difference", "attempts", "marked")
    for row in rows:
        table.add_row(
            row["network"], row["backend"], f"{row['first_ms']:.4g}", f"{row['second_ms']:.4g}",
            f"{row['difference']:.2%}", "+".join(map(str, row["attempts"])), "yes" if row["disturbed"] else "",
        )  # fmt: skip
    console = Console(width=110)  # names are not cut in a file
    console.print(table)
    text = {k: "-" if v is None else f"{v:.1%}" for k, v in summary.items() if isinstance(v, float | None)}
    console.print(
        f"of {summary['unmarked']} pairs that are not marked {text['unmarked_within2']} are within 2%, the worst is "
        f"{text['worst_unmarked']} apart; {text['marked']} of {summary['n']} pairs are marked, of those "
        f"{text['marked_within2']} within 2%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="default: %(default)s, about ten minutes")
    parser.add_argument("--load", action="store_true", help="with a busy process beside it")
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--records", type=Path, metavar="F", help="append every record to this log")
    parser.add_argument("--quick", action="store_true", help="four pairs")
    parser.add_argument("--one-pass", type=Path, help=argparse.SUPPRESS)  # what `run_passes` starts
    args = parser.parse_args()
    pairs = plan(4 if args.quick else args.pairs)
    if args.one_pass is not None:
        run_pass(pairs, args.seconds, args.one_pass, f"{args.one_pass.stem} pass")
        return
    start = time.monotonic()
    with neighbour(args.load), tempfile.TemporaryDirectory(prefix="latency_repeat_") as folder:
        passes = run_passes(len(pairs), args.seconds, Path(folder))
    if args.records is not None:
        for record in (*passes[0], *passes[1]):
            append_record(args.records, record)
    rows = [compare(name, *two) for (name, *_), *two in zip(pairs, *passes, strict=True)]
    summary = summarise_rows(rows)
    show(rows, summary)
    if args.json is not None:
        about = {
            "command": f"python benchmarks/latency_repeat.py --pairs {len(pairs)} --seconds {args.seconds:g}"
            + (" --load" if args.load else ""),
            "device": passes[0][0].device,
            "cores": passes[0][0].fingerprint["usable_cores"],
            "load": args.load,
            "date": now(),
            "minutes": round((time.monotonic() - start) / 60, 1),
        }
        write_json(args.json, {**about, **summary, "rows": rows})


if __name__ == "__main__":
    main()
