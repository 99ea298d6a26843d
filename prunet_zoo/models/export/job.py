"""Export a network to a file that is kept only when it computes what torch computes."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import WriteError
from prunet_zoo.models.export.errors import ExportError
from prunet_zoo.models.export.fold import count_batchnorms, fold_batchnorm
from prunet_zoo.models.export.formats import Format, Plan, RunFile, check_path, need
from prunet_zoo.models.export.network import Graph, Network, flat, numbered
from prunet_zoo.models.memory import is_out_of_memory, shortage, widest_layer
from prunet_zoo.version import __version__

# largest difference, as a share of the output's largest value: rounding of float32; of float16 (2⁻¹¹ a layer)
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}


@dataclass(frozen=True)
class Options:
    """How a network is exported.

    Args:
        batch: images; with ``dynamic_batch`` any number.
        dtype: "fp32" or "fp16"; what the latter means is the format's.
        opset: of ONNX; None: 17 where torch can.
        normalize: the input is an RGB image of 0…255, and its scaling lies in the file.
        tolerance: largest difference from torch, as a share of an output's largest value; None: by the dtype.
        check: run the file and compare. Without it nothing needs the format's runtime but some formats' writing.

    Raises:
        ExportError: a value is out of range.
    """

    batch: int = 1
    dynamic_batch: bool = False
    dtype: str = "fp32"
    opset: int | None = None
    normalize: bool = False
    tolerance: float | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in TOLERANCE:
            raise ExportError(f"dtype must be one of {', '.join(TOLERANCE)}, got {self.dtype!r}")
        if self.batch < 1:
            raise ExportError(f"batch must be at least 1, got {self.batch}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ExportError(f"tolerance is a share of the output's scale, above 0 and below 1; got {self.tolerance}")


def export(network: Network, form: Format, path: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Fold, write, run, compare, and only then put the file in its place.

    Args:
        network: what to export; it is not changed.
        form: the format, one of `FORMATS`.
        path: of the file. What stood there is replaced at the end, or stays.
        options: see `Options`.

    Returns:
        What was written: file, input, outputs, error, metadata, versions.

    Raises:
        ExportError: it cannot be exported, the file computes something else, or the runtime is missing.
        WriteError: the disk is full, or the folder cannot be written.
    """
    options, path = options or Options(), Path(path)
    if options.dynamic_batch and not form.dynamic:
        raise ExportError(f"format {form.name!r} has a fixed batch: give --batch N instead of --dynamic-batch")
    if options.opset is not None and not form.has_opset:
        raise ExportError(f"format {form.name!r} has no ONNX opset; leave out --opset")
    check_path(form, path)
    if options.normalize and network.scaling is None:
        raise ExportError(
            f"how {network.name} wants its images scaled is not known, so it cannot be put into the file; give weights "
            "that tell it (tools/publish.py writes such), or leave out --normalize"
        )
    runtime = need(form) if options.check or form.needed else None
    scaling = network.scaling if options.normalize else None
    _check_memory(network, options)
    module = copy.deepcopy(network.module).float().cpu().eval()
    reference = Graph(module, scaling)
    with _memory_told(network, options):
        inputs = _inputs(network, options)
        wanted = [_run(reference, x, network) for x in inputs]
        folded = fold_batchnorm(module, torch.zeros(1, network.channels, *network.input_size))
    names = numbered(network.outputs, len(wanted[0]))
    shapes = [list(out.shape[1:]) for out in wanted[0]]
    about = _about(network, options, names, shapes)
    plan = Plan(inputs[-1], names, options.dynamic_batch, options.dtype, options.opset, about)
    graph = Graph(folded, scaling, half=options.dtype == "fp16" and form.half_graph).eval()
    limit = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    error = None
    with _staged(path) as temporary:
        about |= _write(form, graph, plan, temporary, network)
        if options.check:
            error = _compare(form, temporary, inputs, wanted, names)
            _judge(error, limit, network, form)
        files = {file.name: file.stat().st_size for file in _parts(temporary)}
    kept = count_batchnorms(folded)
    return {
        "format": form.name,
        "file": str(path),
        "files": list(files),
        "bytes": sum(files.values()),
        "weights": network.weights or "random",
        **about,
        "batchnorm": {"folded": count_batchnorms(module) - kept, "kept": kept},
        "checked_with": runtime if options.check else None,
        "max_error": error,
        "tolerance": limit if options.check else None,
    }


def _about(network: Network, options: Options, names: Sequence[str], shapes: Sequence[list[int]]) -> dict[str, Any]:
    """What the file itself tells."""
    batch: int | str = "batch" if options.dynamic_batch else options.batch
    taken = "RGB, 0…255" if options.normalize else "normalised"
    if network.scaling is not None and network.scaling.is_none and not options.normalize:
        taken = "BGR, 0…255" if network.scaling.bgr else "RGB, 0…255"
    return {
        "name": network.name,
        **network.about,
        "input": {"name": "input", "shape": [batch, network.channels, *network.input_size], "values": taken},
        "outputs": [{"name": name, "shape": [batch, *shape]} for name, shape in zip(names, shapes, strict=True)],
        "dtype": options.dtype,
        "versions": {"prunet_zoo": __version__, "torch": torch.__version__},
    }


def _check_memory(network: Network, options: Options) -> None:
    """Raise `ExportError` when the maps around a single layer exceed the free memory: torch computes in float32."""
    need = widest_layer(network.module, (options.batch, network.channels, *network.input_size))
    if lack := shortage(network.name, need, "fp32"):
        raise ExportError(f"{_asked(network, options)} px needs {lack}; take a smaller --input-size or --batch")


@contextmanager
def _memory_told(network: Network, options: Options) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to do."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExportError(
            f"{network.name} does not fit into memory with {_asked(network, options)} px; take a smaller --input-size "
            "or --batch"
        ) from error


def _asked(network: Network, options: Options) -> str:
    return "×".join(map(str, (options.batch, *network.input_size)))


def _inputs(network: Network, options: Options) -> list[torch.Tensor]:
    """Noise, and a smooth picture of ordinary scale; with a free batch, another number of images."""
    generator = torch.Generator().manual_seed(0)
    counts = (options.batch, options.batch + 1 if options.dynamic_batch else options.batch)
    shapes = [(count, network.channels, *network.input_size) for count in counts]
    noise = torch.randn(shapes[0], generator=generator)
    coarse = torch.rand((*shapes[1][:2], 4, 4), generator=generator)
    picture = F.interpolate(coarse, network.input_size, mode="bicubic", align_corners=False).clamp(0, 1)
    if options.normalize or (network.scaling is not None and network.scaling.is_none):
        return [(127.5 + 64 * noise).clamp(0, 255), 255 * picture]
    return [noise, 4 * picture - 2]


def _run(graph: Graph, x: torch.Tensor, network: Network) -> tuple[torch.Tensor, ...]:
    try:
        with torch.no_grad():
            outs = flat(graph(x))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{network.name} cannot be run on an input of {tuple(x.shape)}: {reason}") from error
    if not all(out.is_floating_point() and bool(out.isfinite().all()) for out in outs):
        raise ExportError(f"{network.name} gives numbers that are not finite in torch itself; nothing was written")
    return outs


def _write(form: Format, graph: Graph, plan: Plan, path: Path, network: Network) -> dict[str, Any]:
    try:
        return form.write(graph, plan, path)
    except (PrunetError, OSError):
        raise
    except ImportError:
        need(form)
        raise
    except Exception as error:  # a converter may fail in any way
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"{network.name} cannot be written as {form.name}: {type(error).__name__}: {reason}"
        ) from error


def _compare(
    form: Format,
    path: Path,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[Sequence[torch.Tensor]],
    names: Sequence[str],
) -> dict[str, float]:
    """Largest difference of each output over all inputs, as a share of its largest value."""
    try:
        run: RunFile = form.open(path)
        found = [run(x.numpy()) for x in inputs]
    except Exception as error:  # a runtime may refuse a file in any way
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"the file was written but {form.runtime} cannot run it: {type(error).__name__}: {reason}. It was not kept"
        ) from error
    worst = dict.fromkeys(names, 0.0)
    for expected, outs in zip(wanted, found, strict=True):
        if [tuple(out.shape) for out in outs] != [tuple(out.shape) for out in expected]:
            raise ExportError(
                f"the {form.name} file gives {[list(out.shape) for out in outs]}, torch gives "
                f"{[list(out.shape) for out in expected]}. It was not kept"
            )
        for name, right, out in zip(names, expected, outs, strict=True):
            worst[name] = max(worst[name], relative_error(out, right.numpy()))
    return worst


def relative_error(found: Any, wanted: Any) -> float:
    """max |found - wanted| / max |wanted|; infinite where ``found`` is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(wanted).max())
    difference = float(np.abs(np.asarray(found, dtype=np.float64) - wanted).max())
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


def _judge(error: dict[str, float], limit: float, network: Network, form: Format) -> None:
    name = max(error, key=lambda key: error[key])
    if error[name] <= limit:
        return
    raise ExportError(
        f"the {form.name} file of {network.name} differs from torch by {error[name]:.2g} of the scale of output "
        f"{name!r}, more than {limit:g}, and was not kept. If that is close enough for you, give --tolerance"
    )


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """The path of a file in a temporary folder beside ``path``; what lies there is moved into place at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            made = _parts(Path(folder) / path.name)
            for file in made:
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            if len(made) > 1:  # never an old file beside a new one: what is loaded by its first file has both or none
                path.unlink(missing_ok=True)
            for file in reversed(made):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        if isinstance(error, PrunetError):
            raise
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}. Nothing was overwritten; free some space or choose "
            "another folder."
        ) from error


def _parts(path: Path) -> list[Path]:
    """The files of an export, the one that is loaded first."""
    others = (path.with_suffix(".bin"), path.with_name(path.name + ".json"))
    return [path, *(other for other in others if other.is_file())]
