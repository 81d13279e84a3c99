"""A method and what a folder says, compared by what the model computes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, Tuned, attach
from jpeft.models import Pretrained

# Of the largest output. Two ways to compute one function in float32 lie far below.
_APART = 1e-4


def check_outputs(
  acting: str, pretrained: Pretrained, tuned: Tuned, theta: Any, method: Method, own: Mapping
) -> None:
  """Raises a ValueError unless the model computes with a folder what it does with a method.

  Args:
    acting: what acts beside weights, for the message.
    pretrained: the backbone.
    tuned: the method on it.
    theta: of the method.
    method: of the folder.
    own: its theta.
  """
  if any(not hasattr(x, '__array__') for x in jax.tree.leaves(pretrained.variables)):
    raise ValueError(
      f'{acting} is compared with the folder by what the model computes: give the backbone itself, '
      'not its shapes'
    )
  inputs = _example(tuned)
  again = attach(pretrained.model, method, pretrained.variables, **inputs)
  want = jax.jit(tuned.apply)(theta, pretrained.variables, **inputs)
  found = jax.jit(again.apply)(own, pretrained.variables, **inputs)
  apart = float(jnp.abs(found - want).max() / jnp.abs(want).max())
  if not apart <= _APART:
    raise ValueError(
      f'{acting} does what the folder does not hold: with the folder the output differs by '
      f'{apart:.2g} of its largest entry'
    )


def _example(tuned: Tuned) -> dict[str, jax.Array]:
  """Arguments of the model in the shapes of `attach`: random words and pixels, all of them real."""
  rng = np.random.default_rng(0)
  found = {}
  for name, spec in tuned.sites[''].inputs.items():
    if 'tokens' in name:
      x = rng.integers(2, tuned.model.vocab, spec.shape)
    elif jnp.issubdtype(spec.dtype, jnp.floating):
      x = rng.standard_normal(spec.shape)
    else:
      x = np.full(spec.shape, int('mask' in name and name != 'masked'))
    found[name] = jnp.asarray(x, spec.dtype)
  return found
