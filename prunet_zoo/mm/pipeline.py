"""Latency table → search → classifier → detectors → measurement → picture, as one job that goes on where it stopped.

Each stage is one of the tools, run as a child process with ``--resume``. ``pipeline.json`` in the work directory notes
for each what its result depends on (config, weights, options) and what the result's files are: a stage whose inputs are
the same and whose files stand is skipped, one that was stopped goes on, one whose inputs are others begins anew.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from prunet_zoo.errors import PrunetError, few, unknown_name
from prunet_zoo.files import sha256_of, write_atomic, write_json
from prunet_zoo.mm.interrupts import Interrupted, resume_command, run_child
from prunet_zoo.mm.pipeline_config import PipelineConfig, Stage, python

STATE = "pipeline.json"
REPORT = ("report.json", "report.html")


class StageError(PrunetError, RuntimeError):
    """A stage of a pipeline ended with an error (its own message stands above), or a folder is not the pipeline's."""


class Pipeline:
    """Runs the stages of a config.

    Args:
        config: the stages.
        again: options of the calling tool that the printed command to continue leaves out (they would begin anew).

    Raises:
        StageError: the work directory holds something else under a stage's name, or a damaged record.
    """

    def __init__(self, config: PipelineConfig, again: Sequence[str] = ()) -> None:
        self.config, self.dir, self.again, self.console = config, config.dir, again, Console()
        self.file = self.dir / STATE
        self.state = self._read()
        self.ran: list[str] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took, over all calls."""
        done = self.state["stages"]
        return {s.name: done[s.name]["seconds"] for s in self.config.stages if s.name in done}

    def _read(self) -> dict[str, Any]:
        if self.dir.exists() and not self.dir.is_dir():
            raise StageError(f"{self.dir} is a file; give a folder with --work-dir")
        if self.file.is_file():
            try:
                return {"stages": {}, "rerun": [], **json.loads(self.file.read_text(encoding="utf-8"))}
            except ValueError as error:
                raise StageError(
                    f"{self.file} is damaged ({error}); remove it together with the stages' folders, or take another "
                    "--work-dir"
                ) from None
        there = [name for stage in self.config.stages for name in stage.own if (self.dir / name).exists()]
        if there:
            raise StageError(
                f"{self.dir} has {few(there)}, but no {STATE}: no pipeline has made it, and nothing is overwritten; "
                "give another --work-dir"
            )
        return {"stages": {}, "rerun": []}

    def _save(self) -> None:
        write_json(self.file, self.state)

    def forget(self, names: Sequence[str]) -> None:
        """Let stages (``--rerun``) and all that depend on them run anew. A request that was stopped goes on instead.

        Raises:
            UnknownNameError: there is no such stage.
        """
        known = [stage.name for stage in self.config.stages]
        for name in names:
            if name not in known:
                raise unknown_name("stage", name, known)
        if sorted(names) == self.state["rerun"]:
            return
        doomed = set(names)
        for stage in self.config.stages:
            if doomed & set(stage.needs):
                doomed.add(stage.name)
        for name in doomed:
            self.state["stages"].pop(name, None)
        self.state["rerun"] = sorted(names)
        self._save()

    def run(self) -> list[str]:
        """Run what is to be run; returns the names of the stages that ran.

        Raises:
            StageError: a stage failed. Interrupted: it was stopped by a signal, after it had saved what it could.
        """
        self.dir.mkdir(parents=True, exist_ok=True)
        self._save()
        for number, stage in enumerate(self.config.stages, 1):
            self.console.rule(f"{number}/{len(self.config.stages)}  {stage.title}")
            self._run_stage(stage)
        self.state["rerun"] = []
        self._save()
        return self.ran

    def _run_stage(self, stage: Stage) -> None:
        commands, inputs = stage.plan()
        inputs = json.loads(json.dumps(inputs))  # as it will be read back
        record = self.state["stages"].get(stage.name)
        if record is not None and record["inputs"] != inputs:
            keys = record["inputs"].keys() | inputs.keys()
            changed = sorted(key for key in keys if record["inputs"].get(key) != inputs.get(key))
            self._tell(f"begins anew: {few(changed)} changed")
            record = None
        if record is not None and record["done"]:
            wrong = self._wrong(stage, record)
            if not wrong:
                self._tell(f"stands ({record['seconds']:.0f} s), skipped")
                return
            self._tell(f"begins anew: {wrong}")
            record = None
        if record is None:
            self.state["stages"].pop(stage.name, None)
            self._save()  # from here on, what lies there is nobody's
            for name in stage.own:
                _remove(self.dir / name)
            record = {"inputs": inputs, "done": False, "seconds": 0.0}
            self.state["stages"][stage.name] = record
            self._save()
        self.ran.append(stage.name)
        for command in commands:
            output = self._call(stage, record, command.words, command.capture is not None)
            if command.capture is not None:
                write_atomic(command.capture, output)
        missing = [name for name in stage.results if not (self.dir / name).is_file()]
        if missing:
            raise StageError(f"stage '{stage.name}' ended well, but left no {few(missing)} in {self.dir}")
        record |= {"done": True, "results": {name: sha256_of(self.dir / name) for name in stage.results}}
        record |= {"commands": [shlex.join(["python", *command.words]) for command in commands]}
        record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._save()

    def _wrong(self, stage: Stage, record: dict[str, Any]) -> str:
        """Why the result of a stage that was done does not stand; empty: it does."""
        for name in stage.results:
            path = self.dir / name
            if not path.is_file():
                return f"{name} is missing"
            if record["results"].get(name) != sha256_of(path):
                return f"{name} is not what it left"
        return ""

    def _call(self, stage: Stage, record: dict[str, Any], words: Sequence[str], capture: bool) -> str:
        """Run ``python <words>``; returns its standard output where it is captured."""
        self.console.print(f"$ python {shlex.join(words)}", style="dim", highlight=False, soft_wrap=True)
        start, before = time.perf_counter(), record["seconds"]
        env = {**stage.env, **os.environ}  # what the user has set comes first
        status, output, signum = run_child([python(), *words], self.config.cwd, capture=capture, env=env)
        record["seconds"] = round(before + time.perf_counter() - start, 1)
        self._save()
        if signum is not None:
            command = resume_command(resumable=False, drop=self.again)
            raise Interrupted(signum, f"stopped in stage '{stage.name}'. Continue with:\n    {command}")
        if status:
            raise StageError(
                f"stage '{stage.name}' ended with status {status}; mend what it says above, then run the same command "
                "again: it goes on with this stage"
            )
        return output

    def _tell(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
