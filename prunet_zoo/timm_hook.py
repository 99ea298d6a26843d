"""Registers the zoo's networks with timm as soon as timm is imported, before or after this package (no torch, no timm).

Where timm is already there, `install` registers at once. Else it puts a finder in front of `sys.meta_path` that waits
for ``timm.models``, has the module loaded as always, registers, and is gone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AWAITED = "timm.models"


def install() -> None:
    """Register the networks with timm, now or when it is imported; further calls change nothing."""
    if sys.modules.get(_AWAITED) is not None:  # it may still be half imported: registering needs its registry alone
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("prunet_zoo.zoo.timm_models")  # importing it registers, so it happens once


class _Finder(MetaPathFinder):
    """Finds ``timm.models`` where the other finders do, and watches over its loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """Loads as ``loader`` does, then registers. The module gets ``loader`` itself, and sees nothing of this one."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # get_source, is_package, get_resource_reader, …
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)  # where this fails, the finder stays for the next attempt
        _register()
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
