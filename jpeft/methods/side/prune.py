"""Structural pruning: narrow blocks cut out of a backbone's own weights.

Sung et al., 2022 (arXiv 2206.06522), after the structural pruning of Li et al., 2017 (arXiv
1608.08710): the rows of each matrix with the largest scores are kept, in forward order, and what
one matrix keeps of its output is what the next keeps of its input. Indices of the residual stream
are not tied between layers.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import Site


def keep_count(n: int, reduction: float) -> int:
  """How many of n rows stay: n - round(n (1 - 1/r)), half to even, at least one."""
  return max(1, n - round(n * (1 - 1 / reduction)))


def keep_rows(scores: jax.Array, count: int) -> jax.Array:
  """The indices of the `count` largest scores [n], ascending."""
  return jnp.sort(jax.lax.top_k(scores, count)[1])


def fisher(loss: Callable[[Any, Any], jax.Array], params: Any, samples: Iterable[Any]) -> Any:
  """The empirical Fisher information: the sum over samples of the squared gradient of the loss.

  Args:
    loss: (params, sample) -> scalar, of the plain backbone on one sample with its true label.
    params: the tree to score.
    samples: such as 1,024 training examples, each a batch of one.

  Returns:
    A tree like params.
  """
  square = jax.jit(
    lambda total, sample: jax.tree.map(
      lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, jax.grad(loss)(params, sample)
    )
  )
  total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  for sample in samples:
    total = square(total, sample)
  return total


def prune_block(
  sites: list[Site],
  arrays: dict[str, dict],
  scores: dict[str, dict],
  shapes: dict[str, dict],
  kept: jax.Array,
) -> tuple[dict[str, dict], jax.Array]:
  """The arrays of one narrow block.

  Args:
    sites: the modules of the block that own arrays, in the order of the forward pass.
    arrays: {site path: {name: array}} of this layer.
    scores: {site path: {name: importance}} of this layer.
    shapes: {site path: {name: shape}} of the narrow block.
    kept: indices of the residual stream that the block's input keeps.

  Returns:
    (arrays of the narrow block, the indices that its output keeps).

  Raises:
    ValueError: a site has arrays that are neither a linear map's nor a vector of the stream.
  """
  pruned = {}
  for group in _groups(sites):
    if not group[0].matrices:  # a norm or a layer scale follows the stream
      (site,) = group
      if any(len(leaf.shape) != 1 for leaf in site.leaves.values()):
        raise ValueError(
          f'{site.kind} at {site.path!r} cannot be pruned; use another initialisation'
        )
      pruned[site.path] = {n: jnp.take(x, kept) for n, x in arrays[site.path].items()}
      continue
    importance = 1.0
    for site in group:
      (name,) = site.matrices
      importance = importance * jnp.take(site.leaves[name].fold(scores[site.path][name]), kept, 0)
    narrow = {site.path: shapes[site.path][site.matrices[0]] for site in group}
    count = math.prod(narrow[group[0].path][i] for i in group[0].leaves[group[0].matrices[0]].outs)
    rows = keep_rows(jnp.sum(jnp.abs(importance), 0), count)
    for site in group:
      (name,), own = site.matrices, arrays[site.path]
      leaf = site.leaves[name]
      cut = jnp.take(jnp.take(leaf.fold(own[name]), kept, 0), rows, 1)
      pruned[site.path] = {name: dataclasses.replace(leaf, shape=narrow[site.path]).unfold(cut)}
      for other in set(own) - {name}:
        pruned[site.path][other] = jnp.take(own[other].reshape(-1), rows).reshape(
          shapes[site.path][other]
        )
    kept = rows
  return pruned, kept


def _groups(sites: list[Site]) -> list[list[Site]]:
  """Sites in forward order; those that share rows (q, k and v; the two halves of a gated unit) as
  one.
  """
  groups: list[list[Site]] = []
  for site in sites:
    anatomy, mate = site.model.anatomy, groups[-1][-1] if groups else None
    together = mate is not None and any(
      re.fullmatch(pattern, site.path)
      and re.fullmatch(pattern, mate.path)
      and site.path.rpartition('/')[0] == mate.path.rpartition('/')[0]
      for pattern in _shared(anatomy)
    )
    groups[-1].append(site) if together else groups.append([site])
  return groups


def _shared(anatomy) -> list[str]:
  if anatomy is None:
    return []
  qkv = [anatomy.roles[r] for r in 'qkv' if r in anatomy.roles]
  return ['|'.join(qkv)] * bool(qkv) + [anatomy.roles[r] for r in ('fc1',) if r in anatomy.roles]
