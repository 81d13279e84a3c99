"""What 4-bit formats share: blocks that share a scale, and how a matrix lies in memory.

A weight [out, in] is cut along its rows into blocks that share a scale, as bitsandbytes does. In
memory the matrix is [in, out]: the codes of its upper half are the low nibbles and those of its
lower half the high ones, so that nothing is interleaved when they are taken apart. The scales are
[in / block, out]. Where blocks cross rows, codes and scales are flat, in the order of the rows.
"""

import dataclasses
from typing import ClassVar, Protocol, Self

import jax
import jax.numpy as jnp

from pallas_kernels import codes as arithmetic
from pallas_kernels import pack, unpack

GROUP = 256  # absmax values that share a scale when they are quantized themselves
MAP = arithmetic.dynamic_map()

Arrays = dict[str, jax.Array]


class Format(Protocol):
  """A 4-bit format: a value that can be hashed and compared, static under jit.

  Attributes:
    name: in configurations and files.
    block: weights that share a scale; None for all of a row of [out, in].
    double: whether the scales are stored in 8 bits.
  """

  @property
  def name(self) -> str:
    """See above."""

  @property
  def block(self) -> int | None:
    """See above."""

  @property
  def double(self) -> bool:
    """See above."""

  def encode(self, w: jax.Array) -> Arrays:
    """The arrays that stand for a matrix [in, out], 'codes' (uint8) and 'absmax' among them.

    Where `aligned` and without `double`, the columns of the arrays are those of the matrix, so that
    columns may be encoded alone.
    """

  def decode(self, arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
    """The matrix [in, out], float32."""

  def scales(self, arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
    """The scale of every block, float32, laid out as 'absmax'."""

  def nest(self, absmax: jax.Array, shape: tuple[int, int]) -> Arrays:
    """Scales that were encoded without `double`, in 8 bits."""

  def single(self) -> Self:
    """The same format with scales that are stored as they are."""

  def aligned(self, shape: tuple[int, int]) -> bool:
    """Whether every block lies in one row of [out, in]."""


@dataclasses.dataclass(frozen=True)
class Blocks:
  """A format whose blocks of weights share a scale. A subclass says how a block is coded.

  Attributes:
    block: weights that share a scale; None for all of a row of [out, in].
    double: whether the scales are stored in 8 bits, in groups of 256 that share a float32.
    bits: of the codes; fewer than 4 are stored in 4 all the same.
  """

  block: int | None = 64
  double: bool = False
  bits: int = 4

  name: ClassVar[str]
  # The code that fills up a byte.
  zero: ClassVar[int] = 0

  def code(self, blocks: jax.Array) -> tuple[jax.Array, Arrays]:
    """(codes [n, block], facts {'absmax': [n], ...} of each block) of float32 blocks [n, block]."""
    raise NotImplementedError

  def value(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """The weights of codes; `scale` and `zero` have one entry a block and broadcast to them.

    Args:
      codes: uint8.
      scale: float32.
      zero: what `code` returned as 'zero', float32; None if it did not.
    """
    raise NotImplementedError

  def encode(self, w: jax.Array) -> Arrays:
    """The arrays that stand for a matrix [in, out].

    Returns:
      {'codes': uint8, 'absmax': the scales, ...}, and what else `code` finds of a block. With
      `double`, 'absmax' is uint8, and there are 'nested' (float32, one a group) and 'offset' (a
      float32).
    """
    rows = w.astype(jnp.float32).T.reshape(-1)  # the rows of [out, in]
    block = self.block or w.shape[0]
    blocks = jnp.pad(rows, (0, -rows.size % block)).reshape(-1, block)
    codes, facts = self.code(blocks)
    codes = codes.reshape(-1)[: rows.size]
    if self.aligned(w.shape):  # else everything stays flat
      codes = codes.reshape(w.shape[::-1]).T
      facts = {name: x.reshape(w.shape[1], -1).T for name, x in facts.items()}
    if self.double:
      facts = self.nest(facts['absmax'], w.shape)
    return {'codes': pack(codes, fill=self.zero), **facts}

  def nest(self, absmax: jax.Array, shape: tuple[int, int]) -> Arrays:
    """Scales that were encoded without `double`, in 8 bits: 'absmax', 'nested' and 'offset'."""
    absmax = self._turned(absmax, shape)  # groups follow the rows of [out, in]
    offset = jnp.mean(absmax)
    centred = absmax.reshape(-1) - offset
    groups = jnp.pad(centred, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    nested = jnp.max(jnp.abs(groups), 1)
    x = groups / jnp.where(nested == 0, 1, nested)[:, None]
    thresholds = jnp.asarray(arithmetic.midpoints(MAP))
    codes = jnp.searchsorted(thresholds, x.reshape(-1)[: absmax.size])
    codes = codes.astype(jnp.uint8).reshape(absmax.shape)
    return {'absmax': self._turned(codes, shape), 'nested': nested, 'offset': offset}

  def decode(self, arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
    """The matrix [in, out], float32."""
    block = self.block or shape[0]
    facts = [self.scales(arrays, shape)]
    if 'zero' in arrays:
      facts.append(arrays['zero'].astype(jnp.float32))

    def value(codes, scale, zero=None):
      return self.value(codes, scale, zero)

    if self.aligned(shape):
      return arithmetic.decode_blocks(arrays['codes'], shape, block, value, *facts)
    # Blocks cross rows of [out, in]: everything is flat, in their order.
    size = shape[0] * shape[1]
    codes = unpack(arrays['codes'])[:size]
    codes = jnp.pad(codes, (0, -size % block)).reshape(-1, block)
    rows = value(codes, *(fact[:, None] for fact in facts))
    return rows.reshape(-1)[:size].reshape(shape[::-1]).T

  def scales(self, arrays: Arrays, shape: tuple[int, int]) -> jax.Array:
    """The scale of every block, float32, laid out as 'absmax'."""
    absmax = arrays['absmax']
    if not self.double:
      return absmax.astype(jnp.float32)
    by_rows = self._turned(absmax, shape).shape
    nested = jnp.repeat(arrays['nested'], GROUP)[: absmax.size].reshape(by_rows)
    product = jnp.asarray(MAP)[absmax.astype(jnp.int32)] * self._turned(nested, shape)
    return rounded(product) + arrays['offset']

  def _turned(self, x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One entry a block, from the layout in memory to the order of rows of [out, in], or back."""
    if self.aligned(shape):
      return x.T
    return x

  def single(self) -> Self:
    """The same format with scales that are stored as they are."""
    return dataclasses.replace(self, double=False)

  def aligned(self, shape: tuple[int, int]) -> bool:
    """Whether every block lies in one row of [out, in]."""
    return shape[0] % (self.block or shape[0]) == 0


def checked(form: Blocks) -> Blocks:
  """The format itself.

  Raises:
    ValueError: a size of blocks that is not supported.
  """
  if form.block < 32 or form.block & (form.block - 1):
    raise ValueError(f'{form.name}: block={form.block} must be a power of two, at least 32')
  return form


def rounded(product: jax.Array) -> jax.Array:
  """A product to which something is added, rounded on its own.

  The selection between equals keeps compilers from making one operation of product and sum, whose
  result has other bits.
  """
  return jnp.where(product == product, product, 0)
