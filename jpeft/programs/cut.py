"""Splits a program into the part that does not depend on theta and the part that does."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .steps import Steps


@dataclasses.dataclass(frozen=True)
class Halves:
  """fn(theta, backbone, batch, *rest) = second(theta, backbone, first(backbone, batch), *rest).

  Attributes:
    features: shapes of what `second` takes from `first`, for one example; `first` returns them with
      the axis of the batch in front.
  """

  features: tuple[jax.ShapeDtypeStruct, ...]
  _fn: Callable[..., Any]
  _example: tuple  # shapes of (theta, backbone, batch, *rest)
  _axes: tuple[int, ...]  # of the batch, in the features as the program computes them

  @property
  def nbytes(self) -> int:
    """Bytes of one example's features."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.features)

  def first(self, backbone, batch) -> tuple[jax.Array, ...]:
    """What depends on the batch and not on theta, [B, ...] each."""
    theta, _, _, *rest = self._example
    steps = Steps(self._fn, theta, backbone, batch, *rest)
    found = steps.run(steps.crossing, backbone=backbone, batch=batch)
    return tuple(jnp.moveaxis(x, axis, 0) for x, axis in zip(found, self._axes, strict=True))

  def second(self, theta, backbone, features: Sequence[jax.Array], *rest):
    """The remainder of the program, on the features of a batch; differentiable in theta."""
    batch = _resized(self._example[2], len(features[0]))
    steps = Steps(self._fn, theta, backbone, batch, *rest)
    moved = [jnp.moveaxis(x, 0, axis) for x, axis in zip(features, self._axes, strict=True)]
    known = dict(zip(steps.crossing, moved, strict=True))
    outs = steps.run(steps.outs, known, theta=theta, backbone=backbone, rest=rest)
    return jax.tree.unflatten(steps.tree, outs)


def cut(fn: Callable[..., Any], theta, backbone, batch, *rest) -> Halves:
  """Splits `fn` into the part that does not depend on theta and the part that does.

  The first is computed once an example and cached, not once a step. With a method that never runs
  the backbone backwards that is the whole backbone; with one that trains late blocks alone, all
  blocks before them. The features of an example must depend on that example alone (no statistics
  over a batch) and be the same each time (no dropout before theta).

  Args:
    fn: (theta, backbone, batch, *rest) -> out.
    theta: what is trained; shapes will do, here and below.
    backbone: what is frozen.
    batch: arrays [B, ...].
    *rest: whatever else changes from step to step, such as random keys.

  Raises:
    ValueError: an array between the two parts has not exactly one axis of the size of the batch.
  """
  size = len(jax.tree.leaves(batch)[0])
  # The axis of the batch is the one that grows with it.
  small = Steps(fn, theta, backbone, _resized(batch, size), *rest).crossing.values()
  large = Steps(fn, theta, backbone, _resized(batch, size + 1), *rest).crossing.values()
  axes = []
  features = []
  for one, other in zip(small, large, strict=True):
    axis = _batch_axis(one.shape, other.shape, size)
    axes.append(axis)
    shape = one.shape[:axis] + one.shape[axis + 1 :]
    features.append(jax.ShapeDtypeStruct(shape, one.dtype))
  example = jax.eval_shape(lambda *x: x, theta, backbone, batch, *rest)
  return Halves(tuple(features), fn, example, tuple(axes))


def _batch_axis(shape: tuple[int, ...], larger: tuple[int, ...], size: int) -> int:
  """The axis of the batch, from the shapes for `size` and for one more example."""
  grown = [i for i, (n, m) in enumerate(zip(shape, larger, strict=True)) if n != m]
  if len(grown) != 1 or shape[grown[0]] != size:
    raise ValueError(
      f'an array of shape {list(shape)}, computed before theta comes in from a batch of {size}, '
      'has no axis of the examples, so it cannot be kept for each of them'
    )
  return grown[0]


def _resized(batch, size: int):
  """The shapes of a batch of another size."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
