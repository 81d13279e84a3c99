"""The arguments of an example call, with shapes in place of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def spec_of(x) -> jax.ShapeDtypeStruct:
  """The shape and dtype of an array."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def specs_of(inputs) -> Any:
  """The arguments of a call with shapes in place of arrays; a flag, a number or None stays."""
  return jax.tree.map(lambda x: spec_of(x) if _is_array(x) else x, inputs)


def taken_apart(inputs) -> tuple[dict[int, jax.ShapeDtypeStruct], Callable[[dict], Any]]:
  """(the shapes of the arrays among the arguments of a call, a function that puts arrays there).

  What is no array keeps its value, and is not traced.
  """
  leaves, tree = jax.tree.flatten(inputs)
  arrays = {i: spec_of(x) for i, x in enumerate(leaves) if _is_array(x)}

  def put(arrays: dict) -> Any:
    return tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])

  return arrays, put


def _is_array(x) -> bool:
  return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
