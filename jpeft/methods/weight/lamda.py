"""LaMDA: a small square matrix between two projections, of which soon neither is trained.

Azizi et al., 2024 (arXiv 2406.12832); official code ArminAzizi98/LaMDA. For a kernel w [fan_in,
fan_out] (the paper's W is its transpose), a [fan_in, r] fixed, m [r, r] trained throughout, b [r,
fan_out] trained at first, s = alpha / r:

  spectral   w' = w + s a (m b - m0 b0)     a, m0, b0: the top r singular triplets of w, m0 / s on
                                            the diagonal of m
  uniform    w' = w + s a m b               a and m uniform, b = 0, as in the official code

  y' = x w + s (x a) (m b - m0 b0)

so that the backward pass keeps x a, r numbers a token, and not x. Both starts are the backbone.

Gradual freezing: of T updates the first f = freeze T train b, and of its rows ever fewer. In update
t (from 0) the first k(t) = min(r, floor(r t / f)) rows, those of the largest singular values, stay
as they are, whatever the optimizer's momentum or decay. After f updates b is no part of what is
trained, and its moments are dropped. The official code divides without r, k(t) = floor(t / f), so
that almost all of b is trained to the end; `schedule='official'` is that rule.

Deviations. The paper takes the top triplets off the backbone; here it is never edited, and theta
has m0 and b0 beside m and b. m b - m0 b0 [r, fan_out] is computed before it meets the tokens, which
is the same function with one product of r x r numbers a token less. Which triplets are taken is not
stated by the paper: the top ones, as PiSSA does. LaMDA++ is `lamda_pp`.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Method, State, at, factory, matrix

from ..check import choice, require
from ..nn import drop, uniform
from .lora import check_rank, required


@factory
def lamda(
  rank: int = 32,
  alpha: float = 32,
  targets: str = '{linear}',
  freeze: float = 0.3,
  schedule: str = 'paper',
  dropout: float = 0.0,
  init: str = 'spectral',
  name: str = 'lamda',
) -> Method:
  """Low-dimensional adaptation with a spectral start.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank. A spectral start divides the singular values by
      that scale, so that it is the same function for any alpha.
    targets: pattern of sites; every kernel they own is adapted.
    freeze: how long b is trained: a share of all updates below 1, or a number of updates.
    schedule: 'paper', all rows of b by then; 'official', one row each `freeze`, and b stays among
      what is trained.
    dropout: rate on what enters a; 0.1 in the official scripts.
    init: 'spectral' or 'uniform'.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a rank that a spectral start cannot
      cut out of a kernel; in `Tuned.edit`, a share of updates whose number is not given.
  """
  check_rank(rank, dropout)
  require(alpha > 0, 'lamda', 'alpha', alpha, 'must be greater than 0')
  in_range = 0 < freeze < 1 or (freeze >= 1 and int(freeze) == freeze)
  require(in_range, 'lamda', 'freeze', freeze, 'must be a share below 1 or a number of updates')
  choice('lamda', 'schedule', schedule, ('paper', 'official'))
  choice('lamda', 'init', init, _STARTS)
  scale = alpha / rank
  begin = freeze if freeze < 1 else int(freeze)
  held = ('a', 'm0', 'b0') if init == 'spectral' else ('a',)

  def init_kernel(key, w):
    return _STARTS[init](key, w.astype(jnp.float32), rank, scale, name)

  def factor(t):
    """m b - m0 b0 [r, fan_out]."""
    product = t['m'] @ t['b']
    if 'm0' in t:
      product = product - t['m0'][:, None] * t['b0']
    return product

  def weight(t, w):
    return w + (scale * (t['a'] @ factor(t))).astype(w.dtype)

  def dot(t, x, y, w, key):
    low = x.map(lambda v: drop(v, key, dropout)) @ t['a']  # [.., r]
    return y + scale * (low @ factor(t).astype(low.dtype))

  def edit(state: State, grads, step, key) -> State:
    length = begin
    if freeze < 1:
      length = max(1, round(freeze * state.updates(f'{name}: freeze={freeze}')))
    count = frozen_rows(rank, length, schedule, step - 1)
    return state._replace(theta=_held_rows(state, count))

  rule = matrix(
    name,
    init_kernel,
    weight,
    dot,
    fixed=held,
    # In the dtype of the tokens m b and m0 b0 would not cancel.
    exact=('m', 'b', *held[1:]),
    requires=required(dropout),
    edit=edit,
    stages=((begin, (*held, 'b')),) if schedule == 'paper' else (),
  )
  return at(targets, rule)


def _spectral(key, w, rank: int, scale: float, name: str) -> dict:
  require(rank <= min(w.shape), name, 'rank', rank, f'cannot be cut out of a kernel {[*w.shape]}')
  u, values, vt = jnp.linalg.svd(w, full_matrices=False)
  values = values[:rank] / scale
  b = vt[:rank]
  return {'a': u[:, :rank], 'm': jnp.diag(values), 'b': b, 'm0': values, 'b0': b}


def _uniform(key, w, rank: int, scale: float, name: str) -> dict:
  fan_in, fan_out = w.shape
  key_a, key_m = jax.random.split(key)
  a = uniform(key_a, (fan_in, rank), fan_in**-0.5)
  m = uniform(key_m, (rank, rank), rank**-0.5)
  return {'a': a, 'm': m, 'b': jnp.zeros((rank, fan_out))}


_STARTS = {'spectral': _spectral, 'uniform': _uniform}


def frozen_rows(rank: int, length: int, schedule: str, update):
  """k: how many rows of b are held still in an update.

  Args:
    rank: r, the rows of b.
    length: f, a number of updates.
    schedule: 'paper' or 'official'.
    update: its number from 0 on; may be traced.
  """
  rows = rank * update if schedule == 'paper' else update
  return jnp.minimum(rank, rows // length)


def _held_rows(state: State, count) -> dict:
  """theta with the first `count` rows of each b as before the update."""

  def held(new, old):
    is_held = jnp.arange(new.shape[-2])[:, None] < count
    return jnp.where(is_held, old, new)

  def of_site(new, old):
    return {array: {**t, 'b': held(t['b'], old[array]['b'])} for array, t in new.items()}

  return {path: of_site(t, state.before[path]) for path, t in state.theta.items()}
