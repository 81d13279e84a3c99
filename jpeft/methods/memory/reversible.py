"""Two streams through coupled layers, whose backward pass makes the inputs again from the outputs.

A layer maps (x1, x2) to y1 = a x1 + f(x2), y2 = b x2 + g(y1), and passes on (y1, y2), or (y2, y1)
where streams swap. Known (y1, y2), x2 = (y2 - g(y1)) / b and x1 = (y1 - f(x2)) / a: nothing is kept
of a layer, however many there are. An error of y1 grows by 1 / a and the slope of f a layer; hence
streams can be kept every few layers too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jpeft.programs import hoisted

Streams = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layers:
  """Layers that share a program: one, or a stack of them.

  Attributes:
    f, g: (row, x) -> an array like x, of one layer.
    row: a pytree of the arrays of one layer; of a stack they lead with its layers.
    count: the layers of a stack; None for one layer alone.
  """

  f: Callable[[Any, jax.Array], jax.Array]
  g: Callable[[Any, jax.Array], jax.Array]
  row: Any
  count: int | None = None

  @property
  def depth(self) -> int:
    return 1 if self.count is None else self.count

  def over(self, body, carry, row, first: int, reverse: bool = False):
    """As lax.scan, of body(carry, row of a layer, its number) -> (carry, out)."""
    if self.count is None:
      return body(carry, row, first)
    numbers = first + jnp.arange(self.count)
    return jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, (row, numbers), reverse=reverse)


class Reversible:
  """Coupled layers as one function of the two streams.

  Args:
    layers: in order.
    like: an array like a stream.
    scales: a and b.
    swap: whether streams change places behind each layer.
    every: after how many layers the streams are kept; None for those of the last layer alone.
  """

  def __init__(
    self,
    layers: Sequence[Layers],
    like: jax.Array,
    scales: tuple[float, float] = (1.0, 1.0),
    swap: bool = False,
    every: int | None = None,
  ):
    self._parts, self._scales, self._swap = layers, scales, swap
    self._firsts = [sum(part.depth for part in layers[:i]) for i in range(len(layers))]
    depth = sum(part.depth for part in layers)
    self._every = every or depth
    self._slots = -(-depth // self._every) - 1  # the streams behind the last layer are the output
    # Traced here, where the rules of a model act: the backward pass is traced when they are gone.
    self._programs = [
      (_Program(part, part.f, like), _Program(part, part.g, like)) for part in layers
    ]

  def __call__(self, x: Streams) -> Streams:
    """The streams behind the last layer; differentiable once, in reverse, by streams and rows."""
    rows, tree = jax.tree.flatten([part.row for part in self._parts])

    @jax.custom_vjp
    def run(rows, consts, x):
      return self._forward(jax.tree.unflatten(tree, rows), consts, x)[0]

    def forward(*inputs):
      rows, consts, x = jax.tree.map(lambda leaf: leaf.value, inputs)
      moved = [
        leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact) for leaf in inputs[0]
      ]
      if any(leaf.perturbed for leaf in jax.tree.leaves(inputs[1])):
        raise ValueError(
          'a reversible layer closes over an array that is trained, whose gradient would be lost'
        )
      y, kept = self._forward(jax.tree.unflatten(tree, rows), consts, x)
      return y, (_Static(jax.tree.unflatten(tree, moved)), rows, consts, kept, y)

    def backward(residuals, d):
      moved, rows, consts, kept, y = residuals
      d = tuple(
        jnp.zeros_like(a) if isinstance(g, SymbolicZero) else g for a, g in zip(y, d, strict=True)
      )
      rows_, d = self._backward(moved.value, jax.tree.unflatten(tree, rows), consts, kept, y, d)
      return rows_, jax.tree.map(lambda c: None, consts), d

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(rows, [[program.consts for program in pair] for pair in self._programs], x)

  def errors(self, x: Streams) -> jax.Array:
    """How far the backward pass is off where it makes the streams before each layer again [depth].

    The largest difference, in units of the largest entry of the stream, of the worse one.
    """
    rows, consts = (
      [part.row for part in self._parts],
      [[p.consts for p in pair] for pair in self._programs],
    )
    y, kept = self._forward(rows, consts, x)
    before, found = [], []
    for i, part in enumerate(self._parts):
      step = lambda x, row, j, i=i: (self._done(i, row, consts[i], x), x)
      x, states = part.over(step, x, rows[i], 0)
      before.append(states)
    for i, part in reversed(list(enumerate(self._parts))):

      def back(y, row, j, i=i):
        x = self._undone(i, row, consts[i], self._reset(kept, j, y))
        return x, x

      y, again = part.over(back, y, rows[i], self._firsts[i], reverse=True)
      axes = tuple(range(-y[0].ndim, 0))
      off = lambda a, b, axes=axes: jnp.abs(a - b).max(axes) / jnp.abs(b).max(axes)
      found.insert(0, jnp.atleast_1d(jnp.maximum(*map(off, again, before[i]))))
    return jnp.concatenate(found)

  def _done(self, i: int, row, consts, x: Streams) -> Streams:
    (f, g), (a, b) = self._programs[i], self._scales
    y1 = a * x[0] + f(consts[0], row, x[1])
    y2 = b * x[1] + g(consts[1], row, y1)
    return (y2, y1) if self._swap else (y1, y2)

  def _undone(self, i: int, row, consts, y: Streams) -> Streams:
    (f, g), (a, b) = self._programs[i], self._scales
    y1, y2 = y[::-1] if self._swap else y
    x2 = (y2 - g(consts[1], row, y1)) / b
    return (y1 - f(consts[0], row, x2)) / a, x2

  def _slot(self, j):
    """(whether the streams behind layer j are kept, where)."""
    slot = j // self._every
    return ((j + 1) % self._every == 0) & (slot < self._slots), jnp.minimum(slot, self._slots - 1)

  def _reset(self, kept: Streams, j, y: Streams) -> Streams:
    """The streams behind layer j: what was kept, else y."""
    if not self._slots:
      return y
    here, slot = self._slot(j)
    return jax.tree.map(lambda k, a: jnp.where(here, k[slot], a), kept, y)

  def _forward(self, rows, consts, x: Streams) -> tuple[Streams, Streams]:
    """(the streams behind the last layer, those kept [slots, ...])."""
    kept = jax.tree.map(lambda a: jnp.zeros((self._slots, *a.shape), a.dtype), x)
    for i, part in enumerate(self._parts):

      def body(carry, row, j, i=i):
        x, kept = carry
        x = self._done(i, row, consts[i], x)
        if self._slots:
          here, slot = self._slot(j)
          kept = jax.tree.map(lambda k, a: k.at[slot].set(jnp.where(here, a, k[slot])), kept, x)
        return (x, kept), None

      (x, kept), _ = part.over(body, (x, kept), rows[i], self._firsts[i])
    return x, kept

  def _backward(
    self, moved, rows, consts, kept: Streams, y: Streams, d: Streams
  ) -> tuple[list, Streams]:
    """(gradients of the leaves of rows, None where not moved; of the streams before the first
    layer).
    """
    grads = []
    for i, part in reversed(list(enumerate(self._parts))):
      own = [n for n, flag in enumerate(jax.tree.leaves(moved[i])) if flag]
      _, (a, b) = self._programs[i], self._scales

      def body(carry, row, j, i=i, own=own, a=a, b=b):
        y, d = carry
        y = self._reset(kept, j, y)
        (y1, y2), (d1, d2) = (y[::-1], d[::-1]) if self._swap else (y, d)
        g, more, add = self._pulled(i, 1, row, consts[i], own, y1, d2)
        x2, d1 = (y2 - g) / b, d1 + add
        f, less, add = self._pulled(i, 0, row, consts[i], own, x2, d1)
        found = ((y1 - f) / a, x2), (a * d1, b * d2 + add)
        # Now, lest gradients of weights wait and hold what was computed again for them.
        return jax.lax.optimization_barrier((found, jax.tree.map(jnp.add, more, less)))

      (y, d), own_grads = part.over(body, (y, d), rows[i], self._firsts[i], reverse=True)
      table = dict(zip(own, own_grads, strict=True))
      grads = [table.get(n) for n in range(len(jax.tree.leaves(moved[i])))] + grads
    return grads, d

  def _pulled(self, i: int, which: int, row, consts, own: list[int], x, d):
    """(f or g of x, gradients of the leaves `own` of the row, of x)."""
    leaves, tree = jax.tree.flatten(row)

    def run(values, x):
      known = dict(zip(own, values, strict=True))
      row = jax.tree.unflatten(tree, [known.get(n, leaf) for n, leaf in enumerate(leaves)])
      return self._programs[i][which](consts[which], row, x)

    out, vjp = jax.vjp(run, [leaves[n] for n in own], x)
    return out, *vjp(d)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
  """What the forward pass tells the backward pass beside arrays."""

  value: Any


class _Program:
  """f or g of one layer, traced: (consts, row, x) -> an array like x."""

  def __init__(self, part: Layers, fn, like: jax.Array):
    one = lambda x: jax.ShapeDtypeStruct(x.shape if part.count is None else x.shape[1:], x.dtype)
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    closed = jax.make_jaxpr(lambda row, x: fn(row, x).astype(x.dtype))(
      jax.tree.map(one, part.row), like
    )
    jaxpr, self.consts = hoisted(closed)
    self._run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))

  def __call__(self, consts, row, x: jax.Array) -> jax.Array:
    return self._run(*consts, *jax.tree.leaves(row), x)[0]
