"""What a custom_vjp needs: its parts are traced later, and may not close over traced arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from .equations import hoisted


class Traced:
  """A function that returns one array, traced: `traced(consts, *args)`.

  Attributes:
    consts: the arrays that the function closes over.
  """

  def __init__(self, fn: Callable, *shapes):
    """Traces `fn` for arguments of some shapes, each a tree."""
    jaxpr, self.consts = hoisted(jax.make_jaxpr(fn)(*shapes))
    self._run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))

  def __call__(self, consts, *args) -> jax.Array:
    (y,) = self._run(*consts, *jax.tree.leaves(args))
    return y


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Static:
  """What the forward pass gives the backward pass beside arrays."""

  value: Any


def has_gradient(pair) -> bool:
  """Whether an input of a custom_vjp with symbolic zeros is one that a gradient flows into."""
  return pair.perturbed and jnp.issubdtype(pair.value.dtype, jnp.inexact)


def plain_zero(cotangent):
  """A cotangent of a custom_vjp with symbolic zeros, as an array where it is such a zero."""
  if isinstance(cotangent, SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def vjp_in(
  fn: Callable[..., Any], values: Sequence[Any], own: Sequence[int], *args: Any
) -> tuple[Any, Callable]:
  """`jax.vjp` of fn(values, *args) in some of the values, and in args.

  Args:
    fn: of a list of values, and args.
    values: arrays.
    own: numbers of the values that have a gradient.
    *args: arrays.

  Returns:
    (fn(values, *args), cotangent -> (gradients of the values `own`, *those of args)).
  """

  def run(chosen, *args):
    replaced = dict(zip(own, chosen, strict=True))
    return fn([replaced.get(n, value) for n, value in enumerate(values)], *args)

  return jax.vjp(run, [values[n] for n in own], *args)
