"""Predicted against measured: a table against random networks of its space, a predictor against published figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prunet_zoo.errors import LatencyError
from prunet_zoo.spec import Frozen, NetSpec

if TYPE_CHECKING:
    from prunet_zoo.latency.record import Record
    from prunet_zoo.latency.table import LatencyTable


class Predicted(Frozen):
    """One network: what was predicted, and what was measured here or published. Latencies in ms."""

    name: str
    predicted_ms: float = Field(gt=0.0)
    measured_ms: float = Field(gt=0.0)

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_ms / self.measured_ms - 1


class Prediction(Frozen):
    """What one source predicts for several networks.

    ``source``: the table's file or the predictor's name; ``about``: device, backend, what the networks are.
    ``published``: whether the networks' own figures were published rather than measured here.
    """

    source: str
    about: str
    published: bool
    networks: tuple[Predicted, ...] = Field(min_length=1)

    @property
    def typical(self) -> float:
        """Median of the errors' sizes."""
        return statistics.median(abs(n.error) for n in self.networks)

    @property
    def worst(self) -> float:
        """Greatest size of an error."""
        return max(abs(n.error) for n in self.networks)

    @property
    def tau(self) -> float | None:
        """Kendall's rank correlation of predicted and measured; None of a single network or equal ones."""
        return kendall([n.predicted_ms for n in self.networks], [n.measured_ms for n in self.networks])

    def within(self, share: float) -> float:
        """Share of the networks whose error is at most ``share``."""
        return sum(abs(n.error) <= share for n in self.networks) / len(self.networks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data with the statistics."""
        statistic = {"typical": self.typical, "worst": self.worst, "tau": self.tau, "n": len(self.networks)}
        shares = {"within5": self.within(0.05), "within10": self.within(0.10)}
        return {**self.model_dump(mode="json"), **statistic, **shares}


def from_predictors() -> list[Prediction]:
    """Every predictor shipped: each network predicted by a fit without it, against the figure it was fitted to."""
    from prunet_zoo.latency.predictor import Predictor, list_devices

    found = []
    for name in list_devices():
        model = Predictor.load(name).model
        networks = tuple(
            Predicted(name=n.name, predicted_ms=n.left_out_ms, measured_ms=n.measured_ms) for n in model.fit.networks
        )
        about = f"{model.device}, {model.backend} {model.dtype}; each network left out of the fit"
        found.append(Prediction(source=name, about=about, published=True, networks=networks))
    return found


def left_out_networks(table: LatencyTable, count: int) -> list[NetSpec]:
    """``count`` random networks of all sizes of a table's space that its correction was not fitted on, always the same.

    A space with fewer distinct networks gives fewer.

    Raises:
        LatencyError: there is none.
    """
    from prunet_zoo.latency.plan import plan_networks

    encodings = plan_networks(table.space, count + 2, seed=1)[2:]  # without the smallest and the largest
    specs = [table.space.decode(encoding) for encoding in encodings if encoding not in table.networks]
    if not specs:
        raise LatencyError(
            f"latency table {table.path} was corrected on every network of its small space {table.space.name!r}; "
            "leave it out: there is nothing to check it on"
        )
    return [spec.replace(name=f"{table.space.name}-{number}") for number, spec in enumerate(specs, 1)]


def from_table(table: LatencyTable, specs: Iterable[NetSpec], records: Iterable[Record]) -> Prediction:
    """What a table predicts for networks of its space, against their records."""
    pairs = zip(specs, records, strict=True)
    networks = tuple(Predicted(name=s.name, predicted_ms=table(s), measured_ms=r.median_ms) for s, r in pairs)
    header = table.header
    about = f"{header.space_name}: {len(networks)} random networks, {header.backend}, {header.threads} thread(s)"
    return Prediction(source=table.path.name, about=about, published=False, networks=networks)


def kendall(a: Iterable[float], b: Iterable[float]) -> float | None:
    """Kendall's τ-b; None where it is not defined: fewer than two values, or all of one side equal."""
    from scipy.stats import kendalltau  # takes a while to import

    a, b = list(a), list(b)
    if len(a) < 2:
        return None
    tau = float(kendalltau(a, b).statistic)
    return None if math.isnan(tau) else tau
