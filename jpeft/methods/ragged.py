"""Theta of a scanned stack whose layers train unlike numbers: stored without what is not trained.

In a stack every layer has arrays of one shape, so that what a layer has less of is filled up. Here
the optimizer sees the numbers that count alone, one array for a stack, and the rules read the
filled arrays, whose other numbers are 0.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jpeft.core import Method, Site, generated

# {'entry of a site's theta': indices [layers, ...] of what is trained in it, as of `np.nonzero`}.
Live = Mapping[str, tuple[np.ndarray, ...]]


def slots(layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where the numbers of a stack are, of which each layer's stand at its front.

  Args:
    layer: of each number, rising.

  Returns:
    (layer, its number among those of that layer).
  """
  counts = np.unique(layer, return_counts=True)[1]
  return layer, np.concatenate([np.arange(count) for count in counts])


def ragged(method: Method, live: Mapping[str, Live]) -> Method:
  """The method, with a theta of live numbers alone.

  Args:
    method: of one name.
    live: {path of a stacked site: {entry: where its numbers are trained}}. Entries that it does not
      name, and sites outside of stacks, stay as they are.
  """

  def index_of(path: str, entry: str) -> tuple[np.ndarray, ...] | None:
    return live.get(path, {}).get(entry)

  def start(key, places):
    whole: dict[str, Any] = {}
    shared = {}
    for path, place in places.items():
      own = {}
      for entry, x in traverse_util.flatten_dict(place.t, sep='/').items():
        index = index_of(path, entry)
        if index is None:
          own[entry] = x
        else:
          shared[f'{path}/{entry}'] = _live(place.site, x, index)
      if own:
        whole[path] = traverse_util.unflatten_dict(own, sep='/')
    if shared:
      whole[''] = shared
    return whole

  def expand(t, places):
    made = {}
    for path, place in places.items():
      own = traverse_util.flatten_dict(dict(t.get(path, {})), sep='/')
      entries = {}
      for entry, like in traverse_util.flatten_dict(dict(place.t), sep='/').items():
        index = index_of(path, entry)
        if index is None:
          entries[entry] = own[entry]
        else:
          entries[entry] = _filled(place.site, t[''][f'{path}/{entry}'], like, index)
      made[path] = traverse_util.unflatten_dict(entries, sep='/')
    return made

  return generated(method, start, expand)


def _live(site: Site, x: jax.Array, index: tuple[np.ndarray, ...]) -> jax.Array:
  """What is trained of the array of a stack: one axis of live layers or numbers, and the rest.

  Vectors of several layers are one vector, so that no optimizer takes them for a matrix.
  """
  stack = len(site.theta_lengths)
  layers = x.reshape(math.prod(site.theta_lengths), *x.shape[stack:])[index]
  return layers.reshape(-1) if x.ndim - stack < 2 else layers


def _filled(site: Site, x: jax.Array, like, index: tuple[np.ndarray, ...]) -> jax.Array:
  """The array of a stack, of the shape of `like`, from what `_live` took."""
  stack = len(site.theta_lengths)
  layers = jnp.zeros((math.prod(site.theta_lengths), *like.shape[stack:]), x.dtype)
  return layers.at[index].set(x.reshape(layers[index].shape)).reshape(like.shape)
