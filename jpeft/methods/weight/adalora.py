"""AdaLoRA: singular triplets, of which ever fewer are kept, where they matter most.

Zhang et al., 2023 (arXiv 2303.10512); official code QingruZhang/AdaLoRA. For a kernel w [fan_in,
fan_out] (the paper's W is its transpose), a [fan_in, r], e [r], b [r, fan_out], s = alpha / r:

  w' = w + s a diag(e) b         y' = y + s ((x a) * e) b         e = 0 at first
  minimised: task + orth * the mean over all a and b of |a^T a - I| and |b b^T - I|, Frobenius

Of T updates the first `warmup` keep all of the n kernels' n r triplets, the last `settle` keep n
`target` of them, and in between their number falls as the cube of what is left of the way. Every
`every` updates the e of those of least importance over all kernels are set to 0; they may grow
again until the last choice, which holds. A triplet's importance is that of its e plus the means
over its column of a and its row of b, where for each number p with gradient g

  I = beta1 I + (1 - beta1) |p g|      U = beta2 U + (1 - beta2) | |p g| - I |     importance I U

I and U are in theta as state, twice the trained numbers, and `kept` is the last choice; no
optimizer sees them. In the files of Hugging Face peft lora_A is a.T, lora_B b.T, lora_E e.

Deviations. p is the number that g was taken at; peft and the official code read it after the
update. Where importances tie the first triplets go, and never more than asked for; the official
code drops all that tie. The penalty is that of those codes; the paper sums the squares of norms.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Method, State, at, factory, matrix

from ..check import at_least, require, whole, within
from ..nn import drop
from .lora import check_rank, required

_PARTS = ('a', 'e', 'b')
_MEANS = tuple(f'mean_{part}' for part in _PARTS)
_DOUBTS = tuple(f'doubt_{part}' for part in _PARTS)


@factory
def adalora(
  rank: int = 12,
  target: int | None = None,
  alpha: float = 8,
  targets: str = '{q}|{v}',
  warmup: float = 0.1,
  settle: float = 0.3,
  every: int = 10,
  beta1: float = 0.85,
  beta2: float = 0.85,
  orth: float = 0.5,
  dropout: float = 0.0,
  name: str = 'adalora',
) -> Method:
  """Adaptive budget allocation among low-rank updates.

  Args:
    rank: r, triplets of each kernel at first.
    target: of each kernel at the end, on average; None for two thirds of `rank`.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites; every kernel they own is adapted.
    warmup: how many updates keep all triplets: a share of all below 1, or their number.
    settle: how many updates follow the last choice: a share of all below 1, or their number.
    every: updates between two choices.
    beta1, beta2: of the means of the importance and of its doubt.
    orth: factor of the penalty; 0 for none.
    dropout: rate on what enters a.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; in `Tuned.edit`, a number of all updates that is
      not given, or that leaves nothing between `warmup` and `settle`.
  """
  check_rank(rank, dropout)
  if target is None:
    target = max(1, 2 * rank // 3)
  whole('adalora', 'target', target, 1)
  require(target <= rank, 'adalora', 'target', target, f'must not exceed rank={rank}')
  require(alpha > 0, 'adalora', 'alpha', alpha, 'must be greater than 0')
  for part, value in (('warmup', warmup), ('settle', settle)):
    in_range = 0 <= value < 1 or int(value) == value >= 1
    require(in_range, 'adalora', part, value, 'must be a share below 1 or a number of updates')
  whole('adalora', 'every', every, 1)
  within('adalora', 'beta1', beta1, 0, 1)
  within('adalora', 'beta2', beta2, 0, 1)
  at_least('adalora', 'orth', orth, 0)
  scale = alpha / rank

  def init(key, w):
    key_a, key_b = jax.random.split(key)
    trained = {
      'a': 0.02 * jax.random.normal(key_a, (w.shape[0], rank)),
      'e': jnp.zeros(rank),
      'b': 0.02 * jax.random.normal(key_b, (rank, w.shape[1])),
    }
    state = {}
    for part, mean, doubt in zip(_PARTS, _MEANS, _DOUBTS, strict=True):
      state[mean] = state[doubt] = jnp.zeros_like(trained[part])
    return {**trained, **state, 'kept': jnp.ones(rank, bool)}

  def weight(t, w):
    return w + (scale * (t['a'] * t['e']) @ t['b']).astype(w.dtype)

  def dot(t, x, y, w, key):
    low = x.map(lambda v: drop(v, key, dropout)) @ t['a']  # [.., r]
    return y + scale * ((low * t['e']) @ t['b'])

  def edit(state: State, grads, step, key) -> State:
    begin, end = _bounds(warmup, settle, state, name)
    theta = _with_importance(state, grads, beta1, beta2)
    count = sum(t['e'].size for t in _kernels(theta))
    left = budget(step, begin, end, count, count // rank * target)
    chooses = ((step > begin) & (step % every == 0) & (step < end)) | (step == end)
    chosen = _most_important(theta, left)

    def masked(t, own):
      kept = jnp.where(chooses, own, t['kept'])
      is_masked = chooses | (step > end)
      return {**t, 'kept': kept, 'e': jnp.where(is_masked & ~kept, 0, t['e'])}

    return state._replace(theta=_mapped(masked, theta, chosen))

  def penalty(arrays):
    distances = [_distance(t[part], part) for t in arrays.values() for part in 'ab']
    return orth * sum(distances) / len(distances)

  rule = matrix(
    name,
    init,
    weight,
    dot,
    fixed=(*_MEANS, *_DOUBTS, 'kept'),
    requires=required(dropout),
    edit=edit,
    penalty=penalty if orth else None,
  )
  return at(targets, rule)


def budget(step, begin: int, end: int, first: int, last: int):
  """How many triplets are kept in an update.

  Args:
    step: its number, from 1 on; may be traced.
    begin: the last update that keeps all.
    end: the first that keeps as few as the last.
    first: all triplets.
    last: those that are left at the end.
  """
  left = jnp.clip(1 - (step - begin) / (end - begin), 0, 1)
  return last + jnp.floor((first - last) * left**3).astype(jnp.int32)


def _bounds(warmup: float, settle: float, state: State, name: str) -> tuple[int, int]:
  """(the last update that keeps all triplets, that of the last choice)."""
  steps = state.updates(f'{name}: its budget')
  begin, after = (int(n * steps) if n < 1 else int(n) for n in (warmup, settle))
  if begin >= steps - after:
    raise ValueError(
      f'{name}: of {steps} updates warmup={warmup} and settle={settle} leave none in between: '
      'train longer, or give less of them'
    )
  return begin, steps - after


def _mapped(fn, theta, *more):
  """{site path: {array: fn(t of a kernel, what is more of it)}}."""
  found = {}
  for path, arrays in theta.items():
    own = {}
    for array, t in arrays.items():
      own[array] = fn(t, *(tree[path][array] for tree in more))
    found[path] = own
  return found


def _kernels(theta) -> list:
  return [t for arrays in theta.values() for t in arrays.values()]


def _with_importance(state: State, grads, beta1: float, beta2: float):
  """theta with its means and doubts after an update."""

  def moved(t, before, grad):
    new = dict(t)
    for part, mean, doubt in zip(_PARTS, _MEANS, _DOUBTS, strict=True):
      now = jnp.abs(before[part] * grad[part])
      new[mean] = beta1 * before[mean] + (1 - beta1) * now
      new[doubt] = beta2 * before[doubt] + (1 - beta2) * jnp.abs(now - new[mean])
    return new

  return _mapped(moved, state.theta, state.before, grads)


def _most_important(theta, count):
  """{site path: {array: whether each triplet is among the `count` of most importance}}."""

  def importance(t):
    of_a = jnp.mean(t['mean_a'] * t['doubt_a'], -2)
    of_b = jnp.mean(t['mean_b'] * t['doubt_b'], -1)
    return t['mean_e'] * t['doubt_e'] + of_a + of_b

  scores = _mapped(importance, theta)
  flat, structure = jax.tree.flatten(scores)
  together = jnp.concatenate([x.reshape(-1) for x in flat])
  order = jnp.argsort(together)
  places = jnp.zeros(order.size, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
  is_kept = places >= order.size - count
  kept = []
  start = 0
  for x in flat:
    kept.append(is_kept[start : start + x.size].reshape(x.shape))
    start += x.size
  return jax.tree.unflatten(structure, kept)


def _distance(x, part: str):
  """|x^T x - I| of a, |x x^T - I| of b; the mean over kernels that are a batch."""
  if part == 'b':
    x = jnp.swapaxes(x, -1, -2)
  x = x.astype(jnp.float32)
  apart = jnp.swapaxes(x, -1, -2) @ x - jnp.eye(x.shape[-1])
  square = jnp.sum(jnp.square(apart), (-1, -2))
  # The root has no gradient at 0.
  return jnp.mean(jnp.sqrt(square + 1e-12))
