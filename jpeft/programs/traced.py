"""What a custom_vjp needs: its parts are traced later, and may not close over traced arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
