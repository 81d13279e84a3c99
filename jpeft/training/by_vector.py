"""Optimizers that keep a state for each vector of a matrix, so that one vector can start anew.

Some methods put another vector in the place of a row or column while all others go on, such as
SwitchLoRA (arXiv 2406.06564). What an optimizer keeps of the old one has to be forgotten, and so
has the number of its updates: Adam divides its means by 1 - beta^t, which is about 1 late in
training, and the first updates of a vector whose means start at 0 would be several times too large.
"""

import jax
import optax

from jpeft.core import Tuned, Weight, entry_path, names_entry

from .matrix_view import axes_of


def by_vector(
  tuned: Tuned, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """`tx` for each entry of theta by itself, and for each vector of those that start anew in parts.

  Which these are, and along which axis, a method says itself (`Weight.restarts`). The state has the
  structure of that of `tx`, with a tree like theta in each place: means and squares in the shape of
  the entries, and counts with a number for each vector, [1, r] or [r, 1], or for each entry, [].
  `tx` has not seen a vector whose numbers are 0 in all these trees.

  Args:
    tuned: from `attach`.
    tx: a rule that treats each number alike, whose state is numbers for each number and scalars,
      all 0 at first, such as `optax.scale_by_adam()`.
  """
  tx = optax.with_extra_args_support(tx)

  def mapped(fn, path, entry):
    """fn of a vector, mapped over those of an entry; fn of the entry where it is one."""
    axis = _axis_of(tuned, path)
    if axis is None:
      return fn
    fn = jax.vmap(fn, axis, axis)
    for _ in range(entry.ndim - axes_of(tuned, path, entry)):
      fn = jax.vmap(fn)
    return fn

  def init(params):
    def of_entry(path, entry):
      def of_vector(vector):
        return _lifted(tx.init(vector), vector)

      return mapped(of_vector, path, entry)(entry)

    states = jax.tree_util.tree_map_with_path(of_entry, params)
    return _transposed(params, _structure(tx), states)

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError('by_vector reads the shapes of the parameters: update(grads, state, params)')
    states = jax.tree.transpose(_structure(tx), jax.tree.structure(params), state)

    def of_entry(path, entry, grad, own):
      def of_vector(vector, grad, own):
        like = jax.eval_shape(tx.init, vector)
        own = jax.tree.map(lambda x, to: x.reshape(to.shape), own, like)
        moved, own = tx.update(grad, own, vector, **extra)
        return moved, _lifted(own, vector)

      return mapped(of_vector, path, entry)(entry, grad, own)

    both = jax.tree_util.tree_map_with_path(of_entry, params, updates, states)
    pair = jax.tree.structure((0, jax.tree.unflatten(_structure(tx), range(_size(tx)))))
    return _transposed(params, pair, both)

  return optax.GradientTransformationExtraArgs(init, update)


def restarts(tuned: Tuned) -> str | None:
  """The name of a rule that clears the moments of single vectors; None if there is none."""
  for rule, _ in tuned.rules:
    if isinstance(rule, Weight) and rule.restarts:
      return rule.name
  return None


def _axis_of(tuned: Tuned, path) -> int | None:
  """The axis that numbers the vectors of an entry of theta; None where it is one whole."""
  name, place, *entry = entry_path(path)
  for rule, site in tuned.rules:
    if rule.name == name and site.path == place and isinstance(rule, Weight):
      for pattern, axis in rule.restarts:
        if names_entry(pattern, entry):
          return axis
  return None


def _lifted(state, vector):
  """A state of one vector [d], its scalars as [1], so that they keep the axis of the vector."""
  if vector.ndim != 1:
    return state
  return jax.tree.map(lambda x: x.reshape(1) if x.ndim == 0 else x, state)


def _structure(tx):
  return jax.tree.structure(jax.eval_shape(tx.init, jax.ShapeDtypeStruct((2,), 'float32')))


def _size(tx) -> int:
  return _structure(tx).num_leaves


def _transposed(params, inner, tree):
  return jax.tree.transpose(jax.tree.structure(params), inner, tree)
