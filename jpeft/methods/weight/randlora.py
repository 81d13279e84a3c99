"""RandLoRA: an update of full rank, a sum of random low-rank products with trained diagonals.

Albert et al., 2025 (arXiv 2502.00987). A kernel w [fan_in, fan_out] has a smaller side m and a
larger side M. n = ceil(m / r) products of rank r reach rank m. Their bases, which all layers share
and no layer trains, are a [r, m], one for all n products, and b [M, n, r]; l [r, n] and g [n, m]
are trained:

  u = sum_k B_k (diag(l) a diag(g))_k     [M, m], over the n r pairs k of a column and a row
  w' = w + s u    or, if fan_in = m,    w' = w + s u^T        s = alpha / r

l = 0 at first, so the function starts unchanged; g starts at 1 / max(n, m). A smaller rank means
more products and more numbers: n (r + m) a kernel.

In the files of Hugging Face peft l is randlora_lambda, g is randlora_gamma, and the bases are
randlora_A [r, 1, m] and randlora_B [M, n, r] of the largest sides; a layer takes the first entries
of each axis.

Deviations. Which column meets which row is as in peft's code: it flattens a as (r, n) and b as
(n, r), so that pair k has row (k // n, k % n) and column (k // r, k % r), and not both of one
product as in the paper. As b is random and its columns are alike, the distribution is the same.
The bases are drawn again, from a seed, wherever they are used, so that theta has l and g alone;
uniform of variance 1, where peft divides by the measured deviation. Each entry of the bases depends
on its own place alone, so that smaller layers have the first entries of larger ones; `bases` takes
those of peft. Embedding tables are refused, as peft does. u is formed, and again in the backward
pass.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Method, Site, at, factory, matrix

from ..check import require, whole
from .lora import check_rank, required, tables
from .snell import changed_product


@factory
def randlora(
  rank: int = 32,
  alpha: float = 640,
  targets: str = '{q}|{v}',
  dropout: float = 0.0,
  seed: int = 0,
  bases: tuple[jax.Array, jax.Array] | None = None,
  name: str = 'randlora',
) -> Method:
  """Full-rank adaptation from random bases.

  Args:
    rank: r, of each random product.
    alpha: the update is scaled by alpha / rank; 20 times the rank in the paper.
    targets: pattern of sites; every kernel they own is adapted.
    dropout: rate on the input of the update.
    seed: of the bases.
    bases: given bases instead, a [r, largest m] and b [largest M, n, r]; in the files of peft
      these are randlora_A[:, 0] and randlora_B.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a layer larger than `bases`, or an
      embedding table.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'randlora', 'alpha', alpha, 'must be greater than 0')
  whole('randlora', 'seed', seed, 0)
  if bases is not None:
    shapes = [list(x.shape) for x in bases]
    fit = len(shapes[0]) == 2 and len(shapes[1]) == 3 and shapes[0][0] == shapes[1][2] == rank
    require(fit, 'randlora', 'bases', shapes, f'must be [{rank}, m] and [M, n, {rank}]')

  def init(key, w):
    small = min(w.shape)
    count = products(small, rank)
    if bases is not None:
      _cut(bases, w.shape, name)
    return {
      'l': jnp.zeros((rank, count)),
      'g': jnp.full((count, small), 1 / max(count, small), jnp.float32),
    }

  def update(t, shape: tuple[int, int]):
    pair = bases_of(seed, rank, *shape) if bases is None else _cut(bases, shape, name)
    return alpha / rank * random_sum(t, *pair, shape)

  def weight(t, w):
    return w + update(t, w.shape).astype(w.dtype)

  def dot(t, x, y, w, key):
    shape = x.fan_in, y.shape[-1]

    def of_shape(t):
      return update(t, shape).astype(y.dtype)

    return changed_product(of_shape, t, x, y, w, key, dropout, 0)

  rule = matrix(name, init, weight, dot, requires=required(dropout))

  def init_site(key, site: Site, arrays):
    if tables(site) and not site.matrices:
      raise ValueError(
        f'{name}: {site.path!r} is an embedding table, whose rows are looked up, and RandLoRA '
        'adapts products: leave it out of targets, or adapt it by lora or dora'
      )
    return rule.init(key, site, arrays)

  return at(targets, dataclasses.replace(rule, init=init_site))


def products(small: int, rank: int) -> int:
  """n: random products of a rank that a kernel with a smaller side needs for full rank."""
  return -(-small // rank)


def random_sum(t, a: jax.Array, b: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """u of theta and bases a [r, m], b [M, n, r], turned to the shape of the kernel."""
  rows = t['l'][:, :, None] * a[:, None] * t['g']  # [r, n, m]
  u = b.reshape(len(b), -1) @ rows.reshape(-1, rows.shape[-1])  # [M, m]
  fan_in, fan_out = shape
  return u.T if fan_in <= fan_out else u


def bases_of(seed: int, rank: int, fan_in: int, fan_out: int) -> tuple[jax.Array, jax.Array]:
  """The bases of a seed for kernels of one shape: a [r, m] and b [M, n, r]."""
  small, large = sorted((fan_in, fan_out))
  key_a, key_b = jax.random.split(jax.random.key(seed))

  def drawn(key, *places):
    for place in places:
      key = jax.random.fold_in(key, place)
    return jax.random.uniform(key, (rank,), minval=-(3**0.5), maxval=3**0.5)

  of_column = jax.vmap(lambda column: drawn(key_a, column))
  of_row = jax.vmap(lambda row: _each(products(small, rank), lambda i: drawn(key_b, row, i)))
  return of_column(jnp.arange(small)).T, of_row(jnp.arange(large))


def _each(count: int, fn) -> jax.Array:
  """fn of the numbers below a count, stacked."""
  return jax.vmap(fn)(jnp.arange(count))


def _cut(bases, shape: tuple[int, int], name: str) -> tuple[jax.Array, jax.Array]:
  """The first entries of given bases, for a smaller kernel."""
  a, b = bases
  small, large = sorted(shape)
  count = products(small, a.shape[0])
  if a.shape[1] < small or b.shape[0] < large or b.shape[1] < count:
    raise ValueError(
      f'{name}: bases {list(a.shape)} and {list(b.shape)} do not reach for a kernel {[*shape]}, '
      f'which needs [{a.shape[0]}, {small}] and [{large}, {count}, {a.shape[0]}]'
    )
  return a[:, :small], b[:large, :count]
