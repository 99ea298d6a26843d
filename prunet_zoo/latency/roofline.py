"""What a kernel costs: overhead + max(compute, memory), the roofline model (Williams et al., CACM 2009) with a launch.

Where launching a kernel overlaps with running the one before (`Runtime.asynchronous`: eager PyTorch on a GPU), it costs
max(overhead, compute, memory).

``compute``: a convolution is a matrix product in tiles of rows × columns. Channels are padded to what the arithmetic
units take (`Peaks.align`), the product to whole tiles. A tile runs on one unit (a GPU's SM, a CPU's core), so fewer
tiles than units leave units idle: the occupancy of small maps. A small tile reuses what it loads less, ``rows·columns /
(rows + columns)`` operations an element, and is slower for that where it is under ``FULL_REUSE``. The runtime takes the
best tile of `Peaks.tiles`, as cuDNN's and TensorRT's choice of algorithm does. Depth-wise convolutions cannot use the
matrix units and run at a rate of their own. ``memory``: maps read and written and weights read, at the bandwidth of the
device's memory; what caches keep from one kernel to the next is in the fitted efficiency.

Peaks are from data sheets (or given); `Rates` are fitted (`prunet_zoo.latency.fit`). The cost never falls when a map,
a width, a kernel or a depth grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from prunet_zoo.latency.kernels import Kernel, Runtime
from prunet_zoo.spec import Frozen

Array = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]

FULL_REUSE = 64.0  # operations an element: of a 128×128 tile; larger ones gain nothing
DEPTH_STEP = 32  # a tile walks along the depth of the product in steps of this
GPU_TILES = ((256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (32, 32))
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Peaks(Frozen):
    """What the hardware can do at most.

    ``matrix_tflops``: matrix products (tensor cores; FMA of a CPU); ``vector_tflops``: everything else;
    ``bandwidth_gbs``: memory, GB/s (10⁹ bytes); ``units``: SMs or cores; ``align``: channels are padded to a multiple;
    ``tiles``: rows × columns a unit computes at a time.
    """

    matrix_tflops: Positive
    vector_tflops: Positive
    bandwidth_gbs: Positive
    units: Count = 1
    align: Count = 1
    tiles: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)] = GPU_TILES


class Rates(Frozen):
    """What is fitted. Overheads in µs; the others are what kernels reach, relative to the peaks.

    ``memory`` is above 1 where caches keep feature maps from one kernel to the next: the peak is that of the memory.
    """

    overhead_us: Positive  # a kernel
    light_overhead_us: Positive | None = None  # an element-wise kernel; None: the same
    call_us: float = Field(default=0.0, ge=0.0)  # a run, whatever is in it
    matrix: Positive
    depthwise: Positive
    memory: Positive


class Demand(NamedTuple):
    """What kernels ask of a device at its peaks, in ms, one row a kernel."""

    matrix: Array  # on the matrix units
    vector: Array  # on the vector units
    memory: Array
    light: NDArray[np.bool_]  # element-wise


def demand(kernels: Sequence[Kernel], peaks: Peaks, dtype: str, batch: int) -> Demand:
    """Time of each kernel at the peaks, in ms, for ``batch`` images."""
    matrix = [_matrix_ms(k, peaks, batch) for k in kernels]
    vector = [2 * k.macs * batch / (peaks.vector_tflops * 1e9) if k.kind == "depthwise" else 0.0 for k in kernels]
    elements = [k.maps * batch + k.weights for k in kernels]
    return Demand(
        np.array(matrix, dtype=float),
        np.array(vector, dtype=float),
        np.array(elements, dtype=float) * ITEM_BYTES[dtype] / (peaks.bandwidth_gbs * 1e6),
        np.array([k.kind == "elementwise" for k in kernels], dtype=bool),
    )


def kernel_ms(wanted: Demand, rates: Rates, runtime: Runtime) -> Array:
    """Latency of each kernel in ms."""
    work = np.maximum(wanted.matrix / rates.matrix + wanted.vector / rates.depthwise, wanted.memory / rates.memory)
    light = rates.overhead_us if rates.light_overhead_us is None else rates.light_overhead_us
    overhead = np.where(wanted.light, light, rates.overhead_us) * 1e-3
    return np.maximum(overhead, work) if runtime.asynchronous else overhead + work


def _matrix_ms(kernel: Kernel, peaks: Peaks, batch: int) -> float:
    """Time of the matrix product at its best tile, at peak."""
    if kernel.kind == "vector":  # a single row: no tiles; it waits for its weights
        return 2 * kernel.macs * batch / (peaks.matrix_tflops * 1e9)
    if kernel.kind != "convolution":
        return 0.0
    depth = _pad(_pad(kernel.channels, peaks.align) * kernel.taps, DEPTH_STEP if peaks.align > 1 else 1)
    unit = peaks.matrix_tflops * 1e9 / peaks.units  # FLOP a ms
    full = min(FULL_REUSE, max(map(_reuse, peaks.tiles)))
    best = math.inf
    for rows, columns in peaks.tiles:
        tiles = math.ceil(kernel.rows * batch / rows) * math.ceil(kernel.columns / columns)
        alone = 2 * depth * rows * columns / (unit * min(1.0, _reuse((rows, columns)) / full))
        best = min(best, alone * max(1.0, tiles / peaks.units))
    return best


def _reuse(tile: tuple[int, int]) -> float:
    return tile[0] * tile[1] / (tile[0] + tile[1])


def _pad(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
