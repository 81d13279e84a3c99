"""4-bit formats by the names that configurations and the registry of methods use."""

import functools
from collections.abc import Callable

from jpeft.config import allow
from jpeft.messages import did_you_mean
from jpeft.registering import module_of

from .affine import affine
from .blocks import Format
from .fp4 import fp4
from .int4 import int4
from .nf4 import nf4

FORMATS: dict[str, Callable[[], Format]] = {
  'nf4': nf4,
  'nf4_double': functools.partial(nf4, double=True),
  'fp4': fp4,
  'fp4_double': functools.partial(fp4, double=True),
  'int4': int4,
  'int4_1': functools.partial(int4, minimum=True),
  'affine': affine,
}
# Where formats from outside jpeft were registered.
_MODULES: dict[str, str] = {}


def register_format(name: str, make: Callable[[], Format]) -> None:
  """Makes a 4-bit format known by name: to `named`, to `model.quantize` of a config, to plans.

  Args:
    name: in configurations.
    make: () -> a format; see `Format`.

  Raises:
    ValueError: jpeft has a format of that name.
  """
  if name in FORMATS and name not in _MODULES:
    raise ValueError(f'{name!r} is a 4-bit format of jpeft: choose another name')
  FORMATS[name] = make
  _MODULES[name] = module_of(make)
  allow('model.quantize', name)


def registered_module(name: str | None) -> str | None:
  """The module that registered a format; None for a format of jpeft."""
  return _MODULES.get(name)


def named(name: str) -> Format:
  """A format by its name in FORMATS.

  Raises:
    ValueError: there is none.
  """
  if name not in FORMATS:
    raise ValueError(
      f'no 4-bit format is called {name!r}{did_you_mean(name, FORMATS)} '
      f'There are: {", ".join(FORMATS)}'
    )
  return FORMATS[name]()
