"""Theta as matrices, for optimizers that act on one matrix at a time: GaLore, Muon and the like.

The matrices of theta are

  kernels          what stands for a kernel of the model, as in theta of `tune`: folded to
                   [fan_in, fan_out] whatever axes the layer gives it
  of a matrix rule what a rule written for one matrix has of two axes, such as LoRA's a and b
  others           what has two axes in one layer, such as the projections of an adapter

with the axes of a stack of layers and of a batch of kernels (experts) in front. Everything else
stays apart: vectors, scalars, integers, embedding tables, arrays of more axes that no product
reads.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jpeft.core import Leaf, Site, Tuned


def name_of(path) -> str:
  """A leaf of theta as one word: 'lora/encoder/block_0/attention/query/kernel/a'."""
  keys = [getattr(key, 'key', getattr(key, 'idx', key)) for key in path]
  return '/'.join(str(key) for key in keys if key != '')


# ---- One entry.


class _Entry(NamedTuple):
  """Where an entry of theta belongs.

  Attributes:
    site: of the rule that it is of.
    kernel: the array of the model that it stands for; None if it stands for none.
    lead: the sizes of its axes for layers of a stack and, in the theta of a rule that is written
      for one matrix, for matrices of a batch.
  """

  site: Site
  kernel: Leaf | None
  lead: tuple[int, ...]


def _entry(tuned: Tuned, path, shape: tuple[int, ...]) -> _Entry:
  rule, where, array, *inside = path
  site = tuned.site_of(rule.key, where.key)
  stack = site.theta_lengths
  in_layer = shape[len(stack) :]
  leaf = site.leaves.get(array.key)
  if leaf is None:
    return _Entry(site, None, stack)
  if not inside:
    return _Entry(site, leaf if in_layer == leaf.shape else None, stack)
  batch = tuple(leaf.shape[axis] for axis in leaf.batch)
  if leaf.is_matrix and in_layer[: len(batch)] == batch:
    return _Entry(site, None, stack + batch)
  return _Entry(site, None, stack)


def axes_of(tuned: Tuned, path, x) -> int:
  """How many axes an entry of theta has, without those of a stack and of a batch of matrices."""
  return x.ndim - len(_entry(tuned, path, x.shape).lead)


class _Matrix(NamedTuple):
  """How an entry of theta is seen as matrices.

  Attributes:
    entry: of theta.
    shape: as theta stores it.
  """

  entry: _Entry
  shape: tuple[int, ...]

  def fold(self, x: jax.Array) -> jax.Array:
    """[*lead, m, n] of an array of theta."""
    if self.entry.kernel is None:
      return x
    return self.entry.site.per_layer(self.entry.kernel.fold)(x)

  def unfold(self, m: jax.Array) -> jax.Array:
    """The inverse of `fold`; the leading axes may be one."""
    site, kernel, lead = self.entry
    if kernel is None:
      return m.reshape(self.shape)
    batch = [kernel.shape[axis] for axis in kernel.batch]
    return site.per_layer(kernel.unfold)(m.reshape(*lead, *batch, *m.shape[-2:]))


def _matrix(tuned: Tuned, path, x) -> _Matrix | None:
  """How an entry of theta is seen as matrices; None if it is none."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return None
  entry = _entry(tuned, path, x.shape)
  if entry.kernel is not None:
    return _Matrix(entry, x.shape) if entry.kernel.is_matrix else None
  return _Matrix(entry, x.shape) if x.ndim - len(entry.lead) == 2 else None


def _matrices(tuned: Tuned) -> dict[str, _Matrix]:
  """{name: how it is seen} of all matrices of theta."""
  found = {}
  for path, x in jax.tree_util.tree_flatten_with_path(tuned.shapes)[0]:
    matrix = _matrix(tuned, path, x)
    if matrix is not None:
      found[name_of(path)] = matrix
  return found


# ---- The whole of theta.


def fold(tuned: Tuned, theta) -> tuple[dict[str, jax.Array], Any]:
  """(matrices, rest) of theta, or of a tree like it.

  Args:
    tuned: from `attach`.
    theta: gradients or updates will do; what `tuned.split` gives of them too.

  Returns:
    matrices: {name: [*lead, m, n]}, named by paths such as 'lora/encoder/block_0/query/kernel/a'.
      The leading axes are those of a stack of layers and of a batch of kernels.
    rest: the tree with None in place of the matrices.

  Raises:
    ValueError: a matrix has another shape than in theta of this method.
  """
  views = _matrices(tuned)
  matrices = {}

  def take(path, x):
    name = name_of(path)
    if name not in views:
      return x
    if x.shape != views[name].shape:
      raise ValueError(
        f'{name!r} has the shape {x.shape}, and {views[name].shape} in theta of this method'
      )
    matrices[name] = views[name].fold(x)
    return None

  rest = jax.tree_util.tree_map_with_path(take, theta)
  return matrices, rest


def unfold(tuned: Tuned, matrices: Mapping[str, jax.Array], rest) -> Any:
  """The tree that `fold` took apart."""
  views = _matrices(tuned)

  def put(path, x):
    name = name_of(path)
    if x is None and name in matrices:
      return views[name].unfold(matrices[name])
    return x

  return jax.tree_util.tree_map_with_path(put, rest, is_leaf=lambda x: x is None)


# ---- Transforms of one matrix.


class MatrixState(NamedTuple):
  """State of `on_matrices`.

  Attributes:
    matrices: {name: the state of `tx`}; where a name stands for several matrices, the states of all
      of them with one axis in front.
    rest: the state of `rest`.
  """

  matrices: dict[str, Any]
  rest: Any


def on_matrices(
  tuned: Tuned,
  tx: optax.GradientTransformation,
  rest: optax.GradientTransformation,
  pattern: str = '.*',
) -> optax.GradientTransformationExtraArgs:
  """`tx` for each matrix of theta alone, as [m, n]; `rest` for everything else at once.

  The layers of a stack and the kernels of a batch come one after the other, by `jax.lax.map`: a
  scanned model gets the updates of the unrolled one, a `jax.lax.cond` in `tx` stays one, and what
  `tx` needs beside its state it needs for one matrix.

  Args:
    tuned: from `attach`.
    tx: any Optax transform; its parameters, updates and state are those of one matrix.
    rest: for vectors and other arrays, which `tx` would leave as they are; `optax.identity()` if
      their gradients are to pass unchanged.
    pattern: regex for whole theta paths, such as 'full/.*/(attention|mlp)/.*': matrices that it
      does not match are left to `rest`.

  Raises:
    ValueError: theta has no matrix, or none that the pattern matches.
  """
  views = _matrices(tuned)
  chosen = {name for name in views if re.fullmatch(pattern, name)}
  if not views:
    raise ValueError(f'theta of {", ".join(tuned.method.names)} has no matrix for on_matrices')
  if not chosen:
    near = difflib.get_close_matches(pattern, views, 3, 0)
    raise ValueError(
      f'on_matrices: the pattern {pattern!r} matches no matrix of theta; near it are '
      f'{", ".join(near)}'
    )
  of_one = optax.with_extra_args_support(tx)
  of_rest = optax.with_extra_args_support(rest)

  def taken(theta):
    """({name: [k, m, n] or [m, n]}, the rest)."""
    matrices, others = fold(tuned, theta)
    left = {name: m for name, m in matrices.items() if name not in chosen}
    others = unfold(tuned, left, others)
    return {name: _in_a_row(m) for name, m in matrices.items() if name in chosen}, others

  def init(params):
    matrices, others = taken(params)
    states = {name: _each(of_one.init, m, m) for name, m in matrices.items()}
    return MatrixState(states, of_rest.init(others))

  def update(updates, state, params=None, **extra):
    grads, others = taken(updates)
    weights, other_weights = ({}, None) if params is None else taken(params)

    def one(given):
      grad, state, weight = given
      return of_one.update(grad, state, weight, **extra)

    moved, states = {}, {}
    for name, grad in grads.items():
      moved[name], states[name] = _each(one, grad, (grad, state.matrices[name], weights.get(name)))
    others, rest_state = of_rest.update(others, state.rest, other_weights, **extra)
    return unfold(tuned, moved, others), MatrixState(states, rest_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _in_a_row(m: jax.Array) -> jax.Array:
  """[*lead, m, n] with one leading axis at most."""
  if m.ndim == 2:
    return m
  return m.reshape(-1, *m.shape[-2:])


def _each(fn, m: jax.Array, given):
  """fn(given) for the matrix m, or for each of several in turn."""
  if m.ndim == 2:
    return fn(given)
  return jax.lax.map(fn, given)
