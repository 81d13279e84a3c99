"""Where something that is registered from outside jpeft was written."""

import functools
from typing import Any


def module_of(make: Any) -> str:
  """The module that has to be imported for a factory to be registered again.

  Args:
    make: a function, a class, a functools.partial of one, or an object that can be called.
  """
  while isinstance(make, functools.partial):
    make = make.func
  if not hasattr(make, '__module__'):
    make = type(make)
  return make.__module__
