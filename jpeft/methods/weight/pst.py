"""PST: sparse kernels whose update and whose importance are trained at low rank.

Li et al., 2022, "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning" (arXiv
2205.11005); official code alibaba/AliceMind. For a kernel w [m, n], the transpose of the paper's W:

  w' = w + beta a b                                      a [m, r], b [r, n]
  S  = |w'| + alpha_1 c d + alpha_2 (rows_i + columns_j)   c [m, q], d [q, n], rows [m], columns [n]
  y' = x (M w')      M = 0 for the floor(p m n) smallest entries of S, else 1

The gradient takes M for S (straight through): dS = d(M w') w', dw' = d(M w') M + dS sign(w'). It
reaches a, b, c, d, rows and columns; w stays. p is 0 for the first tenth of all updates, rises to
`sparsity` as a cubic until 70 % of them, and stays. b, d ~ N(0, 1), the rest starts at 0, so that
the function starts unchanged.

M w' is computed anew in the backward pass: what is kept are x and theta, and an array [m, n] exists
for one layer at a time, its gradient too. After training `merge` gives kernels with so many zeros.

`pattern='2:4'` keeps the 2 largest entries of S in each 4 along the inputs of a layer instead, from
the update on at which p would rise, which kernels of sparse units can use.

Deviations. Of equal entries of S those are left out first that come first in w, and not in its
transpose.
"""

import re

import jax
import jax.numpy as jnp

from jpeft.core import Method, State, at, factory, matrix

from ..check import at_least, require, whole, within
from .ranks import smallest


@factory
def pst(
  rank: int = 8,
  score_rank: int = 8,
  sparsity: float = 0.9,
  beta: float = 1.0,
  alpha_1: float = 1.0,
  alpha_2: float = 1.0,
  begin: float = 0.1,
  end: float = 0.7,
  pattern: str | None = None,
  targets: str = '{linear}',
  name: str = 'pst',
) -> Method:
  """Parameter-efficient sparse training.

  Args:
    rank: r of the update.
    score_rank: q of the importance.
    sparsity: p at the end, the share of entries of a kernel that are 0.
    beta: of the update.
    alpha_1, alpha_2: of the parts of the importance.
    begin, end: shares of all updates between which p rises.
    pattern: 'n:m' to keep n of each m entries along the inputs; `sparsity` then follows from it.
    targets: pattern of sites; every kernel they own becomes sparse.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, inputs that do not divide by m; in
      `Tuned.edit`, updates whose number is not given.
  """
  whole('pst', 'rank', rank, 1)
  whole('pst', 'score_rank', score_rank, 1)
  require(0 <= sparsity < 1, 'pst', 'sparsity', sparsity, 'must lie in [0, 1)')
  for key, value in (('alpha_1', alpha_1), ('alpha_2', alpha_2)):
    at_least('pst', key, value, 0)
  within('pst', 'begin', begin, 0, 1)
  require(begin < end <= 1, 'pst', 'end', end, f'must lie in (begin={begin}, 1]')
  kept, group = _pattern(pattern)

  def init(key, w):
    m, n = w.shape
    if group and m % group:
      raise ValueError(f'{name}: pattern={pattern!r} needs inputs that divide by {group}, not {m}')
    key_b, key_d = jax.random.split(key)
    return {
      'a': jnp.zeros((m, rank)),
      'b': jax.random.normal(key_b, (rank, n)),
      'c': jnp.zeros((m, score_rank)),
      'd': jax.random.normal(key_d, (score_rank, n)),
      'rows': jnp.zeros(m),
      'columns': jnp.zeros(n),
      'share': jnp.zeros(()),
    }

  def weight(t, w):
    changed = w + beta * (t['a'] @ t['b']).astype(w.dtype)
    added = alpha_1 * (t['c'] @ t['d']) + alpha_2 * (t['rows'][:, None] + t['columns'])
    score = jnp.abs(changed) + added.astype(w.dtype)
    if group:
      zero = _smallest_of_groups(score, kept, group) & (t['share'] > 0)
    else:
      # Whole numbers of entries, of which float32 loses some above 2^24.
      zero = smallest(score, jnp.floor(t['share'] * score.size + 1e-3).astype(jnp.int32))
    return _masked(changed, score, zero)

  def dot(t, x, y, w, key):
    @jax.checkpoint
    def product(v, t):
      return x.map(lambda _: v) @ weight(t, w())

    return product(x.x, t)

  def edit(state: State, grads, step, key) -> State:
    share = share_at(step / state.updates(f'{name}: sparsity={sparsity}'), sparsity, begin, end)

    def of_site(entries):
      return {
        array: {**t, 'share': jnp.full_like(t['share'], share)} for array, t in entries.items()
      }

    return state._replace(theta={path: of_site(t) for path, t in state.theta.items()})

  return at(targets, matrix(name, init, weight, dot, fixed=('share',), exact=('share',), edit=edit))


def share_at(done, sparsity: float, begin: float = 0.1, end: float = 0.7):
  """p after a share of all updates, which may be traced."""
  progress = jnp.clip((done - begin) / (end - begin), 0, 1)
  return sparsity * (1 - (1 - progress) ** 3)


def _masked(w: jax.Array, score: jax.Array, zero: jax.Array) -> jax.Array:
  """w with zeros, whose gradient takes the mask for the score."""
  through = score - jax.lax.stop_gradient(score)  # 0
  return jnp.where(zero, 0, w) + jax.lax.stop_gradient(w) * through


def _smallest_of_groups(score: jax.Array, kept: int, group: int) -> jax.Array:
  """True for all but the `kept` largest of each `group` rows, the later of equal ones kept."""
  groups = score.reshape(-1, group, score.shape[1])
  order = jnp.argsort(jnp.argsort(groups, axis=1), axis=1)
  return (order < group - kept).reshape(score.shape)


def _pattern(pattern: str | None) -> tuple[int, int]:
  """(n, m) of 'n:m'; zeros for None."""
  if pattern is None:
    return 0, 0
  found = re.fullmatch(r'(\d+):(\d+)', pattern)
  is_one = found is not None and 0 < int(found[1]) < int(found[2])
  require(is_one, 'pst', 'pattern', pattern, "must be 'n:m' with 0 < n < m, such as '2:4'")
  assert found is not None
  return int(found[1]), int(found[2])
