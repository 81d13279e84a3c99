"""OFT and BOFT: the input of a kernel is rotated, block by block.

OFT: Qiu et al., 2023 (arXiv 2306.07280), as scaled in 2506.19847. BOFT: Liu et al., 2023
(2311.06243). For a kernel w [fan_in, fan_out] (the papers' W is its transpose), skew-symmetric Q_b
[s, s] of each of fan_in / s blocks, R block-diagonal:

  OFT   w' = R w                       y' = (x R) w
  BOFT  w' = M_k .. M_1 w diag(g)      M_i = P_i R_i P_i^T, P_i a butterfly's permutation; g = 1
  R_b = (I - Q_b) (I + Q_b)^-1, or n terms I + 2 Q_b + .. + 2 Q_b^(n-2) + Q_b^(n-1) of the same
        of -Q_b, as peft has the series

Q = 0 at first. x is rotated, so that no gradient of the kernel's size is formed; the backward pass
keeps x and rotates it again. P_i takes the halves of the blocks that 2^(i-1) blocks have together
in the order 0, 2, 4 .., 1, 3, 5 ..: after k factors each output of a rotation sees 2^(k-1) blocks.

In the files of Hugging Face peft oft_R.weight has the entries of Q_b above the diagonal, minus that
below; boft_R has any matrices A, of which Q = (A - A^T) / 2; boft_s is g.

Deviations. A convolution is folded to a matrix, and there w' is formed. The constrained variant
(COFT) is left out. peft computes BOFT of one factor where its CUDA extension is missing, whatever
was asked for; here it is as many as are asked for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, Weight, at, factory, matrix

from ..check import require, whole
from .snell import changed_product


@factory
def oft(
  block: int = 32,
  targets: str = '{q}|{v}',
  blocks: int | None = None,
  shared: bool = False,
  terms: int = 5,
  name: str = 'oft',
) -> Method:
  """Orthogonal fine-tuning.

  Args:
    block: s, the size of a block; the nearest divisor of fan_in where it is none.
    targets: pattern of sites; every kernel they own is adapted.
    blocks: how many instead, on the same terms; `block` is not read then.
    shared: whether the blocks of a kernel are one rotation.
    terms: n, of the series; 0 for the rotation itself.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  whole('oft', 'block', block, 2)
  if blocks is not None:
    whole('oft', 'blocks', blocks, 1)
  require(terms == 0 or terms >= 4, 'oft', 'terms', terms, 'must be 0, or at least 4')

  def init(key, w):
    fan_in, _ = w.shape
    size = fan_in // nearest_divisor(fan_in, blocks) if blocks else nearest_divisor(fan_in, block)
    count = 1 if shared else fan_in // size
    return {'q': jnp.zeros((count, size * (size - 1) // 2))}

  def rotations(t, fan_in: int):
    """[1, fan_in / s, s, s]."""
    found = rotation(skew(t['q']), terms)
    if shared:
      found = jnp.broadcast_to(found, (fan_in // found.shape[-1], *found.shape[1:]))
    return found[None]

  def ones(t):
    return 1

  return at(targets, _rotated(name, init, rotations, ones, ('q',)))


@factory
def boft(
  block: int = 4,
  targets: str = '{q}|{v}',
  factors: int = 1,
  name: str = 'boft',
) -> Method:
  """Orthogonal fine-tuning by butterflies.

  Args:
    block: s, the size of a block; with several factors it is even.
    targets: pattern of sites; every kernel they own is adapted.
    factors: k.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a kernel whose fan_in is no
      multiple of s 2^(k - 1).
  """
  whole('boft', 'block', block, 2)
  whole('boft', 'factors', factors, 1)
  is_even = factors == 1 or block % 2 == 0
  require(is_even, 'boft', 'block', block, 'must be even with several factors')

  def init(key, w):
    fan_in, fan_out = w.shape
    needed = block * 2 ** (factors - 1)
    require(
      fan_in % needed == 0, name, 'block', block, f'times 2^(factors - 1) divides no {fan_in}'
    )
    return {
      'r': jnp.zeros((factors, fan_in // block, block, block)),
      'g': jnp.ones(fan_out),
    }

  def rotations(t, fan_in: int):
    return rotation((t['r'] - jnp.swapaxes(t['r'], -1, -2)) / 2, 0)

  def gains(t):
    return t['g']

  return at(targets, _rotated(name, init, rotations, gains, ('r', 'g')))


def _rotated(name: str, init, rotations, gains, exact: tuple[str, ...]) -> Weight:
  """A rule that rotates what kernels are multiplied by.

  Args:
    name: of the rule.
    init: (key, w) -> t.
    rotations: (t, fan_in) -> R_1 .. R_k [k, fan_in / s, s, s].
    gains: t -> g, or 1.
    exact: the entries of t; in the dtype of the tokens a rotation would not be one.
  """

  def weight(t, w):
    transposed = jnp.swapaxes(rotations(t, len(w)), -1, -2)
    turned = multiplied(w.T.astype(jnp.float32), transposed, last_first=False)
    return (turned.T * gains(t)).astype(w.dtype)

  def dot(t, x, y, w, key):
    if x.rows is None:

      def change(t):
        return weight(t, w()) - w()

      return changed_product(change, t, x, y, w, key, 0, 0)

    @jax.checkpoint
    def product(v, t):
      found = rotations(t, x.fan_in).astype(v.dtype)
      turned = multiplied(x.rows(v), found, last_first=True)
      return (turned @ w().astype(v.dtype)) * jnp.asarray(gains(t), v.dtype)

    return product(x.x, t)

  return matrix(name, init, weight, dot, exact=exact)


def multiplied(x: jax.Array, rotations: jax.Array, last_first: bool) -> jax.Array:
  """x [.., n] times M_k .. M_1, or times M_1 .. M_k, M_i = P_i R_i P_i^T.

  Args:
    x: rows.
    rotations: R_1 .. R_k [k, n / s, s, s].
    last_first: the former.
  """
  factors, _, size, _ = rotations.shape
  order = range(factors)
  for i in reversed(order) if last_first else order:
    places = butterfly(x.shape[-1], size, i)
    x = x[..., np.argsort(places)]
    tiles = x.reshape(*x.shape[:-1], -1, size)
    x = jnp.einsum('...bk,bkc->...bc', tiles, rotations[i]).reshape(x.shape)
    x = x[..., places]
  return x


@functools.cache
def butterfly(n: int, size: int, factor: int) -> np.ndarray:
  """The permutation of a factor, from 0 on, of blocks of a size: numbers below n [n]."""
  if factor == 0:
    return np.arange(n)
  halves = np.arange(n).reshape(-1, 2 * 2**factor, size // 2)
  return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


def skew(q: jax.Array) -> jax.Array:
  """[.., s, s] of the entries above the diagonal [.., s (s - 1) / 2], row by row."""
  size = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
  rows, columns = np.triu_indices(size, 1)
  upper = jnp.zeros((*q.shape[:-1], size, size), q.dtype).at[..., rows, columns].set(q)
  return upper - jnp.swapaxes(upper, -1, -2)


def rotation(q: jax.Array, terms: int) -> jax.Array:
  """(I - q) (I + q)^-1 of skew-symmetric q [.., s, s], or terms of the series of its inverse."""
  unit = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)
  if terms == 0:
    # Both factors are of q alone, so that they commute.
    return jnp.linalg.solve(unit + q, unit - q)
  found, power = unit, unit
  for number in range(1, terms):
    power = power @ q
    found = found + (power if number == terms - 1 else 2 * power)
  return found


def nearest_divisor(size: int, wanted: int) -> int:
  """The divisor of a size that is nearest to a number, the smaller of two; at most the size."""
  divisors = [n for n in range(1, size + 1) if size % n == 0]
  return min(divisors, key=lambda n: (abs(n - wanted), n))
