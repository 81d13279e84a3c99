"""SNELLA: SNELL with a second kernel, and a competition of the layers for what is kept.

"Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025 (arXiv
2510.24037); official code ssfgunner/SNELL. For a kernel w [m, n], with D, p and q of `snell`, and
numbers alpha = 1, gamma = 1, beta = 0 at first:

  K = D + alpha softmax_j(D / gamma) + beta       softmax over the n outputs
  delta = K |K| on the a largest of |K|, else 0   w' = w + delta

How many entries a kernel keeps, a, is shared out among all kernels l of the method. After every
update, for A = p, q with gradient g:

  I = |A g| (0 where it is no number)    I' <- .85 I' + .15 I    U' <- .85 U' + .15 |I - I'|
  score S_l = mean(I'_p U'_p) + mean(I'_q U'_q), of all kernels 1 in sum

and after e rounds of `every` updates, e = 1, 2, ..., E, with N = sum m n, s_0 and s the sparsity at
the start and at the end:

  V(e) = N ((1 - s) + (s - s_0) (1 - e / E)^3)    a_l = min(m n, V S_l)

what a full kernel cannot take going to the others by their scores. Rounds are epochs in the paper:
`every` is the updates of one, and all E rounds should fit in the run. Afterwards V stays, and is
shared out anew each `every` updates. U' is of the new I'.

With s = s_0 = 0 the update is K itself, without |K| and without a competition: it does not start at
the backbone, since each output begins with the mean of the inputs.

Deviations. What kernels that become full cannot take is shared out until none is over-full (the
official code does it once). Kernels without a score share what is left evenly. |gamma| is at least
1e-4 where it divides. `kept` and the two means are entries of theta that are not trained. See
`snell` for the rest.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core import Method, State, at, factory, matrix

from ..check import require, whole
from .lora import required
from .snell import (
  changed_product,
  check_factors,
  check_share,
  chosen,
  distances,
  factors,
  left_out,
)

# How much of the running means is kept in an update.
DECAY = 0.85
# What divides D has at least this magnitude.
LEAST_GAMMA = 1e-4
# A score that only counts where there is no other.
_NO_SCORE = 1e-20
# Entries of theta that no gradient trains.
_STATE = ('kept', 'importance', 'uncertainty')


@factory
def snella(
  rank: int = 8,
  sparsity: float = 0.8,
  sparsity_start: float = 0.01,
  every: int = 32,
  rounds: int = 100,
  targets: str = '{linear}',
  dropout: float = 0.0,
  path_dropout: float = 0.0,
  name: str = 'snella',
) -> Method:
  """Sparse tuning whose budget of entries is shared out among the layers.

  Args:
    rank: r, an even number.
    sparsity: s, the share of entries of all kernels that is left out in the end; 0, with
      sparsity_start=0, for all of K.
    sparsity_start: s_0, the share of each kernel at first.
    every: updates in a round.
    rounds: E, after which the share is `sparsity`; every * rounds updates should fit in the run.
    targets: pattern of sites; every kernel they own is adapted, and competes.
    dropout: rate on the input of the update; 0.1 in the paper.
    path_dropout: rate at which an example, the first axis, gets no update in training; 0.1 in the
      paper.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range.
  """
  check_factors('snella', rank, dropout, path_dropout)
  check_share('snella', 'sparsity', sparsity)
  check_share('snella', 'sparsity_start', sparsity_start)
  within_end = sparsity_start <= sparsity
  at_most = f'must not exceed sparsity={sparsity}'
  require(within_end, 'snella', 'sparsity_start', sparsity_start, at_most)
  whole('snella', 'every', every, 1)
  whole('snella', 'rounds', rounds, 1)
  competes = sparsity > 0

  def begin(key, w):
    t = factors(key, w.shape, rank)
    means = {entry: {part: jnp.zeros_like(t[part]) for part in 'pq'} for entry in _STATE[1:]}
    t |= {'alpha': jnp.ones(()), 'gamma': jnp.ones(()), 'beta': jnp.zeros(())}
    if not competes:
      return t
    kept = float(w.size - left_out(sparsity_start, *w.shape))
    return {**t, **means, 'kept': jnp.asarray(kept, jnp.float32)}

  def update(t):
    values = mixed(distances(t['p'], t['q']), t['alpha'], t['gamma'], t['beta'])
    if not competes:
      return values
    return chosen(values, values.size - jnp.round(t['kept']).astype(jnp.int32))

  def weight(t, w):
    return w + update(t).astype(w.dtype)

  def dot(t, x, y, w, key):
    read = {entry: value for entry, value in t.items() if entry not in _STATE[1:]}
    return changed_product(update, read, x, y, w, key, dropout, path_dropout)

  state = _STATE if competes else ()
  rule = matrix(
    name,
    begin,
    weight,
    dot,
    fixed=state,
    exact=('p', 'q', 'alpha', 'gamma', 'beta', *state),
    edit=Competition(sparsity, sparsity_start, every, rounds) if competes else None,
    requires=required(max(dropout, path_dropout)),
  )
  return at(targets, rule)


def mixed(values: jax.Array, alpha, gamma, beta) -> jax.Array:
  """K [m, n] of D [m, n]: D + alpha softmax(D / gamma) + beta."""
  least = jnp.where(gamma < 0, -LEAST_GAMMA, LEAST_GAMMA)
  guarded = jnp.where(jnp.abs(gamma) < LEAST_GAMMA, least, gamma)
  # gamma keeps its gradient where it is guarded, so that it can leave.
  guarded = gamma + jax.lax.stop_gradient(guarded - gamma)
  return values + alpha * jax.nn.softmax(values / guarded, -1) + beta


# The competition


@dataclasses.dataclass(frozen=True)
class Competition:
  """What happens to the state of all kernels after an update; the fields are those of `snella`."""

  sparsity: float
  sparsity_start: float
  every: int
  rounds: int

  def __call__(self, state: State, grads, step, key) -> State:
    theta = {}
    for path, arrays in state.theta.items():
      before = state.before[path]
      theta[path] = {
        name: {**t, **averaged(t, before[name], grads[path][name])} for name, t in arrays.items()
      }
    is_due = step % self.every == 0

    def shared_out():
      return self.shared_out(theta, step // self.every)

    def unchanged():
      return theta

    return state._replace(theta=jax.lax.cond(is_due, shared_out, unchanged))

  def shared_out(self, theta: Mapping, number) -> dict:
    """theta with `kept` of all kernels after a round."""
    kernels = [Kernels.of(t) for arrays in theta.values() for t in arrays.values()]
    scores = jnp.concatenate([kernel.scores for kernel in kernels])
    sizes = jnp.concatenate([kernel.sizes for kernel in kernels])
    volume = budget(float(sum(k.size * len(k.scores) for k in kernels)), self, number)
    kept = allocated(scores, sizes, volume)
    new = {path: dict(arrays) for path, arrays in theta.items()}
    start = 0
    for path, arrays in theta.items():
      for name, t in arrays.items():
        count = t['kept'].size
        own = kept[start : start + count].reshape(t['kept'].shape)
        new[path][name] = {**t, 'kept': own}
        start += count
    return new


class Kernels(NamedTuple):
  """The kernels of one array: of a layer, or of all layers and experts of a stack.

  Attributes:
    scores: [kernels].
    sizes: m n of each, [kernels].
    size: m n.
  """

  scores: jax.Array
  sizes: jax.Array
  size: int

  @classmethod
  def of(cls, t) -> 'Kernels':
    parts = [t['importance'][part] * t['uncertainty'][part] for part in 'pq']
    scores = sum(part.mean((-3, -2, -1)) for part in parts).reshape(-1)
    size = t['p'].shape[-2] * t['q'].shape[-2]
    return cls(scores, jnp.full(scores.shape, float(size)), size)


def averaged(t, before, grads) -> dict:
  """The running means of a kernel after an update: {'importance', 'uncertainty'}."""
  importance = {}
  uncertainty = {}
  for part in 'pq':
    now = jnp.abs(before[part] * grads[part])
    now = jnp.where(jnp.isnan(now), 0, now)
    mean = DECAY * t['importance'][part] + (1 - DECAY) * now
    spread = DECAY * t['uncertainty'][part] + (1 - DECAY) * jnp.abs(now - mean)
    importance[part] = mean
    uncertainty[part] = spread
  return {'importance': importance, 'uncertainty': uncertainty}


def budget(size: float, schedule: Competition, number) -> jax.Array:
  """V: how many of `size` entries are kept after a round."""
  left = 1 - jnp.minimum(number, schedule.rounds) / schedule.rounds
  more = (schedule.sparsity - schedule.sparsity_start) * left**3
  return size * (1 - schedule.sparsity + more)


def allocated(scores: jax.Array, sizes: jax.Array, volume) -> jax.Array:
  """How many entries each kernel keeps, whole numbers [kernels].

  Args:
    scores: not negative, [kernels]; all zero counts as all equal.
    sizes: entries of each kernel, [kernels].
    volume: entries in all, at most the sum of sizes. What is given away falls short of it by less
      than one a kernel.
  """
  total = scores.sum()
  scores = jnp.where(total > 0, scores / jnp.where(total > 0, total, 1), 0) + _NO_SCORE

  def shares(is_full):
    left = jnp.maximum(volume - jnp.where(is_full, sizes, 0).sum(), 0)
    open_scores = jnp.where(is_full, 0, scores)
    whole_score = open_scores.sum()
    share = left * (open_scores / jnp.where(whole_score > 0, whole_score, 1))
    return jnp.where(is_full, sizes, share)

  def with_full(_, is_full):
    return is_full | (shares(is_full) >= sizes)

  # Each pass fills one kernel at least, or changes nothing.
  is_full = jax.lax.fori_loop(0, len(sizes), with_full, jnp.zeros(sizes.shape, bool))
  return jnp.floor(shares(is_full))
