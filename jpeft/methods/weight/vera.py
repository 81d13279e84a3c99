"""VeRA: two trained vectors per layer around a random pair of projections that no layer trains.

Kopiczko et al., 2023 (arXiv 2310.11454). For a kernel w [fan_in, fan_out], a [fan_in, r] and b [r,
fan_out] as the layers share them, d [r] and e [fan_out]:

  w' = w + a diag(d) b diag(e)         y' = x w + (((x a) * d) b) * e

e = 0 at first, so the function starts unchanged; there is no scale alpha / r. In the files of
Hugging Face peft d is vera_lambda_d and e is vera_lambda_b.

Deviations. a and b are drawn again, from a seed, wherever they are used: theta has d and e alone.
They are shared by the layers of one shape, where peft cuts those of all shapes out of one pair of
matrices; `projections` takes such a pair. Embedding tables are refused, as peft does.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Method, at, factory, matrix

from ..nn import drop
from .lora import check_rank, required, tables


@factory
def vera(
  rank: int = 256,
  targets: str = '{q}|{v}',
  d_initial: float = 0.1,
  dropout: float = 0.0,
  seed: int = 0,
  projections: tuple[jax.Array, jax.Array] | None = None,
  name: str = 'vera',
) -> Method:
  """Vector-based random matrix adaptation.

  Args:
    rank: r.
    targets: pattern of sites; every kernel they own is adapted.
    d_initial: what d starts at; e starts at 0.
    dropout: rate on what enters a.
    seed: of the random pair.
    projections: a given pair instead, a [largest fan_in, r] and b [r, largest fan_out], of which
      every layer takes its first rows and columns; in the files of peft these are vera_A.T and
      vera_B.T.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a layer larger than `projections`,
      or an embedding table.
  """
  check_rank(rank, dropout)
  if projections is not None:
    a, b = projections
    if a.shape[1] != rank or b.shape[0] != rank:
      raise ValueError(
        f'projections must be [fan_in, {rank}] and [{rank}, fan_out], not {list(a.shape)} and '
        f'{list(b.shape)}'
      )

  def pair(w):
    """(a, b) of a kernel."""
    if projections is not None:
      return _cut(projections, *w.shape, name)
    return vera_pair(seed, rank, *w.shape)

  def init(key, w):
    return {'d': jnp.full(rank, d_initial, jnp.float32), 'e': jnp.zeros(w.shape[1])}

  def weight(theta, w):
    a, b = pair(w)
    return w + (a * theta['d']) @ b * theta['e']

  def dot(theta, x, y, w, key):
    a, b = pair(w())
    low = x.map(lambda v: drop(v, key, dropout)) @ a  # [.., r]
    return y + (low * theta['d']) @ b.astype(low.dtype) * theta['e']

  rule = matrix(name, init, weight, dot, requires=required(dropout))

  def init_site(key, site, arrays):
    if tables(site) and not site.matrices:
      raise ValueError(
        f'{name}: {site.path!r} is an embedding table, whose rows are looked up, and VeRA adapts '
        'products: leave it out of targets, or adapt it by lora or dora'
      )
    return rule.init(key, site, arrays)

  return at(targets, dataclasses.replace(rule, init=init_site))


def vera_pair(seed: int, rank: int, fan_in: int, fan_out: int) -> tuple[jax.Array, jax.Array]:
  """The random pair of a seed, a [fan_in, r] and b [r, fan_out], for layers of one shape."""
  key_a, key_b = jax.random.split(jax.random.key(seed))
  return _kaiming(key_a, (fan_in, rank)), _kaiming(key_b, (rank, fan_out))


def _kaiming(key, shape: tuple[int, int]) -> jax.Array:
  """Uniform numbers of variance 2 / fan_in."""
  return jax.random.uniform(key, shape, minval=-1) * (6 / shape[0]) ** 0.5


def _cut(projections, fan_in: int, fan_out: int, name: str) -> tuple[jax.Array, jax.Array]:
  """The first rows of a and columns of b, for a smaller layer."""
  a, b = projections
  if a.shape[0] < fan_in or b.shape[1] < fan_out:
    raise ValueError(
      f'{name}: projections for {a.shape[0]} inputs and {b.shape[1]} outputs do not reach '
      f'for a matrix {[fan_in, fan_out]}'
    )
  return a[:fan_in], b[:, :fan_out]
