"""Structural pruning: narrow blocks cut out of a backbone's own weights.

Sung et al., 2022 (arXiv 2206.06522), after the structural pruning of Li et al., 2017 (arXiv
1608.08710): the rows of each matrix with the largest scores are kept, in forward order, and what
one matrix keeps of its output is what the next keeps of its input. Indices of the residual stream
are not tied between layers.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jpeft.core import Site
from jpeft.cutting import cut_map, kernel_of

# Scores.


def fisher(loss: Callable[[Any, Any], jax.Array], params: Any, samples: Iterable[Any]) -> Any:
  """The empirical Fisher information: the sum over samples of the squared gradient of the loss.

  Args:
    loss: (params, sample) -> scalar, of the plain backbone on one sample with its true label.
    params: the tree to score.
    samples: such as 1,024 training examples, each a batch of one.

  Returns:
    A tree like params.
  """

  def add_square(total, gradient):
    return total + jnp.square(gradient.astype(jnp.float32))

  @jax.jit
  def add_sample(total, sample):
    return jax.tree.map(add_square, total, jax.grad(loss)(params, sample))

  total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  for sample in samples:
    total = add_sample(total, sample)
  return total


def flatten(scores: Mapping[str, Any]) -> dict[str, jax.Array]:
  """A tree of scores like the backbone's variables, or like its parameters, as {path: scores}."""
  params = scores.get('params', scores)
  return traverse_util.flatten_dict(dict(params), sep='/')


def float32(tree: Any) -> Any:
  """A tree of arrays in float32, or in their own type where it is wider."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def keep_count(n: int, reduction: float) -> int:
  """How many of n rows stay: n - round(n (1 - 1/r)), half to even, at least one."""
  return max(1, n - round(n * (1 - 1 / reduction)))


def keep_rows(scores: jax.Array, count: int) -> jax.Array:
  """The indices of the `count` largest scores [n], ascending."""
  _, indices = jax.lax.top_k(scores, count)
  return jnp.sort(indices)


# All blocks of a side network.


def prune_ladder(
  net, arrays: Mapping[str, jax.Array], scores: Mapping[str, jax.Array]
) -> tuple[list[Any], jax.Array]:
  """The side blocks of a ladder, cut from the backbone's blocks beside them.

  Args:
    net: the `Ladder`.
    arrays: {path: array} of the backbone.
    scores: {path: importance} of these.

  Returns:
    (the parameters of each side block, the indices of the stream that the last one keeps).
  """
  narrow = traverse_util.flatten_dict(jax.eval_shape(net.fresh, jax.random.key(0)), sep='/')
  kept = _kept_before(net, arrays, scores)
  pruned = []
  for i in net.layers:
    block, index = net.layer(i)
    prefix = f'{block.path}/'
    sites = [s for s in net.site.model.values() if s.leaves and s.path.startswith(prefix)]
    shapes = {}
    for site in sites:
      local = site.path.removeprefix(prefix)
      shapes[site.path] = {name: narrow[f'{local}/{name}'].shape for name in site.leaves}
    of_layer = _of_layer(arrays, sites, index)
    scores_of_layer = _of_layer(scores, sites, index)
    cut, kept = prune_block(sites, of_layer, scores_of_layer, shapes, kept)
    flat = {}
    for path, own in cut.items():
      for name, x in own.items():
        flat[f'{path.removeprefix(prefix)}/{name}'] = x
    pruned.append(float32(traverse_util.unflatten_dict(flat, sep='/')))
  return pruned, kept


def _of_layer(
  arrays: Mapping[str, jax.Array], sites: list[Site], index: int
) -> dict[str, dict[str, jax.Array]]:
  """{site path: {name: array}} of one layer of the sites of a block."""
  found = {}
  for site in sites:
    found[site.path] = {n: site.take(arrays[f'{site.path}/{n}'], index) for n in site.leaves}
  return found


def _kept_before(
  net, arrays: Mapping[str, jax.Array], scores: Mapping[str, jax.Array]
) -> jax.Array:
  """The indices that the first block keeps of its input: the best columns of the embedding, or in
  a decoder those that the encoder kept last.
  """
  if net.encoder is not None:
    encoder = dataclasses.replace(net, site=net.encoder)
    _, kept = prune_ladder(encoder, arrays, scores)
    return kept
  tables = []
  for site in net.site.model.find('(?:{embed})(?:/.*)?'):
    for name, leaf in site.leaves.items():
      makes_tokens = leaf.use in ('gather', 'conv_general_dilated')
      if makes_tokens and leaf.shape[-1] == net.width:
        tables.append(f'{site.path}/{name}')
  if not tables:
    raise ValueError("prune: found no embedding of the blocks' width at the role {embed}")
  columns = jnp.sum(jnp.abs(scores[tables[0]]).reshape(-1, net.width), 0)
  return keep_rows(columns, keep_count(net.width, net.reduction))


def check_alike(blocks: Sequence[Site]) -> None:
  """Raises a ValueError if blocks, which are cut to one size, have different sizes themselves."""

  def shapes_in(block: Site) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, site in block.model.items():
      if path.startswith(f'{block.path}/'):
        local = path.removeprefix(block.path)
        found |= {f'{local}/{name}': leaf.shape for name, leaf in site.leaves.items()}
    return found

  first = shapes_in(blocks[0])
  for block in blocks[1:]:
    if shapes_in(block) != first:
      raise ValueError(
        f'prune cuts all side blocks to one size, and the blocks {blocks[0].path!r} and '
        f'{block.path!r} have different sizes; use prune=None'
      )


# One block.


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
    rows = _rows_of(group, scores, shapes, kept)
    for site in group:
      pruned[site.path] = cut_map(site, arrays[site.path], shapes[site.path], kept, rows)
    kept = rows
  return pruned, kept


def _rows_of(
  group: list[Site], scores: dict[str, dict], shapes: dict[str, dict], kept: jax.Array
) -> jax.Array:
  """The indices that linear maps keep of their output, one choice for the group."""
  importance = 1.0
  for site in group:
    name, leaf = kernel_of(site)
    folded = leaf.fold(scores[site.path][name])  # [fan_in, fan_out]
    importance = importance * jnp.take(folded, kept, 0)
  first = group[0]
  name, leaf = kernel_of(first)
  narrow = shapes[first.path][name]
  count = math.prod(narrow[i] for i in leaf.outs)
  return keep_rows(jnp.sum(jnp.abs(importance), 0), count)


def _groups(sites: list[Site]) -> list[list[Site]]:
  """Sites in forward order; those that share rows (q, k and v; the two halves of a gated unit) as
  one.
  """
  groups: list[list[Site]] = []
  for site in sites:
    if groups and _share_rows(groups[-1][-1], site):
      groups[-1].append(site)
    else:
      groups.append([site])
  return groups


def _share_rows(a: Site, b: Site) -> bool:
  """Whether one choice of rows is made for both: they stand in one module, with roles that go
  together.
  """
  anatomy = a.model.anatomy
  if anatomy is None or a.path.rpartition('/')[0] != b.path.rpartition('/')[0]:
    return False
  together = (('q', 'k', 'v'), ('fc1',))
  for roles in together:
    pattern = '|'.join(anatomy.role(role) for role in roles if role in anatomy.roles)
    if pattern and re.fullmatch(pattern, a.path) and re.fullmatch(pattern, b.path):
      return True
  return False
