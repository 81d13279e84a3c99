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
from tests.contract.table import prepared, row, stored
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
        self.b.model, prepared(method, self.b, **hp), self.b.backbone, *self.b.args, **self.b.kwargs
      )
    self.init = jax.jit(self.tuned.init)
    self.theta = self.init(jax.random.key(1), self.b.backbone)
    leaves, self._tree = jax.tree.flatten(self.b.backbone)
    self._is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    self._others = [x for x, f in zip(leaves, self._is_float, strict=True) if not f]
    floats = [x for x, f in zip(leaves, self._is_float, strict=True) if f]
    self.start = jpeft.join(self.theta, floats)

  def held(self, floats, others=None):
    """The backbone with other float arrays, and with other integers if they are given."""
    floats, others = iter(floats), iter(self._others if others is None else others)
    return jax.tree.unflatten(self._tree, [next(floats if f else others) for f in self._is_float])

  def apply(self, theta, floats, args, others=None):
    return self.tuned.apply(theta, self.held(floats, others), *args, **self.b.kwargs)

  def loss(self, tree, args, others=None):
    """(the sum of squares of the output, the output)."""
    out = self.apply(*jpeft.split(tree), args, others)
    return sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for y in jax.tree.leaves(out)), out

  def split(self, tree):
    """(both trees with what is trained of theta, what is held of theta)."""
    trained, held = self.tuned.split(tree['theta'])
    return {**tree, 'theta': trained}, held

  def gradient(self, tree, args, wrap=lambda loss: loss, others=None):
    """(the output, the gradients of both trees with what is trained of theta).

    `wrap` is applied to the function that is differentiated.
    """
    trained, held = self.split(tree)

    def loss(trained):
      theta = self.tuned.join(trained['theta'], held)
      return self.loss({**trained, 'theta': theta}, args, others)

    (_, out), grads = jax.value_and_grad(wrap(loss), has_aux=True)(trained)
    return out, grads

  @functools.cached_property
  def tx(self):
    trained, _ = self.split(self.start)
    return jpeft.freeze(optax.adam(1e-2), jpeft.mask(trained))

  @functools.cached_property
  def optimizer(self):
    return jax.jit(self.tx.init)(self.split(self.start)[0])

  @functools.cached_property
  def step(self):
    """(both trees, optimizer state, args) -> (output, gradients, trees and state after the
    step).
    """

    def step(tree, optimizer, args):
      self.traces += 1
      out, grads = self.gradient(tree, args)
      trained, held = self.split(tree)
      updates, optimizer = self.tx.update(grads, optimizer, trained)
      trained = optax.apply_updates(trained, updates)
      theta = self.tuned.join(trained['theta'], held)
      return out, grads, {**trained, 'theta': theta}, optimizer

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
