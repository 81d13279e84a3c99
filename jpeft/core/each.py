"""A theta for each example of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .example import taken_apart


def apply_each(
  apply: Callable,
  thetas,
  index: jax.Array,
  backbone,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  rngs,
):
  """The outputs of a batch, each example under its own theta; see `Tuned.apply_each`.

  Each is a batch of one under `jax.vmap`: a product with the backbone, which is not mapped over,
  becomes one product for all of them.
  """
  for option in ('aux', 'mutable'):
    if kwargs.get(option):
      raise ValueError(f'apply_each gives the output alone: {option}= is not taken')
  count = index.shape[0]
  arrays, put = taken_apart((args, kwargs))
  leaves = jax.tree.leaves((args, kwargs))
  examples = {i: leaves[i] for i, x in arrays.items() if x.shape[:1] == (count,)}
  others = {i: leaves[i] for i in arrays if i not in examples}
  if not examples:
    raise ValueError(f'apply_each: index names {count} examples, and no argument leads with that')
  keys = jax.tree.map(lambda key: jax.random.split(key, count), rngs)

  def one(theta, keys, example):
    batch = {i: jnp.asarray(x)[None] for i, x in example.items()}
    own_args, own_kwargs = put(others | batch)
    if keys is not None:
      own_kwargs = own_kwargs | {'rngs': keys}
    out = apply(theta, backbone, *own_args, **own_kwargs)
    for y in jax.tree.leaves(out):
      if y.shape[:1] != (1,):
        raise ValueError(f'apply_each: an output {y.shape} of one example has no axis of examples')
    return jax.tree.map(lambda y: y[0], out)

  chosen = jax.tree.map(lambda x: x[index], thetas)
  return jax.vmap(one)(chosen, keys, examples)
