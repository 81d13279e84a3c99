"""The plain arithmetic of codes of few bits: the numbers they stand for, packing, look-up.

Kernels are compared with it, and jpeft's 4-bit formats are built on it. Nothing here knows of
either.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314).
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
# Bit 3 is the sign; the others are no usual float, but sixths and twelfths of the largest.
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, 0 - _FP4])  # both zeros are positive
INT4 = np.arange(-8, 8, dtype=np.float32)
# The values of the 16 codes, by the name of the format.
VALUES = {'nf4': NF4, 'fp4': FP4, 'int4': INT4}


def dynamic_map(signed: bool = True) -> np.ndarray:
  """The 256 values of the 8-bit code with a dynamic exponent (arXiv:2110.02861), ascending.

  Between powers of ten, the means of neighbouring points of an even grid, finer for larger powers;
  each grid point is rounded once, from the nearer end.

  Args:
    signed: from -1 to 1; else from 0 on, with twice as many values between two powers.
  """
  values = [np.float32(0), np.float32(1)]
  for i in range(7):
    count = 2**i if signed else 2 ** (i + 1)
    step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count)))
    low, high, place = float(np.float32(0.1)), 1.0, np.arange(count + 1)
    grid = np.where(
      place < (count + 1) // 2, low + place * step, high - (count - place) * step
    ).astype(np.float32)
    means = (grid[:-1] + grid[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    values += [*means, *-means] if signed else [*means]
  return np.sort(np.array(values, np.float32))


def midpoints(values: np.ndarray) -> np.ndarray:
  """Where the nearest of ascending values changes."""
  return (values[1:] + values[:-1]) / np.float32(2)


def pack(codes: jax.Array, bits: int = 4, axis: int = 0, fill: int = 0) -> jax.Array:
  """Codes below 2^bits, 8 / bits to a byte.

  The axis is cut into 8 / bits equal planes, the first in the lowest bits. So taking codes apart
  interleaves nothing, which on accelerators would move values between lanes.

  Args:
    codes: integers of any shape.
    bits: 1, 2, 4 or 8.
    axis: which is cut.
    fill: the code that makes the length of the axis a multiple of 8 / bits.
  """
  planes = 8 // bits
  codes = codes.astype(jnp.uint8)
  missing = -codes.shape[axis] % planes
  if missing:
    widths = [(0, 0)] * codes.ndim
    widths[axis] = (0, missing)
    codes = jnp.pad(codes, widths, constant_values=fill)
  packed, *others = jnp.split(codes, planes, axis)
  for i, plane in enumerate(others, 1):
    packed = packed | (plane << (bits * i))
  return packed


def unpack(packed: jax.Array, bits: int = 4, axis: int = 0) -> jax.Array:
  """The inverse of `pack`; codes that filled up the axis stay."""
  mask = jnp.uint8(2**bits - 1)
  planes = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
  return jnp.concatenate(planes, axis)


def halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The 4-bit codes of the upper and of the lower half of axis 0."""
  return packed & 15, packed >> 4


def lookup(codes: jax.Array, table: Sequence[float] | np.ndarray) -> jax.Array:
  """table[codes] for 2^k entries, by k levels of selections.

  Accelerators are slow at gathers, and every backend fuses selections.
  """
  values = [jnp.asarray(x) for x in table]
  for bit in range((len(values) - 1).bit_length()):
    one = (codes & (1 << bit)) != 0
    values = [jnp.where(one, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
  return values[0]


def rank(x: jax.Array, thresholds: np.ndarray) -> jax.Array:
  """How many of the ascending thresholds lie below x, as uint8."""
  return sum((x > t).astype(jnp.uint8) for t in thresholds)


def normalized(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(blocks scaled to [-1, 1], the largest magnitude of each) of blocks [n, block, ...]."""
  absmax = jnp.max(jnp.abs(blocks), 1)
  # A block of zeros has the scale 0, and any code.
  return blocks * jnp.where(absmax == 0, 0, 1 / absmax)[:, None], absmax


def encode_nf4(w: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """(codes uint8 [in / 2, out], absmax float32 [in / block, out]) of a matrix [in, out]."""
  blocks = w.astype(jnp.float32).T.reshape(-1, block)
  x, absmax = normalized(blocks)
  codes = rank(x, midpoints(NF4)).reshape(w.shape[::-1]).T
  return pack(codes), absmax.reshape(w.shape[1], -1).T


def decode_blocks(
  packed: jax.Array,
  shape: tuple[int, int],
  block: int,
  value: Callable[..., jax.Array],
  *facts: jax.Array,
) -> jax.Array:
  """The matrix [in, out] of packed codes whose blocks lie in columns.

  Args:
    packed: uint8 [ceil(in / 2), out].
    shape: [in, out].
    block: rows of a column that share facts; it divides `in`.
    value: (codes [n, block, out], *facts [n, 1, out]) -> weights.
    *facts: what a block has, such as its scale, [in / block, out] each.
  """
  parts = [unpack(packed)[: shape[0]]]
  if shape[0] % (2 * block) == 0:
    # In halves, where no block lies in both: XLA for TPU would else store the float32 values
    # beside the product.
    parts = list(halves(packed))
  halved = [jnp.split(fact, len(parts)) for fact in facts]
  found = []
  for codes, *own in zip(parts, *halved, strict=True):
    codes = codes.reshape(-1, block, shape[1])
    found.append(value(codes, *(fact[:, None] for fact in own)))
  return jnp.concatenate(found).reshape(shape)


def decode(packed: jax.Array, scales: jax.Array, values: np.ndarray, block: int) -> jax.Array:
  """The matrix [in, out], float32, of packed codes [in / 2, out] and scales [in / block, out]."""
  shape = 2 * packed.shape[0], packed.shape[1]
  return decode_blocks(
    packed, shape, block, lambda codes, scale: lookup(codes, values) * scale, scales
  )
