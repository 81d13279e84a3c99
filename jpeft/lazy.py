"""Package faces whose names are imported on first use."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def on_first_use(package: str, faces: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
  """A `__getattr__` for a package, which imports the module of a name when the name is first read.

  Args:
    package: its `__name__`.
    faces: {module, relative to the package: the public names that it defines}. A name that is the
      module's own stands for the module.
  """
  module_of = {name: module for module, names in faces.items() for name in names}

  def __getattr__(name: str) -> Any:
    if name not in module_of:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    module = importlib.import_module(module_of[name], package)
    if module_of[name] == f'.{name}':
      return module
    return getattr(module, name)

  return __getattr__
