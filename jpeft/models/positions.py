"""Position tables for images of another size."""

import numpy as np


def resize_grid(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Resizes the patch part of a position table; leading tokens (class, distillation) stay.

  Bicubic with the kernel constant -0.75, half-pixel centres, repeated borders and no smoothing:
  the rule that published checkpoints are evaluated with, not the one of jax.image (-0.5).

  Args:
    table: [1, lead + old rows * old columns, D].
    old: rows and columns of the table.
    new: rows and columns wanted.

  Returns:
    An array [1, lead + new rows * new columns, D] of the table's dtype.
  """
  lead = table.shape[1] - old[0] * old[1]
  patches = table[0, lead:].astype(np.float64).reshape(*old, -1)
  rows, columns = _bicubic(old[0], new[0]), _bicubic(old[1], new[1])
  patches = np.einsum('ri,cj,ijd->rcd', rows, columns, patches, optimize=True)
  patches = patches.reshape(1, new[0] * new[1], -1).astype(table.dtype)
  return np.concatenate([table[:, :lead], patches], 1)


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """The matrix [new, old] that resizes one axis (Keys, 1981)."""
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(centre).astype(int)
  matrix = np.zeros((new, old))
  for offset in range(-1, 3):
    x = np.abs(centre - first - offset)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    weight = np.where(x <= 1, near, far)
    np.add.at(matrix, (np.arange(new), np.clip(first + offset, 0, old - 1)), weight)
  return matrix
