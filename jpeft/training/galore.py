"""GaLore and Natural GaLore: Adam whose moments are those of projected gradients.

Zhao et al., 2024 (arXiv 2403.03507); Das, 2024, "Natural GaLore" (2410.16029). For a gradient g
[m, n] of one matrix and a projection p with orthonormal columns, its leading singular vectors at
the last refresh, of which there is one each `every` updates:

  left    p [m, r] = U_r      r_t = p^T g  [r, n]      back(u) = p u
  right   p [n, r] = V_r      r_t = g p    [m, r]      back(u) = u p^T

Adam's moments are kept of r_t, and the update is scale * back(Adam's direction). The side is the
shorter one unless it is chosen. The state of a matrix is r m + 2 r n numbers (m <= n, left), where
Adam has 2 m n. Moments are neither rotated nor cleared by a refresh, as in the official code; the
first refresh is at the first update.

`basis='sketch'` finds nearly the same vectors as the SVD by products with the gradient, QR
decompositions of thin matrices, [m, r + 8] and [n, r + 8], and one small eigendecomposition (Halko
et al., 2011, arXiv 0909.4061). It pays where r is far below m and n.

Natural GaLore puts (damping I + H H^T)^-1 r_t in place of r_t, with H = [vec r_{t-s+1} .. vec r_t],
s = `history`. r_t is the last column e_s of H, so that this is H (damping I + H^T H)^-1 e_s: a
system of s equations, and none of the cancellation that the form by Woodbury's identity has in
float32. The history is s r n further numbers and can outweigh what the projection saves.

No gradient need outlive its update: in unrolled models the compiler frees one after the other, as
the official code does by hooks, unless `clip_norm` asks for the norm of all of them. A scanned
stack has its gradients at once.

Both are transforms of one matrix; `on_matrices` runs them on theta. Adam here adds eps to the root
of the mean square before the bias is corrected, as the official code does.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

SIDES = ('short', 'long', 'left', 'right')
BASES = ('svd', 'sketch')
# Of a sketch: vectors beside the r that are wanted, and products with the gradient and back.
_BESIDE = 8
_ROUNDS = 2


class GaLoreState(NamedTuple):
  """State of `scale_by_galore` for a matrix [m, n].

  Attributes:
    count: updates so far.
    basis: p, [m, r] or [n, r].
    mean: of the projected gradient, [r, n] or [m, r].
    square: mean of its square.
    history: the last projected gradients as rows [s, r n]; None for plain GaLore.
  """

  count: jax.Array
  basis: jax.Array
  mean: jax.Array
  square: jax.Array
  history: jax.Array | None


def scale_by_galore(
  rank: int = 128,
  every: int = 200,
  scale: float = 0.25,
  side: str = 'short',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  history: int | None = None,
  damping: float = 1e-3,
  basis: str = 'svd',
) -> optax.GradientTransformation:
  """Adam's direction of a matrix, from projected gradients (arXiv 2403.03507).

  Args:
    rank: r; a matrix whose shorter side is shorter still keeps that side.
    every: updates from one refresh of p to the next.
    scale: of the update, alpha in the paper.
    side: which is projected: the 'short' one of the matrix or the 'long' one (of a square matrix
      its n), 'left' (m) or 'right' (n).
    b1, b2, eps: of Adam.
    history: s, projected gradients that Natural GaLore (2410.16029) keeps; None for GaLore.
    damping: of Natural GaLore.
    basis: how p is found: by an 'svd' of the gradient, or by a random 'sketch' of it.

  Raises:
    ValueError: an argument outside its range.
  """
  for name, value, least in (('rank', rank, 1), ('every', every, 1), ('history', history, 1)):
    if value is not None and (int(value) != value or value < least):
      raise ValueError(f'galore: {name}={value!r} must be a whole number, at least {least}')
  if side not in SIDES:
    raise ValueError(f'galore: side={side!r} is none of {", ".join(SIDES)}')
  if basis not in BASES:
    raise ValueError(f'galore: basis={basis!r} is none of {", ".join(BASES)}')

  def init(w):
    m, n = w.shape
    r = min(rank, m, n)
    if _is_left(side, m, n):
      vectors, projected = (m, r), (r, n)
    else:
      vectors, projected = (n, r), (m, r)
    past = None
    if history is not None:
      past = jnp.zeros((history, projected[0] * projected[1]))
      _warn_of_history(m, n, vectors, projected, history)
    # An array each: an update is given their memory for its results.
    mean, square = jnp.zeros(projected), jnp.zeros(projected)
    return GaLoreState(jnp.zeros((), jnp.int32), jnp.zeros(vectors), mean, square, past)

  def update(g, state, w=None):
    gradient = g.astype(jnp.float32)
    left = _is_left(side, *g.shape)

    def refreshed():
      r = state.basis.shape[1]
      if basis == 'sketch':
        return sketched(gradient if left else gradient.T, r, jax.random.key(state.count))
      u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
      return u[:, :r] if left else vt[:r].T

    p = jax.lax.cond(state.count % every == 0, refreshed, lambda: state.basis)
    low = p.T @ gradient if left else gradient @ p
    past = state.history
    if past is not None:
      past = jnp.concatenate([past[1:], low.reshape(1, -1)])
      low = natural(past, damping).reshape(low.shape)
    count = state.count + 1
    mean = b1 * state.mean + (1 - b1) * low
    square = b2 * state.square + (1 - b2) * low**2
    corrected = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    direction = corrected * mean / (jnp.sqrt(square) + eps)
    back = p @ direction if left else direction @ p.T
    return (scale * back).astype(g.dtype), GaLoreState(count, p, mean, square, past)

  return optax.GradientTransformation(init, update)


def sketched(matrix: jax.Array, rank: int, key: jax.Array) -> jax.Array:
  """Nearly the leading left singular vectors of a matrix, by algorithms 4.4 and 5.1 of 0909.4061.

  Args:
    matrix: [m, n].
    rank: r, at most m and n.
    key: of the random columns that the range is found with.

  Returns:
    [m, r] with orthonormal columns, those of the largest singular values first.
  """
  size = min(rank + _BESIDE, *matrix.shape)
  # A TPU would multiply in bfloat16 otherwise, and orthonormal columns would be so to 1e-3.
  with jax.default_matmul_precision('highest'):
    drawn = jax.random.normal(key, (matrix.shape[1], size), matrix.dtype)
    columns, _ = jnp.linalg.qr(matrix @ drawn)
    for _ in range(_ROUNDS):
      rows, _ = jnp.linalg.qr(matrix.T @ columns)
      columns, _ = jnp.linalg.qr(matrix @ rows)
    small = columns.T @ matrix
    _, vectors = jnp.linalg.eigh(small @ small.T)  # the smallest first
    return columns @ vectors[:, ::-1][:, :rank]


def natural(history: jax.Array, damping: float) -> jax.Array:
  """(damping I + H H^T)^-1 g of the last gradient g.

  Args:
    history: H^T, gradients as rows [s, k], g the last.
    damping: above 0.

  Returns:
    [k].
  """
  count = len(history)
  gram = history @ history.T + damping * jnp.eye(count, dtype=history.dtype)
  factor = jax.scipy.linalg.cho_factor(gram)
  last = jnp.zeros(count, history.dtype).at[-1].set(1)
  return jax.scipy.linalg.cho_solve(factor, last) @ history


def _is_left(side: str, m: int, n: int) -> bool:
  if side in ('left', 'right'):
    return side == 'left'
  return (m < n) == (side == 'short')


def _warn_of_history(m: int, n: int, vectors, projected, history: int) -> None:
  size = projected[0] * projected[1]
  ours = vectors[0] * vectors[1] + (2 + history) * size
  if ours <= 2 * m * n:
    return
  most = (2 * m * n - vectors[0] * vectors[1]) // size - 2
  instead = f'history={most} needs no more' if most >= 1 else 'take a lower rank'
  warnings.warn(
    f'natural GaLore keeps {ours:,} numbers of a matrix [{m}, {n}], and Adam {2 * m * n:,}: '
    f'{instead}',
    stacklevel=2,
  )
