"""One method on one backbone: one attach and one compiled training step, which all properties
share.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jpeft
from jpeft.contract import distance as far
from jpeft.contract import largest
from tests.contract.anatomies import described
from tests.contract.table import made, row, stored
from tests.fixtures import BACKBONES, noisy, plain


class Pair:
  """A method attached to a backbone.

  Attributes:
    b: the row of the backbone.
    row: what the method declares.
    tuned: from `attach`.
    init: `tuned.init`, compiled.
    theta: as initialised.
    start: {'theta': theta, 'backbone': the backbone's float arrays}.
    traces: how often the training step was traced.
  """

  def __init__(self, method: str, backbone: str, **hp):
    self.method, self.row, self.traces = method, row(method), 0
    self.b = stored(method, BACKBONES[backbone])
    with described(self.b):
      self.tuned = jpeft.attach(
        self.b.model, made(method, backbone, **hp), self.b.backbone, *self.b.args, **self.b.kwargs
      )
    self.init = jax.jit(self.tuned.init)
    self.theta = self.init(jax.random.key(1), self.b.backbone)
    leaves, self._tree = jax.tree.flatten(self.b.backbone)
    self._is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    self._others = [x for x, f in zip(leaves, self._is_float, strict=True) if not f]
    floats = [x for x, f in zip(leaves, self._is_float, strict=True) if f]
    self.start = jpeft.join(self.theta, floats)

  def held(self, floats):
    """The backbone with other float arrays."""
    floats, others = iter(floats), iter(self._others)
    return jax.tree.unflatten(self._tree, [next(floats if f else others) for f in self._is_float])

  def apply(self, theta, floats, args):
    return self.tuned.apply(theta, self.held(floats), *args, **self.b.kwargs)

  def loss(self, tree, args):
    """(the sum of squares of the output, the output)."""
    out = self.apply(*jpeft.split(tree), args)
    return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(out)), out

  @functools.cached_property
  def tx(self):
    mask = jpeft.mask(self.start, self.tuned.trainable(self.theta))
    return jpeft.freeze(optax.adam(1e-2), mask)

  @functools.cached_property
  def optimizer(self):
    return jax.jit(self.tx.init)(self.start)

  @functools.cached_property
  def step(self):
    """(both trees, optimizer state, args) -> (output, gradients, trees and state after the
    step).
    """

    def step(tree, optimizer, args):
      self.traces += 1
      (_, out), grads = jax.value_and_grad(self.loss, has_aux=True)(tree, args)
      updates, optimizer = self.tx.update(grads, optimizer, tree)
      return out, grads, optax.apply_updates(tree, updates), optimizer

    return jax.jit(step)

  @functools.cached_property
  def moved(self):
    """A theta off its start, and (output, gradients) there."""
    theta = noisy(self.theta)
    tree = {**self.start, 'theta': theta}
    return theta, *self.step(tree, self.optimizer, self.b.args)[:2]

  @functools.cached_property
  def trained(self):
    """(the output at step 0, gradients of step 0, both trees after three steps)."""
    tree, optimizer, first = self.start, self.optimizer, None
    for _ in range(3):
      out, grads, tree, optimizer = self.step(tree, optimizer, self.b.args)
      first = first or (out, grads)
    return *first, tree

  @property
  def plain(self):
    """The output of the untouched model."""
    return plain(self.b)


@functools.lru_cache(maxsize=24)
def pair_of(method: str, backbone: str) -> Pair:
  return Pair(method, backbone)


__all__ = ['Pair', 'far', 'largest', 'pair_of']
