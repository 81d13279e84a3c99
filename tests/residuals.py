"""What a backward pass keeps, read from the traced program: nothing is compiled or computed."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def residuals(fn: Callable[..., Any], theta: Any, *rest: Any) -> list[jax.core.ShapedArray]:
  """The arrays that the vjp of a function in its first argument keeps, each once; arguments may be shapes."""
  program = jax.make_jaxpr(lambda theta, *rest: jax.vjp(lambda theta: fn(theta, *rest), theta)[1])(theta, *rest).jaxpr
  return list({id(x): x.aval for x in program.outvars if not isinstance(x, Literal)}.values())


def nbytes(kept: list[jax.core.ShapedArray]) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
