"""The arguments of a call that a rule wraps."""

from collections.abc import Callable
from typing import Any

import jax

from jpeft.core import Bound


def first_array(call: Bound, args, kwargs) -> jax.Array:
  """The first array that a module is called with."""
  return next(iter(call.inputs(*args, **kwargs).values()))


def on_first(
  call: Bound,
  args,
  kwargs,
  fn: Callable[[jax.Array], jax.Array],
  other: Callable[[str, Any], Any] = lambda name, a: a,
) -> tuple[list, dict]:
  """The arguments of a call with fn(x) in place of the first array x.

  Args:
    call: of a module.
    args, kwargs: its arguments; the first array may come by position or by name.
    fn: of the first array.
    other: (parameter name, argument) -> what stands in place of a further argument.
  """
  first = next(iter(call.inputs(*args, **kwargs)))

  def changed(name, a):
    return fn(a) if name == first else other(name, a)

  return call.changed(args, kwargs, changed)
