"""Stands in for ``trtexec``: takes and refuses the options, and writes the files and lines, of the release in RELEASE.

Its options and output follow NVIDIA's open source of the program (github.com/NVIDIA/TensorRT, samples/common,
sampleOptions.cpp and sampleReporting.cpp of each release). An engine is the ONNX file with the build options before it.
"""

import json
import sys
from pathlib import Path

RELEASE = "8.6.1"
FAIL = ""  # a fault to show: "build", "times", "median", "few", "silent"

MAJOR, MINOR, PATCH = map(int, RELEASE.split("."))
CODE = f"{MAJOR}{MINOR:02d}{PATCH:02d}" if MAJOR >= 10 else f"{MAJOR}{MINOR}{PATCH:02d}"
COMMON = {"--onnx", "--saveEngine", "--loadEngine", "--iterations", "--duration", "--warmUp", "--exportTimes"}
COMMON |= {"--loadInputs", "--exportOutput", "--help"}
KNOWN = COMMON | ({"--fp16"} if MAJOR < 11 else {"--stronglyTyped"}) | ({"--bf16"} if 9 <= MAJOR < 11 else set())
KNOWN |= {"--buildOnly"} if (MAJOR, MINOR) < (8, 6) else {"--skipInference"}
KNOWN |= {"--workspace"} if (MAJOR, MINOR) < (8, 4) else {"--memPoolSize"}
RUN_MS = [0.50, 0.52, 0.51]  # in turn
WARMUP_MS = 9.0


def say(kind, text):
    print(f"[11/20/2026-12:00:00] [{kind}] {text}")


def summary(name, times):
    ordered = sorted(times)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    tail = ", percentile(90%) = 0.52 ms, percentile(95%) = 0.52 ms" if (MAJOR, MINOR) >= (8, 6) else ""
    if FAIL == "median":
        median *= 2
    mean = sum(times) / len(times)
    values = f"min = {ordered[0]:g} ms, max = {ordered[-1]:g} ms, mean = {mean:g} ms, median = {median:g} ms"
    say("I", f"{name}: {values}{tail}, percentile(99%) = 0.52 ms")


def end(passed):
    print(f"&&&& {'PASSED' if passed else 'FAILED'} TensorRT.trtexec [TensorRT v{CODE}] # trtexec")
    sys.exit(not passed)


def fail(*lines):
    for line in lines:
        say("E", line)
    end(False)


def show_help():
    print("=== Options ===")
    for option in sorted(KNOWN):
        print(f"  {option + '=X':<34} What it does")
        print(" " * 37 + "--fp16 and --workspace as a description's continuation")
    sys.exit(0)


def build(options):
    if FAIL == "build":
        fail("Failed to parse onnx file", "Parsing model failed", "Engine set up failed")
    model = Path(options["--onnx"]).read_bytes()
    about = {"options": sorted(options), "workspace": options.get("--workspace")}
    if FAIL != "silent":
        Path(options["--saveEngine"]).write_bytes(json.dumps(about).encode() + b"\n" + model)


def run(options):
    model = Path(options["--loadEngine"]).read_bytes().split(b"\n", 1)[1]
    say("I", "Warmup completed 3 queries over 200 ms")
    # as the program: at least so many runs and at least so long, 10 ms each here
    count = max(int(options.get("--iterations", 10)), round(100 * float(options.get("--duration", 3))))
    count = count if FAIL != "few" else 2
    times = [RUN_MS[i % 3] for i in range(count)]
    say("I", f"Timing trace has {count} queries over 3 s")
    Path(options["--loadEngine"]).with_name("run_options.json").write_text(json.dumps(sorted(options)))
    say("I", "=== Performance summary ===")
    summary("Latency", [t + 1 for t in times])
    if (MAJOR, MINOR) < (8, 4):
        summary("End-to-End Host Latency", [t + 2 for t in times])
    summary("GPU Compute Time", times)
    say("I", "Total GPU Compute Time: 2.9 s")
    if "--exportTimes" in options and FAIL != "times":
        # older releases export the warm-up too
        rows = [WARMUP_MS] * (3 if (MAJOR, MINOR) < (8, 4) else 0) + times
        Path(options["--exportTimes"]).write_text(json.dumps([{"computeMs": t, "latencyMs": t + 1} for t in rows]))
    if "--exportOutput" in options:
        export_output(model, options)


def export_output(model, options):
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name, path = options["--loadInputs"].split(":", 1)
    dtype = np.float16 if "float16" in session.get_inputs()[0].type else np.float32
    x = np.fromfile(path, dtype=dtype).reshape(session.get_inputs()[0].shape)
    y = session.run(None, {name: x})[0].astype(np.float32)
    values = ", ".join(f"{v:g}" for v in y.ravel())  # C++ prints nan and inf like this
    dimensions = "x".join(map(str, y.shape))
    Path(options["--exportOutput"]).write_text(
        f'[\n  {{ "name" : "y"\n  , "dimensions" : "{dimensions}"\n  , "values" : [ {values} ]\n  }}\n]\n'
    )


def main():
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{CODE}] # trtexec")
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if "--help" in options:
        show_help()
    unknown = set(options) - KNOWN
    if unknown:
        fail(f"Unknown option: {' '.join(sorted(unknown))}")
    if "--onnx" in options:
        build(options)
    else:
        run(options)
    end(True)


if __name__ == "__main__":
    main()
