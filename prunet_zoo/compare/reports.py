"""Reads what searches left behind: ``report.json`` of the finished ones, and which are not finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunet_zoo.errors import DataError, describe_fields, few

REPORT, SPEC = "report.json", "spec.json"
FINGERPRINT = "config_fingerprint.json"  # of a run's config; it stands in the folder from the first step on
# what has to be the same where latencies are drawn into one axis
SETTING = ("device", "backend", "dtype", "batch", "threads", "accelerator", "memory_format")
# of a config: the seed; what is compared by the report's own word; the network's name
_NO_SETTING = {"randomness.seed", "train_cfg.name", "train_cfg.strategy.target", "train_cfg.strategy.type"}
METHODS = {"TieredPruning": "tiered", "DDPNAS": "ddpnas", "PruningAsSearch": "pas", "Archtree": "archtree"}


class _Space(BaseModel):
    name: str
    hash: str | None = None


class _Record(BaseModel):
    """Of a latency record, what is compared."""

    model_config = ConfigDict(extra="allow")
    median_ms: float = Field(gt=0.0)
    ci_low_ms: float = Field(gt=0.0)
    ci_high_ms: float = Field(gt=0.0)
    disturbed: tuple[str, ...] = ()


class _Report(BaseModel):
    """Of a search's report, what is compared; it holds more."""

    name: str
    method: str
    space: _Space
    seed: int | None
    unit: str
    target: float
    predicted: float = Field(gt=0.0)
    measured: _Record | None
    status: str
    cost: dict[str, Any]
    top1_inherited: float | None
    params: int
    macs: int
    seconds: float
    search_seconds: float | None = None
    peak_mb: float | None = None
    data: str | None = None
    epochs: int | None = None
    decided_epoch: int | None = None
    verify: int | None = None
    config: dict[str, bool | int | float | str | None] | None = None
    history: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A finished search and the network that it found.

    Attributes:
        folder: of the search.
        method: tiered, ddpnas, pas, archtree or, of another strategy, the name of its class.
        unit: of ``target`` and ``cost``: ms, or MMACs.
        cost: of the network: its measured latency where there is one, else the prediction (or the count of MACs).
        low, high: the ends of the 95% interval of a measured latency, else ``cost``.
        kind: 'measured', 'predicted', or 'counted' (no latency).
        setting: device, backend, dtype, batch, threads, …: what latencies must share to be comparable.
        top1: accuracy in percent with the weights that the search leaves; None: it was not evaluated.
        seconds: of the search, with what it explored and measured.
        peak_mb: peak memory; None: not known.
        tuned: epochs that the search trained after the decision; None: not known.
        config: the settings it was run with, but for the seed and where files lie; None: not known.
    """

    folder: str
    name: str
    method: str
    space: str
    data: str | None
    seed: int | None
    unit: str
    target: float
    cost: float
    low: float
    high: float
    kind: str
    setting: tuple[tuple[str, Any], ...]
    status: str
    disturbed: bool
    top1: float | None
    macs: int
    params: int
    seconds: float
    peak_mb: float | None
    tuned: int | None = None
    config: tuple[tuple[str, Any], ...] | None = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, without ``config``."""
        data = {**asdict(self), "setting": dict(self.setting)}
        del data["config"]
        return data


@dataclass(frozen=True)
class Unfinished:
    """A folder that has no result of a search, and why: the search is not finished, or there is none."""

    folder: str
    method: str | None
    why: str = "not finished"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def find_searches(folders: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The folders of searches: each of ``folders`` itself, or, where it is none, those that lie right in it.

    Returns:
        The searches, and those of ``folders`` that are no search and hold none (a run that was refused at its start).

    Raises:
        DataError: a folder does not exist, or there is no search at all.
    """
    found: dict[Path, None] = {}
    none: dict[Path, None] = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise DataError(f"{given} is no folder; give work directories of tools/search.py")
        inside = [given] if _is_search(given) else sorted(p for p in given.iterdir() if p.is_dir() and _is_search(p))
        if not inside:
            none[given] = None
        found.update(dict.fromkeys(inside))
    if none and not found:
        names = f"{next(iter(none))} is" if len(none) == 1 else f"{few(map(str, none))} are"
        raise DataError(
            f"{names} no search: neither it nor a folder in it holds the {REPORT} of a search, or the "
            f"{FINGERPRINT} of one that is under way; give work directories of tools/search.py"
        )
    return list(found), list(none)


def read_searches(folders: Sequence[str | Path]) -> tuple[list[Found], list[Unfinished]]:
    """The finished searches of `find_searches`, and what is left out: those that are not, folders that hold none.

    Raises:
        DataError: see `find_searches`; a report is damaged or lacks what every search's has.
    """
    searches, others = find_searches(folders)
    done: list[Found] = []
    rest = [Unfinished(str(folder), None, "no search in it") for folder in others]
    for folder in searches:
        if _is_finished(folder):
            done.append(read_report(folder))
        else:
            rest.append(Unfinished(str(folder), _method(_strategy(folder))))
    return done, rest


def check_out(out: Path) -> None:
    """Raise `DataError` where a comparison written to ``out`` would replace the result of a search."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; give a folder")
    if out.is_dir() and _is_search(out):
        raise DataError(f"--out {out} is the work directory of a search, whose report would be replaced; give another")


def read_report(folder: Path) -> Found:
    """The result of one search; raises `DataError` where its report is damaged."""
    path, beside = folder / REPORT, folder / FINGERPRINT
    content = _read(path)
    if "config" not in content and beside.is_file():  # an older report
        content["config"] = _read(beside)
    try:
        report = _Report.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is no search's report: {describe_fields(error)}; {_REMEDY}") from None
    record, source = report.measured, report.cost
    if record is not None:
        extra = record.model_extra or {}
        cost, low, high = record.median_ms, record.ci_low_ms, record.ci_high_ms
        kind, setting = "measured", _setting({**source, **extra})
    else:
        cost = low = high = report.predicted
        kind, setting = ("predicted" if report.unit == "ms" else "counted"), _setting(source)
    peaks = [row["peak_mb"] for row in report.history if isinstance(row.get("peak_mb"), int | float)]
    return Found(
        folder=str(folder),
        name=report.name,
        method=_method(report.method) or report.method,
        space=report.space.name,
        data=report.data,
        seed=report.seed,
        unit=report.unit if record is None else "ms",
        target=report.target,
        cost=cost,
        low=low,
        high=high,
        kind=kind,
        setting=setting,
        status=report.status,
        disturbed=bool(record and record.disturbed),
        top1=report.top1_inherited,
        macs=report.macs,
        params=report.params,
        seconds=report.seconds if report.search_seconds is None else report.search_seconds,
        peak_mb=max(peaks, default=None) if report.peak_mb is None else report.peak_mb,
        tuned=None if report.epochs is None or report.decided_epoch is None else report.epochs - report.decided_epoch,
        config=_config(report),
    )


_REMEDY = "leave the folder out, or run its search again"


def _read(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); {_REMEDY}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} is damaged (a JSON object is expected, got {type(data).__name__}); {_REMEDY}")
    return data


def _setting(source: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, source[key]) for key in SETTING if source.get(key) is not None)


def _config(report: _Report) -> tuple[tuple[str, Any], ...] | None:
    """The settings that a search was run with."""
    if report.config is None:
        return None
    told = {"verify": report.verify, "space.hash": report.space.hash}
    kept = {k: v for k, v in {**report.config, **told}.items() if k not in _NO_SETTING and v is not None}
    return tuple(sorted(kept.items()))


def _is_search(folder: Path) -> bool:
    if _strategy(folder) is not None:
        return True
    # results may be copied without the run's other files; another tool's report has no method and target
    path = folder / REPORT
    return path.is_file() and {"method", "target"} <= set(_read(path))


def _is_finished(folder: Path) -> bool:
    """A search writes its spec last; a folder without the run's own files is a copy of results."""
    return (folder / REPORT).is_file() and ((folder / SPEC).is_file() or not (folder / FINGERPRINT).is_file())


def _strategy(folder: Path) -> str | None:
    """The strategy in the config that is run in a folder; None where it is no search's."""
    path = folder / FINGERPRINT
    if not path.is_file():
        return None
    strategy = _read(path).get("train_cfg.strategy.type")
    return strategy if isinstance(strategy, str) else None


def _method(strategy: str | None) -> str | None:
    if strategy is None:
        return None
    short = strategy.rpartition(".")[2]
    return METHODS.get(short, short)
