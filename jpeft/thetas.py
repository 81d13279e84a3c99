"""Arithmetic on trained thetas: sums, means, differences, parts, other ranks.

A theta is {method name: {site path: arrays}}. Two of one method and one model have the same
structure, so that they are added and averaged as vectors are. Integers and booleans are state
(which rows are trained, say) and not added: they must be equal in all.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Rule, Site, Tuned, Weight, leaf_paths
from jpeft.messages import did_you_mean


def add(*thetas: Any) -> Any:
  """The sum of thetas.

  Raises:
    ValueError: they differ in structure, shapes or integers; the first path that does is named.
  """
  return _weighted(thetas, [1.0] * len(thetas))


def scale(theta: Any, factor: float) -> Any:
  """A theta whose floats are multiplied by a number."""
  return _weighted([theta], [factor])


def subtract(one: Any, other: Any) -> Any:
  """The difference of two thetas, such as what a training moved ("task vector", arXiv 2212.04089).

  Raises:
    ValueError: as `add`.
  """
  return _weighted([one, other], [1.0, -1.0])


def average(thetas: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
  """The mean of thetas.

  Args:
    thetas: of one method on one model.
    weights: of each; alike if left out. They need not sum to 1.

  Raises:
    ValueError: as `add`; no theta, another number of weights, or weights that sum to 0.
  """
  if weights is None:
    weights = [1.0] * len(thetas)
  if len(thetas) != len(weights) or not thetas:
    raise ValueError(f'average: {len(thetas)} thetas and {len(weights)} weights')
  total = sum(weights)
  if total == 0:
    raise ValueError('average: the weights sum to 0')
  return _weighted(thetas, [weight / total for weight in weights])


def fisher_average(thetas: Sequence[Any], fishers: Sequence[Any], eps: float = 1e-10) -> Any:
  """The mean of thetas, each number weighted by its Fisher information (arXiv 2111.09832).

  Args:
    thetas: of one method on one model.
    fishers: for each theta a tree like it: squared gradients, averaged over examples. None stands
      for entries that are not trained (see `Tuned.split`): their plain mean is taken.
    eps: added to every weight: where no theta has information, the plain mean is taken.

  Raises:
    ValueError: as `add`, or another number of fishers.
  """
  if len(thetas) != len(fishers) or not thetas:
    raise ValueError(f'fisher_average: {len(thetas)} thetas and {len(fishers)} fishers')
  _check_alike(thetas)
  ones = jax.tree.map(jnp.ones_like, thetas[0])

  def filled(fisher):
    return jax.tree.map(lambda f, one: one if f is None else f, fisher, ones, is_leaf=_is_none)

  weights = [filled(fisher) for fisher in fishers]

  def mean(first, *rest):
    values = (first, *rest[: len(thetas) - 1])
    if not _is_float(first):
      return first
    shares = [weight + eps for weight in rest[len(thetas) - 1 :]]
    return sum(x * share for x, share in zip(values, shares, strict=True)) / sum(shares)

  return jax.tree.map(mean, *thetas, *weights)


def stack(thetas: Sequence[Any]) -> Any:
  """Several thetas as one tree, each array led by their number, for `Tuned.apply_each`.

  State may differ between them.

  Raises:
    ValueError: no theta, or they differ in structure or shapes.
  """
  if not thetas:
    raise ValueError('stack: no theta is given')
  _check_shapes(thetas)
  return jax.tree.map(lambda *x: jnp.stack(x), *thetas)


def only(theta: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """The parts of a theta that belong to some of its adapters.

  Raises:
    ValueError: it has no adapter of such a name.
  """
  _check_names(theta, names)
  return {name: theta[name] for name in names}


def drop(theta: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """A theta without some of its adapters, such as the head of a task.

  Raises:
    ValueError: it has no adapter of such a name.
  """
  _check_names(theta, names)
  return {name: theta[name] for name in theta if name not in names}


def _check_names(theta: Mapping[str, Any], names: Sequence[str]) -> None:
  for name in names:
    if name not in theta:
      hint = did_you_mean(name, theta)
      raise ValueError(f'theta has no adapter {name!r}, only {", ".join(theta)}{hint}')


# ---- Low-rank pairs: a [fan_in, r] and b [r, fan_out], of which s a b is added to a matrix.


def re_rank(tuned: Tuned, theta: Any, target: Tuned, fresh: Any = None) -> dict[str, Any]:
  """theta of a low-rank method as theta of the same method with another rank.

  A lower rank is cut out by the SVD of a b, which is not formed: the nearest product of that rank
  in the Frobenius norm. To a higher rank a and b stay, and what is new adds nothing. The factors s
  of the two methods (LoRA's alpha / r) may differ: b is scaled for it.

  Args:
    tuned: what theta is of.
    theta: its arrays other than pairs are taken as they are.
    target: the same model under the other method, such as lora(4) where `tuned` has lora(8).
    fresh: `target.init(...)`: where the directions that a higher rank adds start, so that they can
      be trained. Without it they are zero, and no gradient moves a pair of zeros.

  Raises:
    ValueError: a rule does more than add a multiple of a b (DoRA, PiSSA), or the two methods differ
      in more than ranks and factors.
  """

  def joined(pairs, rank):
    ((a, b),) = pairs
    if a.shape[-1] > rank:
      return _truncated(a, b, rank)
    return a, b

  return _with_pairs(tuned, [theta], target, fresh, joined)


def concat(tuned: Tuned, thetas: Sequence[Any], target: Tuned, fresh: Any = None) -> dict[str, Any]:
  """One theta that adds to each matrix exactly what several thetas add together.

  Args:
    tuned: what the thetas are of.
    thetas: what is no pair, such as a head, must be equal in all (see `drop`).
    target: the same model under the method with the sum of the ranks, or a higher one.
    fresh: as for `re_rank`.

  Raises:
    ValueError: as `re_rank`; there is no theta, or a lower rank in the target.
  """
  if not thetas:
    raise ValueError('concat: there is no theta')

  def joined(pairs, rank):
    a = jnp.concatenate([a for a, _ in pairs], -1)
    b = jnp.concatenate([b for _, b in pairs], -2)
    if a.shape[-1] > rank:
      raise ValueError(
        f'concat: the ranks sum to {a.shape[-1]} and the target has rank {rank}: give a target of '
        'that rank, and cut its theta by re_rank'
      )
    return a, b

  return _with_pairs(tuned, thetas, target, fresh, joined)


def _with_pairs(
  tuned: Tuned, thetas: Sequence[Any], target: Tuned, fresh: Any, joined: Callable
) -> dict[str, Any]:
  """theta of `target` from thetas of `tuned`.

  Args:
    tuned, thetas, target, fresh: see `concat`.
    joined: (pairs (a, b) of one matrix, the rank of the target) -> one pair, of that rank at most.
  """
  wanted = _entries(target.shapes)
  given = [_entries(theta) for theta in thetas]
  for entries in given:
    for where in sorted(entries.keys() ^ wanted.keys()):
      raise ValueError(f'{_path(where)!r} is in theta or in the target, and not in both')
  starts = None if fresh is None else _entries(fresh)
  found: dict[str, Any] = {}
  for where, like in wanted.items():
    name, path, array = where
    old, old_site = _rule(tuned, name, path)
    new, new_site = _rule(target, name, path)
    parts = [entries[where] for entries in given]
    if _is_pair(like) and isinstance(old, Weight) and isinstance(new, Weight):
      pair = joined([(t['a'], t['b']) for t in parts], like['a'].shape[-1])
      factor = _factor(old, old_site, where, parts[0]) / _factor(new, new_site, where, like)
      entry = _filled_up(pair, factor, like, where, starts)
    else:
      _check_kept(old, new, parts, where)
      entry = parts[0]
    found.setdefault(name, {}).setdefault(path, {})[array] = entry
  _check_fits(found, target.shapes)
  return found


# (name of an adapter, path of a site, name of an array or of an entry).
_Where = tuple[str, str, str]


def _entries(theta: Any) -> dict[_Where, Any]:
  found = {}
  for name, sites in theta.items():
    for path, arrays in sites.items():
      for array, entry in arrays.items():
        found[name, path, array] = entry
  return found


def _path(where: _Where) -> str:
  return '/'.join(where)


def _rule(tuned: Tuned, name: str, path: str) -> tuple[Rule, Site]:
  """The first rule of a name at a site."""
  for rule, site in tuned.rules:
    if (rule.name, site.path) == (name, path):
      return rule, site
  raise ValueError(f'no rule {name!r} acts at {path!r}: is theta of this method?')


def _is_pair(entry: Any) -> bool:
  """Whether an entry of theta is a [..., fan_in, r] and b [..., r, fan_out], and nothing else."""
  if not isinstance(entry, Mapping) or set(entry) != {'a', 'b'}:
    return False
  a, b = entry['a'].shape, entry['b'].shape
  return len(a) == len(b) > 1 and a[-1] == b[-2]


def _factor(rule: Weight, site: Site, where: _Where, pair: Any) -> float:
  """s of the rule that makes w + s a b of a matrix w, asked of the rule itself on a small matrix.

  Raises:
    ValueError: the rule does something else.
  """
  array, rank = where[2], pair['a'].shape[-1]
  if array in site.leaves and not rule.outer:
    rng = np.random.default_rng(0)
    shapes = ((2, 3), (2, rank), (rank, 3))
    w, a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    with jax.default_matmul_precision('highest'):
      added = on_matrix(rule, site, array, {'a': a, 'b': b}, w) - w
      product = a @ b
    factor = float(jnp.sum(added * product) / jnp.sum(product**2))
    if factor != 0 and np.allclose(added, factor * product, rtol=1e-3, atol=1e-3 * abs(factor)):
      return factor
  raise ValueError(f'{_path(where)!r}: {rule.name} does not add a multiple of a b to a matrix')


def on_matrix(rule: Weight, site: Site, array: str, t: Any, w: jax.Array) -> jax.Array:
  """What a rule makes of any matrix w in the place of an array of a site.

  Args:
    rule: it acts on matrices alone.
    site: that owns the array.
    array: its name; of a kernel, or of a table whose rows are gathered.
    t: the rule's theta for w.
    w: [fan_in, fan_out].
  """
  leaf = dataclasses.replace(site.leaves[array], shape=w.shape, ins=(0,), batch=())
  small = dataclasses.replace(site, leaves={array: leaf}, boxes={})
  with jax.default_matmul_precision('highest'):
    return rule.apply({array: t}, small, {array: w})[array]


def _truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """The nearest product of a rank to a b, by QR of both factors and the SVD of an r x r core."""
  with jax.default_matmul_precision('highest'):
    q_a, r_a = jnp.linalg.qr(a.astype(jnp.float32))
    q_b, r_b = jnp.linalg.qr(_transposed(b).astype(jnp.float32))
    u, s, vt = jnp.linalg.svd(r_a @ _transposed(r_b), full_matrices=False)
    root = jnp.sqrt(s[..., None, :rank])
    left = q_a @ (u[..., :rank] * root)
    right = q_b @ (_transposed(vt[..., :rank, :]) * root)
  return left.astype(a.dtype), _transposed(right).astype(b.dtype)


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _filled_up(pair, factor: float, like, where: _Where, starts) -> dict[str, jax.Array]:
  """A pair whose b is multiplied by a factor, with further directions up to the rank of `like`."""
  a, b = pair
  rank, full = a.shape[-1], like['a'].shape[-1]
  more_a = jnp.zeros((*a.shape[:-1], full - rank), a.dtype)
  more_b = jnp.zeros((*b.shape[:-2], full - rank, b.shape[-1]), b.dtype)
  if starts is not None:
    start = starts[where]
    more_a, more_b = start['a'][..., rank:], start['b'][..., rank:, :]
    if jnp.any(more_a) and jnp.any(more_b):
      raise ValueError(
        f'{_path(where)!r}: what `fresh` has there is not zero: give it as `target.init` does'
      )
  a = jnp.concatenate([a, more_a.astype(a.dtype)], -1)
  b = jnp.concatenate([(factor * b).astype(b.dtype), more_b.astype(b.dtype)], -2)
  return {'a': a, 'b': b}


def _check_kept(old: Rule, new: Rule, parts: Sequence[Any], where: _Where) -> None:
  """Raises a ValueError if an entry that is no pair cannot be taken as it is."""
  if old.origin is not None and old != new:
    inside = ', '.join(parts[0]) if isinstance(parts[0], Mapping) else where[2]
    raise ValueError(
      f'{_path(where)!r} ({inside}) is no pair of a and b alone, and its methods differ: '
      f'{old.origin}, and {new.origin} in the target'
    )
  first = leaf_paths(parts[0])
  for part in parts[1:]:
    for inside, x in leaf_paths(part).items():
      if not np.array_equal(x, first[inside]):
        raise ValueError(f'{_path(where)!r} differs between thetas, and is no pair of a and b')


def _check_fits(theta: Any, shapes: Any) -> None:
  """Raises a ValueError that names the first array of another shape or dtype."""
  found = leaf_paths(theta)
  for path, like in leaf_paths(shapes).items():
    if path not in found or (found[path].shape, found[path].dtype) != (like.shape, like.dtype):
      raise ValueError(f'{path!r} of theta does not fit the target, which has {like.shape} there')


def _weighted(thetas: Sequence[Any], weights: Sequence[float]) -> Any:
  _check_alike(thetas)

  def total(*values):
    if not _is_float(values[0]):
      return values[0]
    return sum(weight * x for weight, x in zip(weights, values, strict=True))

  return jax.tree.map(total, *thetas)


def _check_shapes(thetas: Sequence[Any]) -> None:
  """Raises a ValueError that names the first entry whose shape differs, or that one theta lacks."""
  first = leaf_paths(thetas[0])
  for theta in thetas[1:]:
    other = leaf_paths(theta)
    for path in sorted(first.keys() ^ other.keys()):
      raise ValueError(f'{path!r} is in one theta and not in another: are they of one method?')
    for path, x in first.items():
      if jnp.shape(x) != jnp.shape(other[path]):
        raise ValueError(
          f'{path!r} has the shape {jnp.shape(x)} in one theta and '
          f'{jnp.shape(other[path])} in another'
        )


def _check_alike(thetas: Sequence[Any]) -> None:
  """Raises a ValueError that names the first entry in which thetas differ, state included."""
  _check_shapes(thetas)
  first = leaf_paths(thetas[0])
  for theta in thetas[1:]:
    other = leaf_paths(theta)
    for path, x in first.items():
      if not _is_float(x) and np.any(np.asarray(x) != np.asarray(other[path])):
        raise ValueError(f'{path!r} is state and differs between thetas: it has no sum')


def _is_float(x) -> bool:
  return jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)


def _is_none(x) -> bool:
  return x is None
