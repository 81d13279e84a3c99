"""x @ w as a layer computes it: the arguments of its injection point, read as a matrix product."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .sites import Leaf


@dataclasses.dataclass(frozen=True)
class Operand:
  """What a kernel is applied to: `operand @ m` for any m [fan_in, k] gives [..., k].

  For a convolution that is the convolution by m, its rows ordered as the kernel's.

  Attributes:
    x: the input of the layer.
    multiply: (x, m) -> x @ m.
    rows: x -> [..., fan_in], the input as rows; None where it is no matter of moving axes, as in a
      convolution.
    fan_in: rows of the kernel.
  """

  x: jax.Array
  multiply: Callable[[jax.Array, jax.Array], jax.Array]
  rows: Callable[[jax.Array], jax.Array] | None
  fan_in: int

  def __matmul__(self, m: jax.Array) -> jax.Array:
    return self.multiply(self.x, m.astype(self.x.dtype))

  def columns(self, indices: jax.Array) -> jax.Array:
    """The columns [..., k] of the input that some rows of the kernel are multiplied by.

    A gradient with respect to those rows needs these columns of x, and nothing else of it.
    """
    # A gather along the last axis takes a TPU longer than all the products of a layer.
    return self @ jax.nn.one_hot(indices, self.fan_in, dtype=self.x.dtype, axis=0)

  def __getattr__(self, name: str):
    raise AttributeError(
      f'an Operand has no {name!r}: it multiplies matrices by @, its array is x.x, and '
      'x.map(fn) changes that'
    )

  def map(self, fn: Callable[[jax.Array], jax.Array]) -> 'Operand':
    """The same operand with fn(x) in place of x: dropout, a mask, a scale."""
    return dataclasses.replace(self, x=fn(self.x))


class Product(NamedTuple):
  """One call of an injection point.

  Attributes:
    operand: the left side.
    kernel: the array that it is multiplied by.
    to_rows: output of the layer -> y [..., fan_out].
    from_rows: (y, shape of the output) -> the output.
    groups: of a stack of kernels [E, fan_in, fan_out] the one that each tile of rows, the first
      axis of x, is multiplied by; None for a single kernel.
  """

  operand: Operand
  kernel: jax.Array
  to_rows: Callable[[jax.Array], jax.Array]
  from_rows: Callable[[jax.Array, tuple[int, ...]], jax.Array]
  groups: jax.Array | None = None


def product_of(field: str, operation, leaf: Leaf, *args, **kwargs) -> Product:
  """The product that a layer computes by operation(*args, **kwargs).

  Args:
    field: the injection point.
    operation: what the layer would call there.
    leaf: the kernel.

  Raises:
    NotImplementedError: a `dot_general` with batch axes.
  """
  read = {
    'dot_general': _dot,
    'einsum_op': _einsum,
    'conv_general_dilated': _conv,
    'grouped_dot': _grouped,
  }[field]
  return read(operation, leaf, *args, **kwargs)


def _dot(operation, leaf: Leaf, lhs, rhs, dims, *args, **kwargs) -> Product:
  (left, right), (batch, _) = dims
  if batch:
    raise NotImplementedError('a dot_general with batch axes')
  # The rows of the folded kernel follow its own axes, whatever order the call names them in.
  contracted = [axis for _, axis in sorted(zip(right, left, strict=True))]
  free = [axis for axis in range(lhs.ndim) if axis not in left]

  def rows_of(x):
    rows = jnp.transpose(x, (*free, *contracted))
    return rows.reshape(*(x.shape[axis] for axis in free), -1)  # [..., fan_in]

  def multiply(x, m):
    rows = rows_of(x)
    return operation(rows, m, (((rows.ndim - 1,), (0,)), ((), ())), *args, **kwargs)

  def to_rows(out):
    return out.reshape(*out.shape[: len(free)], -1)

  def from_rows(y, shape):
    return y.reshape(shape)

  return Product(Operand(lhs, multiply, rows_of, leaf.fan_in), rhs, to_rows, from_rows)


def _einsum(operation, leaf: Leaf, spec: str, lhs, rhs, *args, **kwargs) -> Product:
  inputs, out = spec.replace(' ', '').split('->')
  left, right = inputs.split(',')
  ins = ''.join(right[axis] for axis in leaf.ins)
  outs = ''.join(right[axis] for axis in leaf.outs)
  free = ''.join(letter for letter in out if letter not in outs)
  columns = next(letter for letter in 'zyxwvutsrqponmlkjihgfedcba' if letter not in spec)

  def rows_of(x):
    rows = jnp.einsum(f'{left}->{free}{ins}', x)
    return rows.reshape(*rows.shape[: len(free)], -1)  # [..., fan_in]

  def multiply(x, m):
    m = m.reshape(*(leaf.shape[axis] for axis in leaf.ins), -1)
    return operation(f'{left},{ins}{columns}->{free}{columns}', x, m, *args, **kwargs)

  def to_rows(y):
    y = jnp.einsum(f'{out}->{free}{outs}', y)
    return y.reshape(*y.shape[: y.ndim - len(outs)], -1)

  def from_rows(y, shape):
    y = y.reshape(*y.shape[:-1], *(leaf.shape[axis] for axis in leaf.outs))
    return jnp.einsum(f'{free}{outs}->{out}', y)

  rows = None
  if sorted(left) == sorted(free + ins):  # else something of x alone is summed over, or repeated
    rows = rows_of
  return Product(Operand(lhs, multiply, rows, leaf.fan_in), rhs, to_rows, from_rows)


def _conv(operation, leaf: Leaf, lhs, rhs, *args, **kwargs) -> Product:
  dims = kwargs.get('dimension_numbers')
  if not dims and len(args) > 4:
    dims = args[4]
  dims = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dims)
  channel = dims.out_spec[1]

  def multiply(x, m):
    kernel = leaf.unfold(m, (m.shape[-1],))
    return jnp.moveaxis(operation(x, kernel, *args, **kwargs), channel, -1)

  def to_rows(y):
    return jnp.moveaxis(y, channel, -1)

  def from_rows(y, shape):
    return jnp.moveaxis(y, -1, channel)

  return Product(Operand(lhs, multiply, None, leaf.fan_in), rhs, to_rows, from_rows)


def _grouped(operation, leaf: Leaf, lhs, rhs, groups) -> Product:
  def multiply(x, m):
    return operation(x, m, groups)

  def same(x):
    return x

  def from_rows(y, shape):
    return y.reshape(shape)

  return Product(Operand(lhs, multiply, same, leaf.fan_in), rhs, same, from_rows, groups)


def rows_operand(x: jax.Array) -> Operand:
  """Rows [..., fan_in] that multiply matrices as they are."""
  return Operand(x, jnp.matmul, lambda x: x, x.shape[-1])
