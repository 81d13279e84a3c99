"""Trains arrays that the model already has: a head, biases, norms, whole blocks, everything.

BitFit: Ben Zaken et al., 2022 (arXiv 2106.10199). Norm tuning: Giannou et al., 2023 (2302.07937).
"""

import re

import jax.numpy as jnp

from jpeft.core import FULL_CROSSING, NO_BACKPROP, Method, Weight, at, factory


@factory
def tune(
  targets: str,
  arrays: str = '.*',
  name: str = 'tune',
  memory: str = FULL_CROSSING,
  head: bool = False,
) -> Method:
  """Trains a site's own arrays: theta is a float32 copy that stands in for them.

  Args:
    targets: pattern of sites, such as '{head}' or '{block}/.*'.
    arrays: regex of the names of the arrays to train, such as 'bias'.
    name: in theta.
    memory: the memory class; 'no backbone backprop' where nothing before the sites is trained.
    head: whether the model's head is among them.
  """
  pattern = re.compile(arrays)

  def init(key, site, arrays):
    theta = {}
    for array, leaf in site.leaves.items():
      if pattern.fullmatch(array) and jnp.issubdtype(leaf.dtype, jnp.floating):
        # Small updates are lost in bfloat16, so theta has at least float32.
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        theta[array] = arrays[array].astype(dtype)
    return theta

  def apply(theta, site, arrays):
    return theta

  return at(targets, Weight(name, init, apply, memory=memory, head=head))


@factory
def linear(name: str = 'head') -> Method:
  """A linear probe: trains the head alone."""
  return tune('{head}', name=name, memory=NO_BACKPROP, head=True)


@factory
def full(name: str = 'full') -> Method:
  """Full fine-tuning: trains every array of the model."""
  return tune('.*', name=name, head=True)


@factory
def bitfit(targets: str = '{block}(?:/.*)?', name: str = 'bitfit') -> Method:
  """BitFit (arXiv 2106.10199): trains the biases.

  Args:
    targets: where; by default in all blocks, '.*' for the whole model.
    name: in theta.
  """
  return tune(targets, 'bias', name)


@factory
def norm(targets: str = '{norm}|{final_norm}', name: str = 'norm') -> Method:
  """Norm tuning (arXiv 2302.07937): trains the scales and shifts of the normalisation layers."""
  return tune(targets, name=name)
