"""Two streams through coupled layers, whose backward pass makes the inputs again from the outputs.

A layer maps (x1, x2) to y1 = a x1 + f(x2), y2 = b x2 + g(y1), and passes on (y1, y2), or (y2, y1)
where streams swap. Known (y1, y2), x2 = (y2 - g(y1)) / b and x1 = (y1 - f(x2)) / a: nothing of a
layer is stored, however many there are. An error of y1 grows by 1 / a and the slope of f a layer;
hence streams can be stored every few layers too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.programs import Static, Traced, has_gradient, plain_zero, vjp_in

Streams = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Layers:
  """Layers that share a program: one, or a stack of them.

  Attributes:
    f, g: (row, x) -> an array like x, of one layer.
    row: a pytree of the arrays of one layer; those of a stack have a first axis of layers.
    count: the layers of a stack; None for one layer alone.
  """

  f: Callable[[Any, jax.Array], jax.Array]
  g: Callable[[Any, jax.Array], jax.Array]
  row: Any
  count: int | None = None

  @property
  def depth(self) -> int:
    """How many layers these are."""
    return 1 if self.count is None else self.count

  def shapes_of_one(self) -> Any:
    """The row of one layer, as shapes."""

    def one(x):
      shape = x.shape
      if self.count is not None:
        shape = shape[1:]
      return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(one, self.row)


class Reversible:
  """Coupled layers as one function of the two streams.

  Args:
    layers: in order.
    like: an array like a stream.
    scales: a and b.
    swap: whether streams change places behind each layer.
    every: after how many layers the streams are stored; None for those of the last layer alone.
  """

  def __init__(
    self,
    layers: Sequence[Layers],
    like: jax.Array,
    scales: tuple[float, float] = (1.0, 1.0),
    swap: bool = False,
    every: int | None = None,
  ):
    self._scales = scales
    self._swap = swap
    self.parts = []
    depth = 0
    for part in layers:
      # Traced here, where the rules of a model act: the backward pass is traced after they ended.
      f = _traced(part, part.f, like)
      g = _traced(part, part.g, like)
      self.parts.append(_Part(part, depth, f, g))
      depth += part.depth
    self._every = every or depth
    # The streams behind the last layer are the output, and need no slot.
    self._slots = -(-depth // self._every) - 1

  @property
  def rows(self) -> list:
    """The rows of all parts."""
    return [part.layers.row for part in self.parts]

  @property
  def consts(self) -> list:
    """The arrays that f and g of each part close over."""
    return [part.consts for part in self.parts]

  def __call__(self, x: Streams) -> Streams:
    """The streams behind the last layer; differentiable once, in reverse, by streams and rows."""
    leaves, tree = jax.tree.flatten(self.rows)

    @jax.custom_vjp
    def run(leaves, consts, x):
      y, _ = self.forward(jax.tree.unflatten(tree, leaves), consts, x)
      return y

    # With symbolic zeros, inputs are pairs of a value and whether a gradient flows into it.
    def forward(*inputs):
      leaves, consts, x = jax.tree.map(lambda pair: pair.value, inputs)
      if any(pair.perturbed for pair in jax.tree.leaves(inputs[1])):
        raise ValueError(
          'a reversible layer closes over an array that is trained, whose gradient would be lost'
        )
      trained = [has_gradient(pair) for pair in inputs[0]]
      y, stored = self.forward(jax.tree.unflatten(tree, leaves), consts, x)
      return y, (Static(jax.tree.unflatten(tree, trained)), leaves, consts, stored, y)

    def backward(residuals, d_y):
      trained, leaves, consts, stored, y = residuals
      d_y = tuple(plain_zero(d) for d in d_y)
      rows = jax.tree.unflatten(tree, leaves)
      d_leaves, d_x = self._backward(trained.value, rows, consts, stored, y, d_y)
      no_gradient = jax.tree.map(lambda _: None, consts)
      return d_leaves, no_gradient, d_x

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(leaves, self.consts, x)

  def errors(self, x: Streams) -> jax.Array:
    """How far the streams before each layer, made again, are from those of the forward pass.

    Returns:
      [depth]: the largest difference, in units of the largest entry of the stream, of the worse
      stream.
    """
    y, stored = self.forward(self.rows, self.consts, x)
    before = []  # of each part the streams before its layers, those of a stack [layers, ...]
    for part in self.parts:
      x, states = self._states(part, x)
      before.append(states)
    errors = []
    for part, states in reversed(list(zip(self.parts, before, strict=True))):
      y, again = self._states_again(part, y, stored)
      axes = tuple(range(-y[0].ndim, 0))
      one, two = (_relative_error(a, b, axes) for a, b in zip(again, states, strict=True))
      errors.insert(0, jnp.atleast_1d(jnp.maximum(one, two)))
    return jnp.concatenate(errors)

  def _states(self, part: '_Part', x: Streams) -> tuple[Streams, Streams]:
    """(the streams behind a part, those before each of its layers)."""

    def body(x, row, j):
      return self.layer(part, row, part.consts, x), x

    return part.scan(body, x, part.layers.row)

  def _states_again(self, part: '_Part', y: Streams, stored: Streams) -> tuple[Streams, Streams]:
    """(the streams before a part, those before each of its layers), from those behind the part."""

    def body(y, row, j):
      x = self.inverse(part, row, part.consts, self._restart(stored, j, y))
      return x, x

    return part.scan(body, y, part.layers.row, reverse=True)

  # One layer, there and back.

  def layer(self, part: '_Part', row, consts, x: Streams) -> Streams:
    """The streams behind a layer, from those before it."""
    a, b = self._scales
    x1, x2 = x
    f_consts, g_consts = consts
    y1 = a * x1 + part.f(f_consts, row, x2)
    y2 = b * x2 + part.g(g_consts, row, y1)
    return self._swapped((y1, y2))

  def inverse(self, part: '_Part', row, consts, y: Streams) -> Streams:
    """The streams before a layer, from those behind it."""
    a, b = self._scales
    y1, y2 = self._swapped(y)
    f_consts, g_consts = consts
    x2 = (y2 - part.g(g_consts, row, y1)) / b
    x1 = (y1 - part.f(f_consts, row, x2)) / a
    return x1, x2

  def _swapped(self, streams: Streams) -> Streams:
    first, second = streams
    return (second, first) if self._swap else streams

  # Which streams are stored.

  def _slot(self, j):
    """(whether the streams behind layer j are stored, in which slot)."""
    slot = j // self._every
    here = ((j + 1) % self._every == 0) & (slot < self._slots)
    return here, jnp.minimum(slot, self._slots - 1)

  def _store(self, stored: Streams, j, y: Streams) -> Streams:
    """The stored streams, with those behind layer j if they have a slot."""
    if not self._slots:
      return stored
    here, slot = self._slot(j)
    return jax.tree.map(lambda s, a: s.at[slot].set(jnp.where(here, a, s[slot])), stored, y)

  def _restart(self, stored: Streams, j, y: Streams) -> Streams:
    """The streams behind layer j: what was stored, else y."""
    if not self._slots:
      return y
    here, slot = self._slot(j)
    return jax.tree.map(lambda s, a: jnp.where(here, s[slot], a), stored, y)

  # All layers.

  def forward(self, rows: list, consts: list, x: Streams) -> tuple[Streams, Streams]:
    """(the streams behind the last layer, those that are stored [slots, ...])."""
    carry = x, jax.tree.map(lambda a: jnp.zeros((self._slots, *a.shape), a.dtype), x)
    for part, row, own_consts in zip(self.parts, rows, consts, strict=True):
      carry = self._forward_part(part, row, own_consts, carry)
    return carry

  def _forward_part(self, part: '_Part', row, consts, carry):
    def body(carry, row, j):
      x, stored = carry
      y = self.layer(part, row, consts, x)
      return (y, self._store(stored, j, y)), None

    carry, _ = part.scan(body, carry, row)
    return carry

  def _backward(
    self, trained: list, rows: list, consts: list, stored: Streams, y: Streams, d: Streams
  ) -> tuple[list, Streams]:
    """(gradients of the leaves of rows, None where not trained; those of the first streams)."""
    carry = y, d
    grads = []
    for i in reversed(range(len(self.parts))):
      flags = jax.tree.leaves(trained[i])
      own = [n for n, flag in enumerate(flags) if flag]
      carry, d_own = self._backward_part(self.parts[i], rows[i], consts[i], own, stored, carry)
      by_leaf = dict(zip(own, d_own, strict=True))
      grads = [by_leaf.get(n) for n in range(len(flags))] + grads
    _, d = carry
    return grads, d

  def _backward_part(self, part: '_Part', row, consts, own: list[int], stored: Streams, carry):
    """((streams, their gradients) before a part, gradients of the leaves `own` of its row)."""
    a, b = self._scales
    f_consts, g_consts = consts

    def body(carry, row, j):
      y, d = carry
      y1, y2 = self._swapped(self._restart(stored, j, y))
      d1, d2 = self._swapped(d)
      g, d_row_of_g, d_y1 = _pull(part.g, g_consts, row, own, y1, d2)
      x2 = (y2 - g) / b
      d1 = d1 + d_y1  # y1 is an output, and what g reads
      f, d_row_of_f, d_x2 = _pull(part.f, f_consts, row, own, x2, d1)
      x1 = (y1 - f) / a
      before = (x1, x2), (a * d1, b * d2 + d_x2)
      d_row = jax.tree.map(jnp.add, d_row_of_g, d_row_of_f)
      # Without the barrier XLA may put the gradients of weights off, and so keep what was computed
      # again for them until then.
      return jax.lax.optimization_barrier((before, d_row))

    return part.scan(body, carry, row, reverse=True)


@dataclasses.dataclass(frozen=True)
class _Part:
  """Layers with their programs.

  Attributes:
    layers: one, or a stack.
    first: the number of the first of them in the network.
    f, g: of one layer.
  """

  layers: Layers
  first: int
  f: Traced
  g: Traced

  @property
  def consts(self) -> tuple[list, list]:
    """The arrays that f and g close over."""
    return self.f.consts, self.g.consts

  def scan(self, body, carry, row, reverse: bool = False):
    """As lax.scan, of body(carry, row of a layer, its number) -> (carry, out)."""
    count = self.layers.count
    if count is None:
      return body(carry, row, self.first)
    numbers = self.first + jnp.arange(count)
    return jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, (row, numbers), reverse=reverse)


def _traced(layers: Layers, fn, like: jax.Array) -> Traced:
  """f or g of one layer, traced: (consts, row, x) -> an array like x."""
  like = jax.ShapeDtypeStruct(like.shape, like.dtype)

  def in_dtype(row, x):
    return fn(row, x).astype(x.dtype)

  return Traced(in_dtype, layers.shapes_of_one(), like)


def _pull(program: Traced, consts, row, own: list[int], x: jax.Array, d: jax.Array):
  """(y = program(x), gradients of the leaves `own` of the row, that of x), d being that of y."""
  leaves, tree = jax.tree.flatten(row)

  def run(leaves, x):
    return program(consts, jax.tree.unflatten(tree, leaves), x)

  y, vjp = vjp_in(run, leaves, own, x)
  d_values, d_x = vjp(d)
  return y, d_values, d_x


def _relative_error(found: jax.Array, true: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The largest difference along some axes, in units of the largest entry."""
  return jnp.abs(found - true).max(axes) / jnp.abs(true).max(axes)
