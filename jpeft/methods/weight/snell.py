"""SNELL: a full-rank update from two small factors, of which the largest entries are kept.

Shen et al., 2024, "Expanding Sparse Tuning for Low Memory Usage" (arXiv 2411.01800); official code
ssfgunner/SNELL. For a kernel w [m, n], factors p [2, m, r / 2] and q [2, n, r / 2]:

  D_ij = 0.1 (|p_0i - q_0j| - |p_1i - q_1j|)     distances, [m, n], of any rank
  delta_ij = D_ij |D_ij| if |D_ij| is among the (1 - s) m n largest, else 0
  w' = w + delta                                 y' = y + drop_path(drop(x) delta)

The factor |D_ij| and the choice of entries are constants for gradients: d delta / dD is that
factor, half of the analytic 2 |D|. With s = 0 the update is D itself, the dense KLoRA, without |D|.

delta is computed anew in the backward pass: x, p and q are kept, no array [m, n] is, and the
optimizer sees r (m + n) numbers a kernel, as for LoRA. A step has the products of full
fine-tuning, x (w + delta), and with dropout two more, since w and delta then have other inputs.

Both factors start as U(-b, b), b = 1 / sqrt(fan_in), fan_in = m r / 2 or n r / 2. The two distances
nearly cancel then, so the function starts close to the backbone and not at it.

Which entries are kept. The official code keeps those above the s-quantile of |D|, interpolated
between the magnitudes of rank k and k + 1, k = floor(s (m n - 1)) + 1. Of distinct magnitudes these
are all but the k smallest, and so they are here, of which rank k is found exactly, bit by bit,
without sorting. `soft` is the rule of the paper: |D| minus the magnitude of rank ceil(s m n) in
place of |D|.

Deviations. The class token, which the official code trains too, is `tune('embed', 'cls', 'token')`
in a chain. The official code drops out the input of all layers but the attention's projection: that
is chain(snell(targets='{q}|{k}|{v}|{fc1}|{fc2}', dropout=0.1), snell(targets='{o}')). A layer that
offers no injection point computes with w + delta, as it does for LoRA, and keeps that array.
"""

import math

import jax
import jax.numpy as jnp

from jpeft.core import Method, Operand, at, factory, matrix

from ..check import require, whole, within
from ..nn import drop, drop_path, uniform
from .lora import required
from .ranks import of_rank

# The coefficients of the two distances.
COEFFICIENT = 0.1


@factory
def snell(
  rank: int = 8,
  sparsity: float = 0.5,
  targets: str = '{linear}',
  soft: bool = False,
  dropout: float = 0.0,
  path_dropout: float = 0.0,
  init: str = 'default',
  name: str = 'snell',
) -> Method:
  """Sparse tuning with kernelised low-rank factors.

  Args:
    rank: r, an even number: theta has as many numbers as LoRA's of that rank.
    sparsity: s, the share of entries that are left out; 0 for all of D (KLoRA).
    targets: pattern of sites; every kernel they own is adapted.
    soft: whether the threshold is subtracted from |D|, as in the paper; with sparsity above 0.
    dropout: rate on the input of the update; 0.1 in the paper.
    path_dropout: rate at which an example, the first axis, gets no update in training; 0.1 in the
      paper.
    init: 'default', or 'equal': both halves of p and of q alike, so that D is 0 and the function
      starts unchanged. Of a sparse update of 0 there is no gradient, so it needs sparsity=0.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  check_factors('snell', rank, dropout, path_dropout)
  check_share('snell', 'sparsity', sparsity)
  require(init in ('default', 'equal'), 'snell', 'init', init, "must be 'default' or 'equal'")
  has_threshold = sparsity > 0 or not soft
  require(has_threshold, 'snell', 'soft', soft, 'subtracts a threshold, and sparsity=0 has none')
  starts_at_zero = init == 'equal'
  learns = not starts_at_zero or sparsity == 0
  require(
    learns, 'snell', 'init', init, 'leaves a sparse update without a gradient: set sparsity=0'
  )

  def begin(key, w):
    return factors(key, w.shape, rank, starts_at_zero)

  def update(t):
    values = distances(t['p'], t['q'])
    if sparsity == 0:
      return values
    if soft:
      return chosen(values, math.ceil(sparsity * values.size), soft=True)
    return chosen(values, left_out(sparsity, *values.shape))

  def weight(t, w):
    return w + update(t).astype(w.dtype)

  def dot(t, x, y, w, key):
    return changed_product(update, t, x, y, w, key, dropout, path_dropout)

  needs = required(max(dropout, path_dropout))
  return at(targets, matrix(name, begin, weight, dot, exact=('p', 'q'), requires=needs))


# The update and how it is computed; `snella` shares all of this.


def factors(key, shape: tuple[int, int], rank: int, equal: bool = False) -> dict:
  """{'p': [2, m, r / 2], 'q': [2, n, r / 2]} of a kernel [m, n]; `equal` halves give D = 0."""
  made = {}
  for name, size, own_key in zip('pq', shape, jax.random.split(key), strict=True):
    bound = (size * rank / 2) ** -0.5
    draws = 1 if equal else 2
    drawn = uniform(own_key, (draws, size, rank // 2), bound)
    made[name] = jnp.broadcast_to(drawn, (2, size, rank // 2))
  return made


def distances(p: jax.Array, q: jax.Array) -> jax.Array:
  """D [m, n] of p [2, m, k] and q [2, n, k]; of coinciding points the gradient is 0."""
  first = _distance(p[0], q[0])
  second = _distance(p[1], q[1])
  return COEFFICIENT * (first - second)


def _distance(p: jax.Array, q: jax.Array) -> jax.Array:
  square = jnp.sum(jnp.square(p[:, :, None] - q.T[None]), 1)  # [m, n]
  # The root has no gradient at 0, and autodiff would multiply inf by 0.
  apart = square > 0
  return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)


def left_out(sparsity: float, m: int, n: int) -> int:
  """How many entries of [m, n] do not lie above the quantile `sparsity` of their magnitudes."""
  if sparsity == 0:
    return 0
  return math.floor(sparsity * (m * n - 1)) + 1


def chosen(values: jax.Array, count, soft: bool = False) -> jax.Array:
  """values [m, n] times their magnitude, and 0 where that is one of the `count` smallest.

  Args:
    values: any array of floats.
    count: how many are left out, a whole number that may be traced; equal magnitudes go together.
    soft: subtract the magnitude of rank `count` from all others, and keep what is above 0.

  Returns:
    An array whose gradient takes the factors as constants.
  """
  magnitude = jax.lax.stop_gradient(jnp.abs(values)).astype(jnp.float32)
  # Floats that are not negative are ordered as their bits.
  bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
  low = of_rank(bits, count)
  if soft:
    threshold = jax.lax.bitcast_convert_type(low, jnp.float32)
    return values * jnp.maximum(magnitude - threshold, 0).astype(values.dtype)
  # Half way to the next magnitude: where another program rounds otherwise, it chooses the same.
  is_above = bits > low
  next_one = jnp.min(jnp.where(is_above, bits, jnp.iinfo(jnp.int32).max))
  are_distinct = jnp.sum(~is_above) == count
  threshold = jnp.where(are_distinct, low + (next_one - low) // 2, low)
  factor = jnp.where(bits > threshold, magnitude, 0)
  return values * factor.astype(values.dtype)


def changed_product(
  update, t, x: Operand, y, w, key, dropout: float, path_dropout: float
) -> jax.Array:
  """x (w + update(t)), of which the backward pass keeps x and t.

  Args:
    update: t -> [fan_in, fan_out].
    t: of one kernel.
    x: the input of its layer.
    y: x w; it is read in training with dropout alone.
    w: () -> [fan_in, fan_out].
    key: of dropout; None outside training.
    dropout: rate on the input of the update.
    path_dropout: rate at which an example has no update.
  """
  drops = key is not None and max(dropout, path_dropout) > 0

  @jax.checkpoint
  def product(v, t):
    kernel = update(t)
    if not drops:
      kernel = w() + kernel
    return x.map(lambda _: v) @ kernel

  if not drops:
    return product(x.x, t)
  key_input, key_path = jax.random.split(key)
  return y + drop_path(product(drop(x.x, key_input, dropout), t), key_path, path_dropout)


def check_factors(method: str, rank: int, dropout: float, path_dropout: float) -> None:
  """Raises ValueError for a rank or a rate outside its range."""
  whole(method, 'rank', rank, 2)
  require(rank % 2 == 0, method, 'rank', rank, 'must be even: each of two distances has a half')
  within(method, 'dropout', dropout, 0, 1)
  within(method, 'path_dropout', path_dropout, 0, 1)


def check_share(method: str, name: str, value: float) -> None:
  """Raises ValueError for a share of entries left out that is not in [0, 1)."""
  require(0 <= value < 1, method, name, value, 'must lie in [0, 1)')
