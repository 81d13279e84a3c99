"""Arithmetic on trained thetas: sums, means, differences, parts.

A theta is {method name: {site path: arrays}}. Two of one method and one model have the same
structure, so that they are added and averaged as vectors are. Integers and booleans are state
(which rows are trained, say) and not added: they must be equal in all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import leaf_paths
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
  for name in names:
    if name not in theta:
      hint = did_you_mean(name, theta)
      raise ValueError(f'theta has no adapter {name!r}, only {", ".join(theta)}{hint}')
  return {name: theta[name] for name in names}


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
