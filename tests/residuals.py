"""What a backward pass keeps, read from the traced program: nothing is compiled or computed."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def residuals(fn: Callable[..., Any], theta: Any, *rest: Any, given: bool = True) -> list[jax.core.ShapedArray]:
  """The arrays that the vjp of a function in its first argument keeps, each once.

  Args:
    fn: of theta and the rest.
    theta: trees of arrays, or of shapes, as the rest are.
    *rest: its other arguments.
    given: those among them that are arguments of the function, too.
  """
  program = jax.make_jaxpr(lambda theta, *rest: jax.vjp(lambda theta: fn(theta, *rest), theta)[1])(theta, *rest).jaxpr
  inputs = {id(x) for x in (*program.invars, *program.constvars)}
  kept = {id(x): x.aval for x in program.outvars if not isinstance(x, Literal) and (given or id(x) not in inputs)}
  return list(kept.values())


def nbytes(kept: list[jax.core.ShapedArray]) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
