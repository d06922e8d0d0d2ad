"""Import one module of a large package without importing all of it.

`import jupyter_client.session` first runs `jupyter_client/__init__.py`, which loads clients,
managers and provisioners that a kernel never uses: a third of its start. The same goes for
IPython. A deferred package runs its `__init__` when somebody asks for a name that only that has,
so nothing is missing, only later.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType


def defer(package: str, names: Mapping[str, str] | None = None) -> None:
    """Defer a package that is not loaded yet; does nothing where it is, or is not installed.

    `names` are names of the package and the submodule that each can be had from.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    homes = dict(names or {})

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        submodule = f"{package}.{name}"
        if submodule in sys.modules or importlib.util.find_spec(submodule) is not None:
            return importlib.import_module(submodule)
        return getattr(_load(module), name)

    module.__dict__["__getattr__"] = find
    sys.modules[package] = module


def _load(module: ModuleType) -> ModuleType:
    """Run what was deferred, in place: who holds the module holds the whole package now."""
    spec = module.__spec__
    if spec is None or spec.loader is None:
        raise ImportError(f"the package {module.__name__} has lost its loader")
    del module.__dict__["__getattr__"]
    spec.loader.exec_module(module)
    return module
