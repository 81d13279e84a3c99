"""What a backward pass keeps, read from the traced program: nothing is compiled or computed."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def residuals(
  fn: Callable[..., Any], theta: Any, *rest: Any, weights: Any = (), given: bool = True
) -> list[jax.core.ShapedArray]:
  """The arrays that the vjp of a function in its first argument keeps, each once.

  Args:
    fn: of theta and the rest.
    theta: trees of arrays, or of shapes, as the rest are.
    *rest: its other arguments.
    weights: arrays of their shapes and dtypes are not counted.
    given: whether an argument that is kept as it is counts.
  """
  program = jax.make_jaxpr(lambda theta, *rest: jax.vjp(lambda theta: fn(theta, *rest), theta)[1])(
    theta, *rest
  ).jaxpr
  own = {(x.shape, x.dtype) for x in jax.tree.leaves(weights)}
  kept = {
    id(x): x.aval
    for x in program.outvars
    if not isinstance(x, Literal) and (x.aval.shape, x.aval.dtype) not in own
  }
  for x in () if given else (*program.invars, *program.constvars):
    kept.pop(id(x), None)
  return list(kept.values())
