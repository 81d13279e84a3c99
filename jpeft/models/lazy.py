"""Faces of packages whose modules are imported on first use."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def on_first_use(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
  """A module's `__getattr__` that imports the module of a name when the name is first read.

  Args:
    package: its `__name__`.
    modules: {public name: the module that defines it, relative to the package}.
  """

  def __getattr__(name: str) -> Any:
    if name not in modules:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    return getattr(importlib.import_module(modules[name], package), name)

  return __getattr__
