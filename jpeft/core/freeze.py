"""The same freeze for code that keeps one tree and an Optax mask."""

from typing import Any

import jax
import optax


def join(theta, backbone) -> dict[str, Any]:
  """One tree {'backbone': ..., 'theta': ...} of the two."""
  return {'backbone': backbone, 'theta': theta}


def split(tree) -> tuple[Any, Any]:
  """(theta, backbone) of a joined tree."""
  return tree['theta'], tree['backbone']


def mask(tree, trainable=None) -> Any:
  """A tree of bools like a joined one: True where it is trained, False all over the backbone.

  Args:
    tree: from `join`.
    trainable: `tuned.trainable(theta)`, where the method holds some entries fixed.
  """
  theta, backbone = split(tree)
  if trainable is None:
    trainable = jax.tree.map(lambda _: True, theta)
  return join(trainable, jax.tree.map(lambda _: False, backbone))


def freeze(tx: optax.GradientTransformation, mask) -> optax.GradientTransformation:
  """`tx` for the leaves where `mask` is True, exactly zero updates for the others.

  What `tx` computes over all leaves (a global norm, weight decay, statistics) sees the trained
  ones alone, and its state has nothing for the others.

  Args:
    tx: any Optax transform.
    mask: a tree of bools, or a function tree -> tree of bools, such as `tuned.trainable`.
  """

  def label(is_trained: bool) -> str:
    return 'train' if is_trained else 'freeze'

  def labels(tree):
    return jax.tree.map(label, mask(tree) if callable(mask) else mask)

  return optax.partition({'train': tx, 'freeze': optax.set_to_zero()}, labels)
