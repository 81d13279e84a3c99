"""The numbers that codes of few bits stand for: NF4, FP4, int4, and the 8-bit map of double
quantization.
"""

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


def dynamic_map() -> np.ndarray:
  """The 256 values of the 8-bit code with an exponent of changing length (arXiv:2110.02861),
  float32, ascending.

  Between powers of ten, the means of neighbouring points of an even grid, finer for larger powers;
  each grid point is rounded once, from the nearer end.
  """
  values = [np.float32(0), np.float32(1)]
  for i in range(7):
    count = 2**i
    step = float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count)))
    low, high, place = float(np.float32(0.1)), 1.0, np.arange(count + 1)
    grid = np.where(
      place < (count + 1) // 2, low + place * step, high - (count - place) * step
    ).astype(np.float32)
    means = (grid[:-1] + grid[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    values += [*means, *-means]
  return np.sort(np.array(values, np.float32))


def midpoints(values: np.ndarray) -> np.ndarray:
  """Where the nearest of ascending values changes."""
  return (values[1:] + values[:-1]) / np.float32(2)
