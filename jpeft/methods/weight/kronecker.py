"""LoKr: an update that is the Kronecker product of two small matrices.

Edalati et al., 2022, "KronA" (arXiv 2212.10650); Yeh et al., 2023, LyCORIS (2309.14859). A kernel w
[fan_in, fan_out] (the papers' W is its transpose) with fan_in = m n and fan_out = l k:

  w' = w + s w1 (x) w2       w1 [m, l], w2 [n, k] or a2 b2 of rank r, s = alpha / r; w1 = 0 at first
  y'_lk = y_lk + s sum_mn x_mn w1_ml w2_nk

so that neither the update nor its gradient is ever formed: x [m, n] meets w2, and that meets w1.

m and l are the largest divisors up to the square root, or up to `factor`. w2 is whole where r is at
least half of its larger side, and w1 always, unless `both` asks for a1 b1 where r is less than half
of its larger side. In the files of Hugging Face peft lokr_w1 is w1.T, lokr_w2_a is b2.T and so on.

Deviations. As in peft, and other than in LyCORIS, s is alpha / r where nothing is of rank r, too.
A convolution is folded to a matrix as for LoRA, and there w' is formed.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import Method, at, factory, matrix

from ..check import is_whole, require
from ..nn import uniform
from .lora import check_rank
from .snell import changed_product


@factory
def lokr(
  rank: int = 8,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  factor: int = -1,
  both: bool = False,
  name: str = 'lokr',
) -> Method:
  """Low-rank Kronecker product adaptation.

  Args:
    rank: r.
    alpha: the update is scaled by alpha / rank.
    targets: pattern of sites; every kernel they own is adapted.
    factor: the side of w1, or the largest that it may have; -1 for the square root of the kernel's.
    both: whether w1 is a product of rank r too, where it is large enough.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  check_rank(rank, 0)
  require(alpha > 0, 'lokr', 'alpha', alpha, 'must be greater than 0')
  in_range = factor == -1 or is_whole(factor, 1)
  require(in_range, 'lokr', 'factor', factor, 'must be -1, or a whole number, at least 1')
  scale = alpha / rank

  def init(key, w):
    shapes = shapes_of(*w.shape, rank, factor, both)
    keys = jax.random.split(key, len(shapes))
    drawn = {}
    for own_key, (part, shape) in zip(keys, shapes.items(), strict=True):
      # The bounds of peft, whose matrices are the transposes of these.
      drawn[part] = uniform(own_key, shape, shape[0] ** -0.5)
    zero = 'w1' if 'w1' in drawn else 'b1'
    return {**drawn, zero: jnp.zeros_like(drawn[zero])}

  def update(t):
    return scale * jnp.kron(whole_factor(t, 1), whole_factor(t, 2))

  def weight(t, w):
    return w + update(t).astype(w.dtype)

  def dot(t, x, y, w, key):
    if x.rows is None:
      return changed_product(update, t, x, y, w, key, 0, 0)
    rows = x.rows(x.x)
    w1 = whole_factor(t, 1)
    tiles = rows.reshape(*rows.shape[:-1], len(w1), -1)  # [.., m, n]
    if 'w2' in t:
      change = jnp.einsum('...mk,ml->...lk', tiles @ t['w2'], w1)
    else:
      change = jnp.einsum('...mr,ml->...lr', tiles @ t['a2'], w1) @ t['b2']
    return y + scale * change.reshape(y.shape)

  return at(targets, matrix(name, init, weight, dot))


def whole_factor(t, number: int) -> jax.Array:
  """w1 or w2 of the entries of one kernel."""
  if f'w{number}' in t:
    return t[f'w{number}']
  return t[f'a{number}'] @ t[f'b{number}']


def divided(size: int, factor: int = -1) -> tuple[int, int]:
  """Two numbers whose product is a size.

  The first is `factor` where that divides the size, else the largest divisor that exceeds neither
  the square root nor, unless it is -1, `factor`.
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  most = math.isqrt(size)
  if factor > 0:
    most = min(most, factor)
  one = next(n for n in range(most, 0, -1) if size % n == 0)
  return one, size // one


def shapes_of(
  fan_in: int, fan_out: int, rank: int, factor: int = -1, both: bool = False
) -> dict[str, tuple[int, int]]:
  """The shapes of w1 or a1 and b1, and of w2 or a2 and b2, of a kernel."""
  (m, n), (l, k) = divided(fan_in, factor), divided(fan_out, factor)
  shapes = {}
  if both and rank < max(m, l) / 2:
    shapes |= {'a1': (m, rank), 'b1': (rank, l)}
  else:
    shapes['w1'] = (m, l)
  if rank < max(n, k) / 2:
    shapes |= {'a2': (n, rank), 'b2': (rank, k)}
  else:
    shapes['w2'] = (n, k)
  return shapes
