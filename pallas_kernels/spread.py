"""A product from 4-bit codes as one operation, which decides how it runs when it is lowered.

At that time the platform is known, and the mesh of devices. XLA partitions no kernel, so on a mesh
every device runs its own, inside of a shard_map: on the columns of W that the axis `model` gives
it, and on those rows of x that the other axes give it: the last axis of rows is that of tokens,
which the axis `sequence` splits. Under vmap rows that are mapped are more rows.
"""

import functools
import math
from typing import Protocol

import jax
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from .choice import KERNELS, OPERATION

COLUMNS = 'model'  # the axis of a mesh over which columns are split
TOKENS = 'sequence'  # the axis over which tokens are split, the axis of x before the last


class Product(Protocol):
  """x @ W, or g @ W^T; a value that can be hashed and compared."""

  @property
  def transposed(self) -> bool:
    """Whether it is g @ W^T."""

  def turned(self) -> 'Product':
    """The product with W^T instead of W, or the other way round."""

  def plain(self, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """By operations of XLA."""

  def on_device(
    self, platform: str | None, x: jax.Array, codes: jax.Array, scales: jax.Array
  ) -> jax.Array:
    """As is best on one device of a platform."""

  def of_many(self, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """By operations that can be mapped over codes and scales."""


def multiply(product: Product, x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
  """The product as one operation.

  Args:
    product: what is computed.
    x: [..., in]; [..., out] of a transposed one.
    codes: uint8 [in / 2, out].
    scales: float32 [in / block, out].
  """
  avals = tuple(jax.typeof(array) for array in (x, codes, scales))
  if any(AxisType.Explicit in aval.sharding.mesh.axis_types for aval in avals):
    # Types say where arrays are, and the operation has no rule for them.
    return product.plain(x, codes, scales)
  # The plain product as a program, which shows the shape and the cost.
  call = _plain(product).trace(x, codes, scales).jaxpr
  return _OPERATION.bind(x, codes, scales, product=product, call=call)


@functools.lru_cache(maxsize=256)
def _plain(product: Product):
  return jax.jit(product.plain)


_OPERATION = Primitive(OPERATION)
# Else a rule is not told of the mesh. Where a version of JAX has no such set, XLA multiplies there.
getattr(dispatch, 'prim_requires_devices_during_lowering', set()).add(_OPERATION)


@_OPERATION.def_abstract_eval
def _shape(*_, product, call):
  del product
  return call.out_avals[0]


@functools.lru_cache(maxsize=256)
def _compiled(product: Product):
  return jax.jit(functools.partial(multiply, product))


@_OPERATION.def_impl
def _run(*arrays, product, call):
  del call
  return _compiled(product)(*arrays)


def _mapped(arrays, axes, *, product, call):
  del call
  x, *matrix = arrays
  of_x, *of_matrix = axes
  if any(axis is not None for axis in of_matrix):
    return jax.vmap(product.of_many, axes)(*arrays), 0
  return multiply(product, jax.numpy.moveaxis(x, of_x, 0), *matrix), 0


batching.primitive_batchers[_OPERATION] = _mapped


def _pushed(arrays, tangents, *, product, call):
  """The product is linear in x, and the matrix is constant."""
  x, *matrix = arrays
  of_x, _, of_scales = tangents
  if not isinstance(of_scales, ad.Zero):
    raise NotImplementedError('the scales of a product from 4-bit codes have no derivative')
  y = _OPERATION.bind(x, *matrix, product=product, call=call)
  if isinstance(of_x, ad.Zero):
    return y, ad.Zero.from_primal_value(y)
  return y, multiply(product, of_x, *matrix)


def _pulled(cotangent, x, *matrix, product, call):
  del x, call
  if isinstance(cotangent, ad.Zero):
    return [None, None, None]
  return [multiply(product.turned(), cotangent, *matrix), None, None]


ad.primitive_jvps[_OPERATION] = _pushed
ad.primitive_transposes[_OPERATION] = _pulled


def _lowered(platform, context, *values, product, call):
  del call
  run = functools.partial(product.on_device, platform)
  devices = context.module_context.axis_context
  if hasattr(devices, 'manual_axes'):  # inside of a shard_map
    if {*devices.manual_axes, *devices.mesh.manual_axes} != set(devices.mesh.axis_names):
      run = product.plain
  elif getattr(devices, 'num_devices', 0) != 1:
    run = product.plain
    mesh = getattr(devices, 'abstract_mesh', None)
    if mesh is not None and mesh.size > 1:
      run = _on_mesh(platform, product, mesh, context.avals_in[0].shape, context.avals_in[1].shape)
  return mlir.lower_fun(run, multiple_results=False)(context, *values)


mlir.register_lowering(_OPERATION, functools.partial(_lowered, None))
for _platform in KERNELS:
  mlir.register_lowering(_OPERATION, functools.partial(_lowered, _platform), platform=_platform)


def _on_mesh(platform, product: Product, mesh, of_x: tuple[int, ...], of_codes: tuple[int, ...]):
  """The product on every device of a mesh.

  Args:
    platform: of the devices.
    product: what is computed.
    mesh: of all devices.
    of_x: the shape of x.
    of_codes: the shape of the codes.
  """
  leading, columns = shares(mesh, of_x[:-1], of_codes[1])
  of_rows = P(*leading, None)
  of_columns = P(*leading, columns)
  given, made = (of_columns, of_rows) if product.transposed else (of_rows, of_columns)

  def run(x, codes, scales):
    y = product.on_device(platform, x, codes, scales)
    if product.transposed and columns is not None:
      y = jax.lax.psum(y, columns)
    return y

  specs = (given, P(None, columns), P(None, columns))
  return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=made, check_vma=False)


def shares(
  mesh, leading: tuple[int, ...], columns: int
) -> tuple[list[tuple[str, ...]], str | None]:
  """(for each axis of x but the last the axes of a mesh that split it, the one of W's columns).

  Axes that do not divide a length leave it whole.

  Args:
    mesh: of all devices.
    leading: lengths of the axes of x, without that which is summed over.
    columns: of W.
  """
  of_columns = None
  if COLUMNS in mesh.axis_names and columns % mesh.shape[COLUMNS] == 0:
    of_columns = COLUMNS
  found: list[tuple[str, ...]] = [() for _ in leading]
  for axis in mesh.axis_names:
    if axis == COLUMNS or not leading:
      continue
    place = len(leading) - 1 if axis == TOKENS else 0
    parts = math.prod(mesh.shape[name] for name in (*found[place], axis))
    if leading[place] % parts == 0:
      found[place] = (*found[place], axis)
  return found, of_columns
