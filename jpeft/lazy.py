"""What is imported on first use: names of package faces, and the packages of extras."""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Says how to install what the block imports: `with extra('plan'): import matplotlib`.

  Args:
    name: of the extra of pyproject.toml that has the package.

  Raises:
    ModuleNotFoundError: the package is not installed; one sentence that names the extra.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    raise ModuleNotFoundError(
      f"this needs the package {package}: pip install 'jpeft[{name}]'", name=error.name
    ) from error
