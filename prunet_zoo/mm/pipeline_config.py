"""A pipeline's config: which stages there are, what each of them runs, and what its result depends on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from prunet_zoo.errors import unknown_name
from prunet_zoo.files import sha256_of
from prunet_zoo.latency import LatencyTable
from prunet_zoo.mm.cli import ConfigError, load_config
from prunet_zoo.mm.guard import fingerprint
from prunet_zoo.mm.training import METRICS
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space
from prunet_zoo.spec import load_spec, stable_hash

TABLE, SEARCH, CLASSIFIER, MEASURE, PICTURE = "table", "search", "classifier", "measure", "picture"
TABLE_FILE, MEASURED = "latency_table.jsonl", "measured.json"
_SETTING = ("backend", "threads", "batch", "dtype", "device")  # options of tools/latency.py
_KEYS = {
    "": {"title", "target_ms", "seed", "env", TABLE, SEARCH, CLASSIFIER, "detectors", MEASURE, PICTURE},
    TABLE: {"space", "num_classes", "quick", "file", "env", *_SETTING},
    SEARCH: {"config", "device", "verify", "cfg_options", "args", "processes", "env"},
    CLASSIFIER: {"config", "cfg_options", "args", "processes", "env"},
    "detectors": {"config", "weights", "cfg_options", "args", "processes", "env"},
    MEASURE: {"input_size", "seconds", "env", *_SETTING},
    PICTURE: {"count", "score_thr", "env"},
}
_WEIGHTS = {"best": "classifier/best.safetensors", "last": "classifier/last.safetensors"}
_WEIGHTS["search"] = "search/weights.safetensors"


@dataclass(frozen=True)
class Command:
    """One program of a stage: ``python <words>``; what it prints goes to the file ``capture`` where that is given."""

    words: tuple[str, ...]
    capture: Path | None = None


@dataclass(frozen=True)
class Stage:
    """One step. ``own`` is what it makes in the work directory, ``results`` the files that are there when it is done.

    ``plan`` gives its commands and its inputs (name → value or hash); it is called when the stages before are done.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    own: tuple[str, ...]
    results: tuple[str, ...]
    plan: Callable[[], tuple[list[Command], dict[str, Any]]]
    env: Mapping[str, str] = field(default_factory=dict)


class PipelineConfig:
    """The stages of a config in a work directory.

    Args:
        cfg: with ``search``, and where wanted ``table``, ``classifier``, ``detectors`` (name → dict), ``measure``,
            ``picture``, ``target_ms``, ``seed``, ``title``, ``env``; see configs/pipeline/.
        work_dir: where everything goes.
        root: the repository's root, where tools/ lies.
        cwd: where the stages run; paths in the config are meant from there, or else from ``root``.
        target_ms, seed: in the place of the config's.

    Raises:
        ConfigError: a key that there is not, a stage without its config, a config that is missing.
    """

    def __init__(
        self,
        cfg: Config,
        work_dir: Path,
        root: Path,
        cwd: Path,
        target_ms: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.cfg = cfg.to_dict() if isinstance(cfg, Config) else dict(cfg)
        self.dir, self.root, self.cwd = work_dir, root, cwd
        self._check()
        self.title = self.cfg.get("title") or "pipeline"
        self.seed = int(self.cfg.get("seed") or 0) if seed is None else seed
        self._target = self.cfg.get("target_ms") if target_ms is None else target_ms
        if self._target is not None and not (isinstance(self._target, int | float) and 0 < self._target < math.inf):
            raise ConfigError(f"the target must be a positive number of milliseconds, got {self._target!r}")
        self.detectors: dict[str, dict[str, Any]] = self.cfg.get("detectors") or {}
        self.stages = self._make_stages()

    def _check(self) -> None:
        own = {key: value for key, value in self.cfg.items() if not key.startswith("_")}
        sections = [("", own)]
        sections += [(n, own[n]) for n in (TABLE, SEARCH, CLASSIFIER, MEASURE, PICTURE) if own.get(n) is not None]
        sections += [("detectors", item) for item in (own.get("detectors") or {}).values()]
        for name, section in sections:
            where = name or "a pipeline's config"
            if not isinstance(section, Mapping):
                raise ConfigError(f"{where} must be a dict, got {section!r}")
            for key in section:
                if key not in _KEYS[name]:
                    raise ConfigError(str(unknown_name(f"key of {where}", key, _KEYS[name])))
            if "config" in _KEYS[name] and not section.get("config"):
                raise ConfigError(f"{where} needs config='configs/….py'")
        if not own.get(SEARCH):
            raise ConfigError("a pipeline needs search=dict(config='configs/search/….py'); see configs/pipeline/")
        if own.get(TABLE) and own[SEARCH].get("device"):
            raise ConfigError("search.device (predicted latencies) and table (measured ones) exclude each other")
        if own.get(TABLE) and not ("space" in own[TABLE]) ^ ("file" in own[TABLE]):
            raise ConfigError("table needs either space=… (measured here) or file=… (measured before)")
        for name, item in (own.get("detectors") or {}).items():
            if not name.isidentifier() or name in (TABLE, SEARCH, CLASSIFIER, MEASURE, PICTURE):
                raise ConfigError(f"{name!r} cannot be a detector's name: it names a stage and its folder")
            weights = item.get("weights", "best")
            if weights not in _WEIGHTS:
                raise ConfigError(f"weights of {name} must be one of {', '.join(_WEIGHTS)}; got {weights!r}")
            if weights != "search" and not own.get(CLASSIFIER):
                raise ConfigError(f"detector {name} starts from the classifier's weights, but there is no classifier")

    @property
    def target_ms(self) -> float | None:
        """The latency budget; where none is given, a third of the way from the fastest to the slowest network of the
        table that this pipeline measured; None: the search config's."""
        if self._target is not None or not (self.cfg.get(TABLE) or {}).get("space"):
            return self._target
        low, high = self.reach()
        return float(f"{low + (high - low) / 3:.2g}")

    def reach(self) -> tuple[float, float]:
        """Latency (ms) of the fastest and of the slowest network of the space, by the table."""
        (low, _), (high, _) = cost_range(LatencyTable.load(self._table_file()), load_space(self.cfg[TABLE]["space"]))
        return low, high

    def _table_file(self) -> Path:
        given = (self.cfg.get(TABLE) or {}).get("file")
        return self.dir / TABLE_FILE if given is None else self.cwd / self._find(given)

    def _find(self, path: str) -> str:
        """A path as the stages take it."""
        if Path(path).is_absolute() or (self.cwd / path).exists() or not (self.root / path).exists():
            return path
        return str(self.root / path)

    def _make_stages(self) -> list[Stage]:
        cfg, stages = self.cfg, []
        measured = bool((cfg.get(TABLE) or {}).get("space"))
        if measured:
            stages.append(self._stage(TABLE, "Latency table of this machine", (), (TABLE_FILE,), self._plan_table))
        needs: tuple[str, ...] = (TABLE,) if measured else ()
        results = tuple(f"search/{name}" for name in ("spec.json", "weights.safetensors", "report.json"))
        stages.append(self._stage(SEARCH, "Search", needs, ("search",), self._plan_search, results))
        if cfg.get(CLASSIFIER):
            used = {_WEIGHTS[item.get("weights", "best")] for item in self.detectors.values()} - {_WEIGHTS["search"]}
            results = (f"classifier/{METRICS}", "classifier/last.safetensors", *used - {_WEIGHTS["last"]})
            title = "Train the network found as a classifier"
            stages.append(self._stage(CLASSIFIER, title, (SEARCH,), ("classifier",), self._plan_classifier, results))
        for name, item in self.detectors.items():
            needs = (SEARCH,) if item.get("weights") == "search" else (SEARCH, CLASSIFIER)
            results = (f"{name}/{METRICS}", f"{name}/last_checkpoint")
            title = f"Train it as the backbone of a detector ({name})"
            stages.append(self._stage(name, title, needs, (name,), partial(self._plan_detector, name), results, item))
        files = (MEASURED, *map(self.speed_file, self.detectors))
        stages.append(self._stage(MEASURE, "Measure it", (SEARCH, *self.detectors), files, self._plan_measure))
        if self.detectors:
            pictures = tuple(self.pictures().values())
            title = "Draw detections on unseen images"
            stages.append(self._stage(PICTURE, title, tuple(self.detectors), pictures, self._plan_picture))
        return stages

    def _stage(
        self,
        name: str,
        title: str,
        needs: tuple[str, ...],
        own: tuple[str, ...],
        plan: Callable[[], tuple[list[Command], dict[str, Any]]],
        results: tuple[str, ...] | None = None,
        section: Mapping[str, Any] | None = None,
    ) -> Stage:
        section = section or self.cfg.get(name) or {}
        given = {**(self.cfg.get("env") or {}), **(section.get("env") or {})}
        env = {key: str(value) for key, value in given.items() if value is not None}
        return Stage(name, title, needs, own, own if results is None else results, plan, env)

    def pictures(self) -> dict[str, str]:
        """Detector → file of its picture."""
        if len(self.detectors) == 1:
            return {next(iter(self.detectors)): "detections.png"}
        return {name: f"detections_{name}.png" for name in self.detectors}

    def speed_file(self, detector: str) -> str:
        """File of a detector's measured latency."""
        return f"{Path(MEASURED).stem}_{detector}.json"

    def _plan_table(self) -> tuple[list[Command], dict[str, Any]]:
        section = self.cfg[TABLE]
        words = [
            self._find("tools/latency.py"),
            "table",
            self._find(section["space"]),
            "--out",
            str(self._table_file()),
        ]
        words += _options(section, ("num_classes", *_SETTING)) + (["--quick"] if section.get("quick") else [])
        return [Command(tuple(words))], {"space": load_space(section["space"]).hash, "options": words[5:]}

    def _plan_search(self) -> tuple[list[Command], dict[str, Any]]:
        section, target = self.cfg[SEARCH], self.target_ms
        words, inputs = self._run("tools/search.py", section)
        if target is not None:
            words += ["--target-ms", str(target)]
            inputs["target_ms"] = target
        if self.cfg.get(TABLE):
            if not self._table_file().is_file():
                raise ConfigError(f"latency table {self._table_file()} does not exist; make it with tools/latency.py")
            words += ["--table", str(self._table_file())]
            inputs["table"] = sha256_of(self._table_file())
        for name in ("device", "verify"):
            if section.get(name) is not None:
                words += [f"--{name}", str(section[name])]
                inputs[name] = section[name]
        return [self._finish(words, SEARCH, section)], inputs

    def _plan_classifier(self) -> tuple[list[Command], dict[str, Any]]:
        return self._plan_training(CLASSIFIER, self.cfg[CLASSIFIER], "search")

    def _plan_detector(self, name: str) -> tuple[list[Command], dict[str, Any]]:
        return self._plan_training(name, self.detectors[name], self.detectors[name].get("weights", "best"))

    def _plan_training(self, name: str, section: dict[str, Any], source: str) -> tuple[list[Command], dict[str, Any]]:
        spec, weights = self.dir / "search" / "spec.json", self.dir / _WEIGHTS[source]
        words, inputs = self._run("tools/train.py", section)
        words += ["--arch", str(spec), "--weights", str(weights)]
        inputs |= {"arch": load_spec(str(spec)).hash, "weights": sha256_of(weights)}
        return [self._finish(words, name, section)], inputs

    def _run(self, tool: str, section: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """The first words of a tool that takes a config, and what its result depends on by now."""
        config = self._find(section["config"])
        options = section.get("cfg_options") or {}
        cfg = load_config(self.cwd / config, dict(_flat(options)))
        content = {**fingerprint(cfg), "paths": _paths(cfg.to_dict())}
        words = [self._find(tool), config]
        if section.get("processes"):
            words = [self._find("tools/launch.py"), "--processes", str(section["processes"]), *words]
        inputs = {"config": stable_hash(content), "args": list(section.get("args") or ()), "seed": self.seed}
        return words, {**inputs, "processes": section.get("processes") or 1}

    def _finish(self, words: list[str], folder: str, section: Mapping[str, Any]) -> Command:
        tail = [
            "--work-dir",
            str(self.dir / folder),
            "--seed",
            str(self.seed),
            "--resume",
            *(section.get("args") or ()),
        ]
        options = [f"{key}={_shown(value)}" for key, value in _flat(section.get("cfg_options") or {})]
        return Command((*words, *tail, *(["--cfg-options", *options] if options else [])))

    def _plan_measure(self) -> tuple[list[Command], dict[str, Any]]:
        section, spec = self.cfg.get(MEASURE) or {}, self.dir / "search" / "spec.json"
        options = _options(section, ("input_size", "seconds", *_SETTING))
        words = [self._find("tools/latency.py"), "measure", str(spec), *options, "--json"]
        commands = [Command(tuple(words), self.dir / MEASURED)]
        inputs: dict[str, Any] = {"arch": load_spec(str(spec)).hash, "options": options}
        threads = str(section.get("threads", 1))
        for name in self.detectors:
            speed = ("-m", "prunet_zoo.mm.detector_speed", str(self.dir / name), "--threads", threads, "--json")
            commands.append(Command(speed, self.dir / self.speed_file(name)))
            inputs[name] = sha256_of(self.dir / name / METRICS)
        return commands, inputs

    def _plan_picture(self) -> tuple[list[Command], dict[str, Any]]:
        section = self.cfg.get(PICTURE) or {}
        options = _options(section, ("count", "score_thr"))
        commands = [
            Command(("-m", "prunet_zoo.mm.draw", str(self.dir / name), "--out", str(self.dir / picture), *options))
            for name, picture in self.pictures().items()
        ]
        return commands, {"options": options} | {n: sha256_of(self.dir / n / METRICS) for n in self.detectors}


def _options(section: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """``--name value`` for each of ``names`` that a section gives."""
    words: list[str] = []
    for name in names:
        value = section.get(name)
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _flat(options: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Nested options as ('a.b', value)."""
    found: list[tuple[str, Any]] = []
    for key, value in options.items():
        where = f"{path}.{key}" if path else str(key)
        found += _flat(value, where) if isinstance(value, Mapping) and value else [(where, value)]
    return found


def _shown(value: Any) -> str:
    """A value as ``--cfg-options`` reads it back."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    return str(value)


def _paths(value: Any, key: str = "") -> list[str]:
    """Where a config's data lie, which a `fingerprint` leaves out."""
    if isinstance(value, Mapping):
        return [path for name, item in value.items() for path in _paths(item, str(name))]
    if isinstance(value, list | tuple):
        return [path for item in value for path in _paths(item, key)]
    return [f"{key}={value}"] if key in ("data_root", "ann_file", "img") and isinstance(value, str) else []


def python() -> str:
    """The interpreter that runs the stages."""
    return sys.executable
