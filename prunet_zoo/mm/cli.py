"""What the tools share: arguments as in mmdet's tools, reading a config, and ending with a message and a status."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from mmengine.config import Config, DictAction

from prunet_zoo.console import USER_ERROR, full_disk
from prunet_zoo.errors import PrunetError
from prunet_zoo.files import WriteError
from prunet_zoo.mm.checks import from_data, how_to_restore, unreadable_image
from prunet_zoo.mm.distributed import SaidByFirstError, leave
from prunet_zoo.mm.interrupts import Interrupted, is_first, rank, resume_command

_ALONE = 10.0  # seconds after which a mistake that the first process has not made is said by another
_AT_ONCE = "stopped at once; what was saved before is whole. {} with:\n    {}"


class ConfigError(PrunetError, ValueError):
    """A config file is missing or broken, or an option does not fit it."""


class ConfigOptions(DictAction):
    """mmdet's KEY=VALUE options, wrong ones told as a `ConfigError`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        name = option_string or "--cfg-options"
        for text in values or ():
            if not text.partition("=")[0] or "=" not in text:
                raise ConfigError(f"{name} takes KEY=VALUE, got {text!r}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # brackets that are not closed
            raise ConfigError(f"{name} {' '.join(values)}: {_first_line(error)}") from None


def add_config_arguments(parser: argparse.ArgumentParser, training: bool = True) -> argparse.ArgumentParser:
    """Add CONFIG and mmdet's flags; with ``training`` also --resume, --amp, --auto-scale-lr and --seed."""
    parser.add_argument("config", metavar="CONFIG", help="config file (configs/...)")
    parser.add_argument("--work-dir", metavar="D", help="where results go; default work_dirs/<config name>")
    if training:
        parser.add_argument("--resume", action="store_true", help="continue the run in the work directory")
        parser.add_argument("--amp", action="store_true", help="automatic mixed precision (needs a GPU)")
        parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch size")
        parser.add_argument("--seed", type=int, metavar="N", help="of every random number; default 0 or the config's")
    parser.add_argument(
        "--cfg-options", nargs="+", action=ConfigOptions, metavar="KEY=VALUE", help="change values of the config"
    )
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="who started the processes"
    )
    if not is_first():
        parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _refuse(message: str) -> NoReturn:
    """What argparse says of a wrong argument, as an error like the others, so that `run_tool` has it said once."""
    raise ConfigError(message)


def load_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    Raises:
        ConfigError: the file is missing, is no config, or does not take the options.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config file {path} does not exist; see the folder configs/ for those that come along")
    try:
        cfg = Config.fromfile(str(path))
    except PrunetError:
        raise
    except Exception as error:  # a config is Python: anything can be raised in it
        raise ConfigError(f"config file {path} is broken: {type(error).__name__}: {_first_line(error)}") from error
    try:
        cfg.merge_from_dict(options or {})
    except Exception as error:
        raise ConfigError(f"--cfg-options do not fit {path}: {type(error).__name__}: {_first_line(error)}") from error
    return cfg


def config_from_args(args: argparse.Namespace) -> Config:
    """Read the config that the arguments of `add_config_arguments` name, and apply them to it.

    Raises:
        ConfigError: see `load_config`; --amp without a GPU; --auto-scale-lr without a base batch size in the config.
    """
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.work_dir or not cfg.get("work_dir"):
        cfg.work_dir = args.work_dir or str(Path("work_dirs") / Path(args.config).stem)
    if "resume" not in args:
        return cfg
    cfg.resume = bool(args.resume)
    seed = args.seed if args.seed is not None else cfg.get("randomness", {}).get("seed") or 0
    cfg.randomness = {**cfg.get("randomness", {}), "seed": seed}
    if args.amp:
        if not torch.cuda.is_available():
            raise ConfigError("--amp needs a GPU that torch can use, and there is none; leave it out on CPU")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ConfigError(f"--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=...) in {args.config}")
        cfg.auto_scale_lr.enable = True
    return cfg


def run_tool(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    resumable: bool = False,
    drop: Sequence[str] = (),
) -> NoReturn:
    """Run a tool's ``main(argv)`` and exit: 0; 2 and a line on stderr for what a user can mend; 130 or 143 on signals.

    Errors of the program itself keep their traceback.

    Args:
        main: the tool.
        argv: its arguments; None: this process's.
        resumable: whether it has ``--resume``, which the printed command to continue then gets.
        drop: options of the tool that the printed command leaves out.
    """
    again = resume_command(None, resumable, drop)
    stopped = _AT_ONCE.format("Continue" if resumable else "Run it again", again)

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(number, stopped)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        status = main(argv) or 0
    except Interrupted as stop:
        if is_first():
            print(f"\n{stop.message}", file=sys.stderr)
        status = stop.status
    except KeyboardInterrupt:
        if is_first():
            print(f"\n{stopped}", file=sys.stderr)
        status = 128 + signal.SIGINT
    except SaidByFirstError:
        status = USER_ERROR
    except (PrunetError, OSError, AssertionError) as error:
        message = _for_user(error)
        if message is None:
            raise
        if isinstance(error, WriteError) or (not isinstance(error, PrunetError) and full_disk(error)):
            message += f" Then run:\n    {again}"
        if not is_first():
            _let_the_first_speak()
            message = f"only process {rank()} has this: {message}"
        print(f"error: {message}", file=sys.stderr)
        status = USER_ERROR
    finally:
        signal.signal(signal.SIGTERM, before)
    leave(status)


def _let_the_first_speak() -> None:
    """Wait: where the first process has made the same mistake, it says so, and the launcher ends this one."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(USER_ERROR)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        time.sleep(_ALONE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _for_user(error: PrunetError | OSError | AssertionError) -> str | None:
    """What to tell the user; None: the error is the program's own."""
    if isinstance(error, PrunetError):
        return one_line(error)
    if isinstance(error, AssertionError):  # mmcv's
        path = unreadable_image(error)
        return f"image {path} cannot be read: it is damaged or cut off; replace it" if path else None
    if full := full_disk(error):
        return full
    if isinstance(error, FileNotFoundError) and from_data(error):
        text = one_line(error)
        path = error.filename or text.partition("'")[2].rpartition("'")[0]  # a worker's error has the text alone
        return f"the data is not complete: {text}; {how_to_restore(path)}"
    return None


def one_line(error: BaseException) -> str:
    """The message of an error, also of one that a dataloader's worker wrapped with its traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
