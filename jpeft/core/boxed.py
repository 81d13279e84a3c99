"""The product of a layer whose kernel is a box: what is kept for the backward pass is the box."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .boxes import Box, Lazy
from .injection import PRODUCTS
from .products import Product
from .sites import Site


class Multiplied(NamedTuple):
  """One product of a layer with a box.

  Attributes:
    site: the layer.
    box: its kernel.
    shape: of x as rows, [..., fan_in]; of x itself where it is no matter of rows.
    dtype: of x.
    refusal: why the box is computed whole; None where it multiplies itself.
  """

  site: Site
  box: Box
  shape: tuple[int, ...]
  dtype: Any
  refusal: str | None


_NOTED: contextvars.ContextVar[list[Multiplied] | None] = contextvars.ContextVar(
  'products with boxes', default=None
)


@contextlib.contextmanager
def noting() -> Iterator[list[Multiplied]]:
  """Collects the products with boxes that are traced in this context."""
  found: list[Multiplied] = []
  before = _NOTED.set(found)
  try:
    yield found
  finally:
    _NOTED.reset(before)


def multiplied(site: Site, box: Box, product: Product, operation, field: str, *args, **kwargs):
  """operation(*args, **kwargs) with the array of a box as kernel.

  Where the box multiplies rows itself, it does, forwards and backwards. Else its array is computed,
  and again in the backward pass.

  Args:
    site: the layer.
    box: its kernel.
    product: the call, read as a product.
    operation: what the layer would call.
    field: the injection point.
  """
  position = 0
  if field == 'einsum_op':
    position = 1  # behind the text of the equation
  before = args[:position]
  x, kernel = args[position : position + 2]
  after = args[position + 2 :]

  def call(x, kernel):
    return operation(*before, x, kernel, *after, **kwargs)

  if operation is not PRODUCTS[field]:
    refusal = f'the layer has a {field} of its own'
  elif product.operand.rows is None:
    refusal = 'the input of the layer is not a matter of rows'
  elif len(args) > 3 or any(value is not None for value in kwargs.values()):
    refusal = 'the layer asks for a precision or for a dtype of its product'
  elif x.dtype != kernel.dtype:
    refusal = f'a {x.dtype} input meets a {kernel.dtype} kernel'
  else:
    refusal = box.refusal(x.dtype)
  rows = x
  if refusal is None:
    rows = product.operand.rows(x)
  _note(Multiplied(site, box, rows.shape, x.dtype, refusal))
  if refusal is not None:
    return _computed(call, box, x, kernel.dtype)
  y = _multiplied(box, rows)
  return product.from_rows(y, jax.eval_shape(call, x, kernel).shape)


def _note(product: Multiplied) -> None:
  noted = _NOTED.get()
  if noted is not None:
    noted.append(product)


def _multiplied(box: Box, rows: jax.Array) -> jax.Array:
  """The product of rows with a box that multiplies itself."""

  def product(rows, box):
    return box.multiply(rows)

  def transposed(cotangent, box):
    return box.multiply(cotangent, transposed=True)

  return _keeping_the_box(product, transposed)(rows, box)


def _computed(call: Callable, box: Box, x: jax.Array, dtype) -> jax.Array:
  """call(x, kernel) with the array of a box as kernel.

  A box of the backbone gets no gradient; a Lazy, which contains theta, does.
  """

  def product(x, box):
    return call(x, box.unbox().astype(dtype))

  if isinstance(box, Lazy):
    return jax.checkpoint(product)(x, box)
  spec = jax.typeof(x)

  def transposed(cotangent, box):
    # Not jax.linear_transpose, which has no rule for functions with a gradient of their own. The
    # product is linear: what it returns for zeros is not needed, and not computed.
    _, backward = jax.vjp(lambda x: product(x, box), jnp.zeros(spec.shape, spec.dtype))
    (d_x,) = backward(cotangent)
    return d_x

  return _keeping_the_box(product, transposed)(x, box)


def _keeping_the_box(product: Callable, transposed: Callable) -> Callable:
  """A function of (x, box) whose backward pass needs the box alone."""

  def forward(x, box):
    return product(x, box), box

  def backward(box, cotangent):
    # Tied to the cotangent; without this XLA may keep the kernel of the forward pass after all.
    box, cotangent = jax.lax.optimization_barrier((box, cotangent))
    return transposed(cotangent, box), None

  run = jax.custom_vjp(product)
  run.defvjp(forward, backward)
  return run
