"""Blocks of 4-bit codes: how a matrix is coded, how it lies in memory, and what it stands for.

A weight [out, in] is cut along its rows into blocks that share a scale, as bitsandbytes does. In
memory the matrix is [in, out]: the codes of its upper half are the low nibbles and those of its
lower half the high ones, so that nothing is interleaved when they are taken apart; scales are [in /
block, out]. Where blocks cross rows, codes and scales are flat, in the order of the rows.
"""

import difflib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import maps

GROUP = 256  # absmax values that share a scale when they are quantized themselves
MAP = maps.dynamic_map()
_FP4_LEVELS = np.argsort(maps.FP4[:8])
TABLES = {'nf4': maps.NF4, 'fp4': maps.FP4, 'int4': maps.INT4}
# Without a table, of a code, a scale and what is stored as `zero`: a zero point, or the least
# weight of the block.
_LINEAR = {
  'affine': lambda code, scale, zero: (code - zero) * scale,
  'int4_1': lambda code, scale, zero: _rounded(code * scale) + zero,
}


class Format(NamedTuple):
  """A 4-bit format.

  Attributes:
    name: 'nf4', 'fp4', 'int4', 'int4_1' or 'affine'.
    block: weights that share a scale; None for all of a row of [out, in].
    double: whether the scales are stored in 8 bits, in groups of 256 that share a float32.
    bits: of the codes; 'affine' may have fewer than 4, each stored in 4 all the same.
  """

  name: str
  block: int | None
  double: bool
  bits: int = 4

  def encode(self, w: jax.Array) -> dict[str, jax.Array]:
    """The arrays that stand for a matrix [in, out].

    Returns:
      {'codes': uint8, 'absmax': float32 (int4, int4_1: float16), the scales}; with `double`, absmax
      is uint8, and there are 'nested' (float32, one a group) and 'offset' (a float32). 'affine' and
      'int4_1' have 'zero', one a block: uint8, the code of 0; float16, the least weight. Where
      blocks lie in rows of [out, in] and without `double`, columns of the arrays are those of the
      matrix, and may be encoded alone.
    """
    rows, block = w.astype(jnp.float32).T.reshape(-1), self.block or w.shape[0]
    blocks = jnp.pad(rows, (0, -rows.size % block)).reshape(-1, block)
    codes, *facts = {'int4': _int4, 'int4_1': _int4_1, 'affine': self._affine}.get(
      self.name, self._coded
    )(blocks)
    codes, arrays = (
      codes.reshape(-1)[: rows.size],
      dict(zip(('absmax', 'zero'), facts, strict=False)),
    )
    if self.aligned(w.shape):
      codes = codes.reshape(w.shape[::-1]).T
      arrays = {n: x.reshape(w.shape[1], -1).T for n, x in arrays.items()}
    if self.double:
      arrays = self.nest(arrays['absmax'], w.shape)
    return {'codes': pack(codes, self.zero), **arrays}

  def nest(self, absmax: jax.Array, shape: tuple[int, int]) -> dict[str, jax.Array]:
    """Scales that were encoded without `double`, in 8 bits: the absmax, nested and offset of
    `encode`.
    """
    absmax = absmax.T if self.aligned(shape) else absmax  # groups follow the rows of [out, in]
    offset = jnp.mean(absmax)
    centred = absmax.reshape(-1) - offset
    groups = jnp.pad(centred, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    nested = jnp.max(jnp.abs(groups), 1)
    x = groups / jnp.where(nested == 0, 1, nested)[:, None]
    codes = jnp.searchsorted(jnp.asarray(maps.midpoints(MAP)), x.reshape(-1)[: absmax.size])
    codes = codes.astype(jnp.uint8).reshape(absmax.shape)
    return {'absmax': codes.T if self.aligned(shape) else codes, 'nested': nested, 'offset': offset}

  def decode(self, arrays: dict[str, jax.Array], shape: tuple[int, int]) -> jax.Array:
    """The matrix [in, out], float32."""
    packed, block, size = arrays['codes'], self.block or shape[0], shape[0] * shape[1]
    scale = self.scales(arrays, shape)
    linear = _LINEAR.get(self.name)
    zero = arrays['zero'].astype(jnp.float32) if linear else scale

    def values(codes, scale, zero):
      if linear:
        return linear(codes.astype(jnp.float32), scale, zero)
      return lookup(codes, TABLES[self.name]) * scale

    if self.aligned(shape):
      # In halves, where no block lies in both: XLA for TPU would else store the float32 values
      # beside the product.
      parts = (
        (packed & 15, packed >> 4) if shape[0] % (2 * block) == 0 else (unpack(packed)[: shape[0]],)
      )
      facts = zip(parts, jnp.split(scale, len(parts)), jnp.split(zero, len(parts)), strict=True)
      found = [
        values(part.reshape(-1, block, shape[1]), s[:, None], z[:, None]) for part, s, z in facts
      ]
      return jnp.concatenate(found).reshape(shape)
    codes = jnp.pad(unpack(packed)[:size], (0, -size % block)).reshape(-1, block)
    return values(codes, scale[:, None], zero[:, None]).reshape(-1)[:size].reshape(shape[::-1]).T

  def scales(self, arrays: dict[str, jax.Array], shape: tuple[int, int]) -> jax.Array:
    """The scale of every block, float32, laid out as absmax."""
    absmax = arrays['absmax']
    if not self.double:
      return absmax.astype(jnp.float32)
    order = absmax.T if self.aligned(shape) else absmax
    group = jnp.repeat(arrays['nested'], GROUP)[: absmax.size].reshape(order.shape)
    group = group.T if self.aligned(shape) else group
    product = jnp.asarray(MAP)[absmax.astype(jnp.int32)] * group
    return _rounded(product) + arrays['offset']

  def aligned(self, shape: tuple[int, int]) -> bool:
    """Whether every block lies in one row of [out, in]."""
    return shape[0] % (self.block or shape[0]) == 0

  @property
  def zero(self) -> int:
    """The code that fills up."""
    return 0 if self.name in _LINEAR else int(np.argmin(np.abs(TABLES[self.name])))

  def _affine(self, blocks):
    """Round to nearest between the least and the largest of a block, 0 among them: what is 0 stays
    so.
    """
    low, high = jnp.minimum(blocks.min(1), 0), jnp.maximum(blocks.max(1), 0)
    scale = (high - low) / (2**self.bits - 1)
    wide = jnp.where(scale == 0, 1, scale)
    zero = jnp.round(-low / wide)
    codes = jnp.clip(jnp.round(blocks / wide[:, None]) + zero[:, None], 0, 2**self.bits - 1)
    return codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8)

  def _coded(self, blocks):
    absmax = jnp.max(jnp.abs(blocks), 1)
    # A block of zeros has the scale 0, and any code.
    x = blocks * jnp.where(absmax == 0, 0, 1 / absmax)[:, None]
    if self.name == 'nf4':
      return _rank(x, maps.midpoints(maps.NF4)), absmax
    level = _rank(jnp.abs(x), maps.midpoints(maps.FP4[_FP4_LEVELS]))
    return lookup(level, np.resize(_FP4_LEVELS, 16).astype(np.uint8)) | jnp.where(
      x < 0, 8, 0
    ).astype(jnp.uint8), absmax


def nf4(block: int = 64, double: bool = False) -> Format:
  """4-bit normal floats of QLoRA (arXiv:2305.14314): 4.5 bits a weight, 4.127 with `double`.

  Args:
    block: weights that share a scale.
    double: quantize the scales too.
  """
  return _checked(Format('nf4', block, double))


def fp4(block: int = 64, double: bool = False) -> Format:
  """4-bit floats as bitsandbytes has them; for the arguments see `nf4`."""
  return _checked(Format('fp4', block, double))


def int4(minimum: bool = False) -> Format:
  """4-bit integers in blocks of 32 with a float16 scale: Q4_0 of GGUF, 4.5 bits a weight.

  Args:
    minimum: also store the least weight of a block in float16, from which its codes count: Q4_1, 5
      bits a weight.
  """
  return Format('int4_1' if minimum else 'int4', 32, False)


def affine(block: int | None = None, bits: int = 4) -> Format:
  """Integers with a scale and a zero point for every output channel, or block of it: (code - zero)
  * scale.

  Args:
    block: weights of a channel that share both; None for the whole channel.
    bits: levels are 2^bits; each code takes 4 bits all the same.
  """
  if bits not in (2, 3, 4):
    raise ValueError(f'affine: bits={bits} must be 2, 3 or 4')
  return (
    Format('affine', None, False, bits)
    if block is None
    else _checked(Format('affine', block, False, bits))
  )


# By the names that configurations and the registry of methods use.
FORMATS = {
  'nf4': nf4,
  'nf4_double': functools.partial(nf4, double=True),
  'fp4': fp4,
  'fp4_double': functools.partial(fp4, double=True),
  'int4': int4,
  'int4_1': functools.partial(int4, minimum=True),
  'affine': affine,
}


def named(name: str) -> Format:
  """A format by its name in FORMATS.

  Raises:
    ValueError: there is none.
  """
  if name not in FORMATS:
    near = difflib.get_close_matches(str(name), FORMATS, 1)
    raise ValueError(
      f'no 4-bit format is called {name!r}'
      + (f'; did you mean {near[0]!r}?' if near else '')
      + f' There are: {", ".join(FORMATS)}'
    )
  return FORMATS[name]()


def _checked(form: Format) -> Format:
  if form.block < 32 or form.block & (form.block - 1):
    raise ValueError(f'{form.name}: block={form.block} must be a power of two, at least 32')
  return form


def pack(codes: jax.Array, fill: int = 0) -> jax.Array:
  """Two codes a byte: the first half of axis 0 in the low nibbles, the second in the high ones."""
  if codes.shape[0] % 2:
    codes = jnp.concatenate([codes, jnp.full((1, *codes.shape[1:]), fill, codes.dtype)])
  low, high = jnp.split(codes.astype(jnp.uint8), 2)
  return low | high << 4


def unpack(packed: jax.Array) -> jax.Array:
  """The inverse of `pack`; a code that filled up stays."""
  return jnp.concatenate([packed & 15, packed >> 4])


def lookup(codes: jax.Array, table: np.ndarray) -> jax.Array:
  """table[codes] for 16 entries, by four levels of selections: no gather, which accelerators are
  slow at.
  """
  values = [jnp.asarray(x) for x in table]
  for bit in range(4):
    one = (codes & (1 << bit)) != 0
    values = [jnp.where(one, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def _rounded(product):
  """A product to which something is added: a choice between them, lest a compiler makes one
  operation of both.
  """
  return jnp.where(product == product, product, 0)


def _rank(x, thresholds):
  return sum((x > t).astype(jnp.uint8) for t in thresholds)


def _int4(blocks):
  """The number of largest magnitude becomes -8; halves round up."""
  most = jnp.take_along_axis(blocks, jnp.argmax(jnp.abs(blocks), 1)[:, None], 1)[:, 0]
  scale = most / -8
  x = blocks * jnp.where(scale == 0, 0, 1 / scale)[:, None]
  return jnp.clip(jnp.trunc(x + 8.5), 0, 15).astype(jnp.uint8), scale.astype(jnp.float16)


def _int4_1(blocks):
  """The least number becomes 0 and the largest 15; halves round up."""
  low, high = blocks.min(1), blocks.max(1)
  scale = (high - low) / 15
  x = (blocks - low[:, None]) * jnp.where(scale == 0, 0, 1 / scale)[:, None]
  return (
    jnp.clip(jnp.trunc(x + 0.5), 0, 15).astype(jnp.uint8),
    scale.astype(jnp.float16),
    low.astype(jnp.float16),
  )
