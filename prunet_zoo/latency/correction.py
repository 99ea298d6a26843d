"""From the sum over blocks to the whole network: a few non-negative coefficients fitted on whole networks.

``latency = scale · Σ block + fixed · (stem + tail) + per_block · blocks + per_mparam · parameters/10⁶``

The last two stand for what a block costs in a network and not in its probe: a gap between kernels, and weights that
come from a farther cache. The form and its fit are ours. Coefficients are non-negative, so a wider block never
becomes cheaper, and additive, so a search can weigh blocks one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from prunet_zoo.errors import LatencyError
from prunet_zoo.spec import Frozen

_PRIOR = np.array([1.0, 1.0, 0.0, 0.0])  # no correction
_RIDGE = 0.3  # weight of the prior beside networks weighted 1: chosen by leave-one-out on two spaces


class Correction(Frozen):
    """The coefficients, and how well they predict each network when it is left out of the fit (relative errors;
    None: too few networks to leave one out)."""

    scale: float = Field(default=1.0, ge=0.0)
    fixed: float = Field(default=1.0, ge=0.0)
    per_block_ms: float = Field(default=0.0, ge=0.0)
    per_mparam_ms: float = Field(default=0.0, ge=0.0)
    networks: int = Field(default=0, ge=0)
    typical_error: float | None = Field(default=None, ge=0.0)
    worst_error: float | None = Field(default=None, ge=0.0)

    def block(self, raw_ms: float, params: int) -> float:
        """Latency of a block in a network, from its probe (ms) and its number of parameters."""
        return self.scale * raw_ms + self.per_block_ms + self.per_mparam_ms * params * 1e-6

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, every field."""
        return self.model_dump(mode="json")


class NetworkParts(Frozen):
    """What the fit needs of one whole network: sums over its blocks, and its measured latency in ms."""

    blocks_ms: float
    fixed_ms: float
    blocks: int
    params: int
    measured_ms: float


def fit_correction(networks: Sequence[NetworkParts]) -> Correction:
    """Fit the coefficients on relative errors, drawn towards no correction, with outlying networks weighted down.

    Raises:
        LatencyError: fewer than two networks, or a latency that is not positive.
    """
    if len(networks) < 2 or any(n.measured_ms <= 0 for n in networks):
        raise LatencyError(f"the correction needs at least two networks of positive latency, got {len(networks)}")
    parts = np.array([[n.blocks_ms, n.fixed_ms, n.blocks, n.params * 1e-6] for n in networks])
    measured = np.array([n.measured_ms for n in networks])
    errors = []
    if len(networks) > 3:
        for i in range(len(networks)):
            rest = np.arange(len(networks)) != i
            errors.append(abs(parts[i] @ _solve(parts[rest], measured[rest]) / measured[i] - 1))
    scale, fixed, per_block, per_mparam = (float(c) for c in _solve(parts, measured))
    return Correction(
        scale=scale,
        fixed=fixed,
        per_block_ms=per_block,
        per_mparam_ms=per_mparam,
        networks=len(networks),
        typical_error=float(np.median(errors)) if errors else None,
        worst_error=float(np.max(errors)) if errors else None,
    )


def _solve(parts: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Non-negative least squares of parts (n, 4) @ c (4,) = measured (n,), on relative errors."""
    from scipy.optimize import nnls  # takes a while to import

    rows = parts / measured[:, None]
    # a coefficient is held to its prior in proportion to its share of the latency, so units do not matter
    prior = np.diag(_RIDGE * np.maximum(rows.mean(0), 1e-9))
    weights = np.ones(len(measured))
    for _ in range(4):  # iteratively reweighted: Huber's loss
        root = np.sqrt(weights)
        solution, _ = nnls(np.vstack([rows * root[:, None], prior]), np.concatenate([root, prior @ _PRIOR]))
        off = np.abs(rows @ solution - 1)
        bound = max(0.01, 1.5 * float(np.median(off)))
        weights = np.minimum(1.0, bound / np.maximum(off, 1e-12))
    return np.asarray(solution)
