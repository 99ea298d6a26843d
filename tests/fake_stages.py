"""Stands in for the tools that a pipeline calls: each only notes its arguments and writes the files of its stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "configs/classification/prunet-cpu-small.json"

# A stage notes its arguments in calls.jsonl and does what action.json asks of it: end with a status, be stopped, or be
# killed together with the pipeline that called it.
STAGE = """
import json, os, pathlib, signal, sys, time
here, argv = pathlib.Path.cwd(), sys.argv[1:]
name = pathlib.Path(sys.argv[0]).stem
work = pathlib.Path(argv[argv.index("--work-dir") + 1]) if "--work-dir" in argv else None
if name == "detector_speed":
    stage = "speed_" + pathlib.Path(argv[0]).name
else:
    stage = {"latency": argv[0], "draw": "picture"}.get(name) or work.name
resumed = work is not None and (work / "begun").is_file()
with open(here / "calls.jsonl", "a") as log:
    log.write(json.dumps([stage, argv, resumed]) + "\\n")
action = json.loads((here / "action.json").read_text()).get(stage)
def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
if work is not None:
    write(work / "begun", "")
if isinstance(action, int):
    sys.exit(action)
if action == "SIGKILL":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
if action == "nothing":
    sys.exit(0)
if action:
    got = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: got.append(signal.Signals(n).name))
    if action == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)  # a terminal sends it to both
    os.kill(os.getppid(), signal.Signals[action])
    until = time.monotonic() + 20
    while not got and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # saving takes longer than the quarter of a second that subprocess.run grants
    (here / "saved.json").write_text(json.dumps(got))
    sys.exit(128 + signal.Signals[action])
salt = (here / "salt").read_text() if (here / "salt").is_file() else ""
if stage == "table":
    write(pathlib.Path(argv[argv.index("--out") + 1]), {"salt": salt})
elif stage == "search":
    target = float(argv[argv.index("--target-ms") + 1]) if "--target-ms" in argv else 0.5
    write(work / "report.json", {"predicted": 0.29, "target": target, "history": []})
    write(work / "weights.safetensors", "weights" + salt)
    write(work / "spec.json", (here / "spec.json").read_text())
elif stage == "classifier":
    write(work / "last.safetensors", "last" + salt)
    write(work / "best.safetensors", "best" + salt)
    write(work / "metrics.json", {"metrics": {"epoch": 20, "top1": 98.0}, "best": {"epoch": 14, "top1": 99.5}})
elif stage == "measure":
    print(json.dumps({"median_ms": 0.3, "device": "a processor", "date": "2026-01-01", "backend": "onnxruntime",
                      "threads": 1, "batch": 1}))
elif stage.startswith("speed_"):
    times = {f"{part}_ms": 1.0 for part in ("preprocess", "backbone", "neck_head", "post")}
    print(json.dumps({**times, "total_ms": 12.5, "threads": 1, "input_size": [128, 128]}))
elif stage == "picture":
    write(pathlib.Path(argv[argv.index("--out") + 1]), "picture")
else:
    write(work / "metrics.json", {"metrics": {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_50": 0.8}, "best": {}})
    write(work / "last_checkpoint", "epoch_1.pth")
    rows = ({"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}, {"coco/bbox_mAP": 0.5, "step": 1})
    write(work / "1/vis_data/scalars.json", "".join(json.dumps(row) + "\\n" for row in rows))
"""
TOOLS = ("tools/latency.py", "tools/search.py", "tools/train.py", "prunet_zoo/mm/draw.py")


def make_repository(root: Path) -> None:
    """A repository whose tools are stand-ins and whose configs are the real ones."""
    for name in (*TOOLS, "prunet_zoo/mm/detector_speed.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(STAGE)
    for name in ("prunet_zoo", "prunet_zoo/mm"):  # a package, which comes before the installed one
        (root / name / "__init__.py").touch()
    (root / "configs").symlink_to(ROOT / "configs")
    shutil.copy(SPEC, root / "spec.json")
    set_actions(root, {})


def set_actions(root: Path, actions: dict[str, Any]) -> None:
    """What the stages are to do from now on; forgets the calls so far."""
    (root / "action.json").write_text(json.dumps(actions))
    (root / "calls.jsonl").write_text("")


def read_calls(root: Path) -> list[tuple[str, list[str], bool]]:
    """(stage, arguments, whether it found what an earlier call had begun) of each call."""
    return [tuple(json.loads(line)) for line in (root / "calls.jsonl").read_text().splitlines()]
