"""What lets MMEngine and mmdet run on a current PyTorch without a compiler; `prepare` runs on ``import prunet_zoo``.

Three gaps are closed, and nothing is touched where there is no gap:

- ``mmcv-lite`` has no compiled ``mmcv._ext``, so ``import mmdet.models`` fails. `provide_mmcv_ext` puts a module of
  that name in place, with the operators of `prunet_zoo.mm.ops`; every other one says, when called, what to install.
- MMEngine looks packages up through ``pkg_resources``, which says twice in every run that it is deprecated.
  `silence_pkg_resources` keeps just that away; nobody who uses prunet_zoo can mend it.
- torch ≥ 2.6 loads checkpoints with ``weights_only=True``; those of MMEngine hold its log history and numpy numbers.
  `allow_checkpoint_classes` allows exactly these classes. The check itself stays on.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, NoReturn

from prunet_zoo.errors import PrunetError

EXT = "mmcv._ext"


class MissingOperatorError(PrunetError, NotImplementedError):
    """An operator of compiled mmcv was called that the substitute for ``mmcv-lite`` does not have."""


def prepare() -> None:
    """Close the gaps; costs a look at the import path and an import of MMEngine's logging, not of mmcv or mmdet."""
    silence_pkg_resources()
    provide_mmcv_ext()
    allow_checkpoint_classes()


def silence_pkg_resources() -> None:
    """Ignore setuptools' warning where MMEngine is at fault: it imports ``pkg_resources`` and reloads it."""
    where = r"mmengine\.utils\.package_utils$|importlib$"  # the reload is made in importlib
    warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", Warning, where)


def provide_mmcv_ext() -> bool:
    """Put a substitute for ``mmcv._ext`` into ``sys.modules`` if mmcv is installed without a compiled one.

    mmcv itself is not imported. A compiled module is left alone, loaded or not.

    Returns:
        Whether the substitute is in place now.
    """
    if EXT in sys.modules:
        return isinstance(sys.modules[EXT], SubstituteExt)
    spec = find_spec("mmcv")
    if spec is None or spec.submodule_search_locations is None:
        return False
    if PathFinder.find_spec(EXT, spec.submodule_search_locations) is not None:
        return False
    sys.modules[EXT] = SubstituteExt()
    return True


class SubstituteExt(ModuleType):
    """Stands in for ``mmcv._ext``: has every operator name, and an implementation of those that detectors need."""

    def __init__(self) -> None:
        super().__init__(EXT, "Substitute for mmcv's compiled operators (prunet_zoo.mm.compat).")
        # mmcv and mmengine look for the module by its spec (importlib.util.find_spec), which must not be None
        self.__spec__ = ModuleSpec(EXT, loader=None, origin="prunet_zoo.mm.compat")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {EXT!r} has no attribute {name!r}")
        from prunet_zoo.mm import ops  # not before mmcv.ops asks for it: it loads torchvision

        operator: Callable[..., Any] = getattr(ops, name) if name in ops.__all__ else _refusal(name)
        setattr(self, name, operator)  # found directly from now on
        return operator


def provided() -> list[str]:
    """The operators of the substitute, as mmcv names them, without the "forward" and "backward" of each."""
    from prunet_zoo.mm import ops

    names = {re.sub(r"_(forward|backward).*$", "", name) for name in ops.__all__ if not name.startswith("get_")}
    return sorted(names)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise MissingOperatorError(
            f"mmcv's operator {name!r} was called, but mmcv-lite is installed, which has no compiled operators, and "
            f"prunet_zoo provides only {', '.join(provided())}. Install full mmcv for {name!r}: "
            "pip uninstall mmcv-lite && pip install 'mmcv>=2.0.0,<2.2.0' (needs a compiler, takes some minutes)"
        )

    refuse.__name__ = name
    return refuse


def allow_checkpoint_classes() -> None:
    """Let torch's ``weights_only`` loader accept what MMEngine's checkpoints hold besides tensors.

    These are `HistoryBuffer` (the values of losses and learning rates), and numpy arrays and scalars of plain numeric
    types. A `HistoryBuffer` refers to its statistics, and a one-cycle schedule to its annealing function, through
    ``getattr``: a function that returns these few and nothing else stands in for it, so a hostile file reaches no other
    attribute. None of them runs code of a file.
    """
    import numpy as np
    import torch

    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is None:  # torch before 2.4 has no list
        return
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray  # type: ignore[no-redef]

    def one_cycle(*args: Any) -> NoReturn:
        raise UnpicklingError("a checkpoint may name OneCycleParamScheduler, but not make one")

    for name in ("_annealing_cos", "_annealing_linear"):  # onedl-mmengine allows getattr itself while it loads a file
        setattr(one_cycle, name, getattr(OneCycleParamScheduler, name))
    attributes: dict[Any, tuple[type, tuple[str, ...]]] = {
        HistoryBuffer: (HistoryBuffer, ("min", "max", "current", "mean")),
        one_cycle: (OneCycleParamScheduler, ("_annealing_cos", "_annealing_linear")),
    }

    def few_attributes(owner: Any, name: str) -> Any:
        cls, names = attributes.get(owner, (None, ())) if callable(owner) else (None, ())
        if name not in names:
            raise UnpicklingError(f"a checkpoint may not refer to attribute {name!r} of {owner!r}")
        return getattr(cls, name)

    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    allowed += [type(np.dtype(kind)) for kind in ("bool", "u1", "i4", "i8", "f2", "f4", "f8")]
    allowed.append(_renamed(few_attributes, "builtins", "getattr"))
    cls = OneCycleParamScheduler
    allowed.append(_named(one_cycle, cls.__module__, cls.__qualname__))
    for package in ("numpy._core", "numpy.core"):  # numpy 2 and numpy 1 write different names for the same function
        for name in ("_reconstruct", "scalar"):
            allowed.append(_renamed(getattr(multiarray, name), f"{package}.multiarray", name))
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch 2.6: entries may be (class, name)
        # onedl-mmengine allows some of these while it loads a file, and then takes them off the list: but not a pair
        allowed = [(item, f"{item.__module__}.{item.__qualname__}") for item in allowed]
    add(allowed)


def _renamed(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """A function that does what ``function`` does under the name that a pickle refers to."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    return _named(stand_in, module, name)


def _named(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function
