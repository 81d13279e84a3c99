"""SwitchLoRA: low-rank factors whose vectors are switched for others, one by one, as training goes.

Zhou et al., 2024, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information" (arXiv
2406.06564); official code asfsdsf/SwitchLoRA. For a kernel w [m, n] (the paper's W is its
transpose), a [m, r], b [r, n], s = alpha / r, and pools of c candidates, pool_a [c, m] and pool_b
[c, n]:

  y = x w' + s (x a) b       w' [m, n] starts at w

Before an update some columns a_i are switched for candidates, and some rows b_i:

  w' <- w' + s (a_i - new) b_i      pool_a[slot_i] <- a_i      a_i <- new = pool_a[j]

so that the function stays as it is. The counterpart, here b_i, belonged to the old vector: its
moments and the count of its updates start anew, and it rests for N updates, in which it gets no
gradient and does not move. After many switches w' - w has any rank.

In update t (from 0) of T, r f(t) / `interval` vectors of each factor are switched: the whole part,
and one more with the probability of the rest; f(t) = max(0.3^((t + 1) / (`ratio` T)), 1e-8). They
are taken in order, those of b beginning half a turn ahead, and so are candidates. A vector that
rests is not switched, nor those behind it in the same update.

a, b and all candidates are uniform: std_a = (sqrt(n) r / m^1.5)^(1/4) / sqrt(3), std_b =
(r / sqrt(m n))^(1/4) / sqrt(3).

The backbone is never edited: w' is an array of theta in float32 in which small writes are not lost,
and `merge` gives w' + s a b. The pools are for the edit alone. A run on one device that has pinned
host memory (TPU, GPU) has them there, and moves a few rows a switch; on a CPU and on a mesh they
are beside the rest of theta.

Deviations. A switch is made between two updates, so that gradients are those of the new vector; the
official code makes it between backward pass and update. One number is drawn for all kernels, and
not one for each. init='kept' starts at w' = w - s a b, the function of a pretrained backbone;
'paper' at w' = w, for pre-training.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Method, State, at, chain, factory, matrix, named_key, read_row, write_row

from ..check import choice, require, whole
from ..nn import uniform
from ..subset.tune import tune
from .lora import check_rank

# The gain of a leaky ReLU of slope sqrt(5), as in the initialisation of torch's linear maps.
_GAIN = 3**-0.5
# The axis of a factor that numbers its vectors.
_AXIS = {'a': -1, 'b': -2}
_OTHER = {'a': 'b', 'b': 'a'}
# f is this number after the share `ratio` of all updates, and never less than the least.
_DECAY = 0.3
_LEAST = 1e-8


@factory
def switchlora(
  rank: int = 8,
  alpha: float = 1,
  targets: str = '{linear}',
  interval: int = 40,
  ratio: float = 0.1,
  rest: int = 5,
  candidates: int | None = None,
  choose: str = 'in order',
  init: str = 'kept',
  others: str | None = None,
  name: str = 'switchlora',
) -> Method:
  """Switched low-rank adaptation.

  Args:
    rank: r.
    alpha: the product is scaled by alpha / rank.
    targets: pattern of sites; every kernel they own is adapted.
    interval: updates between two switches of a vector, at first.
    ratio: the share of all updates after which switches are 0.3 times as frequent.
    rest: N, updates for which the counterpart of a switched vector rests.
    candidates: c, vectors of each pool; min(m, n) if left out.
    choose: which candidates: 'in order', or 'random' ones of those that are not in use.
    init: 'kept', the function of the backbone; 'paper', that and the product; 'lora', the backbone
      with a uniform in 1 / sqrt(m) and b and its candidates 0.
    others: pattern of sites whose own arrays are trained whole beside, such as
      '{embed}|{norm}|{final_norm}|{head}' in pre-training.
    name: in theta; what `others` adds is '{name}_others'.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a kernel with too few candidates;
      in `Tuned.edit`, a number of updates that is not given.
  """
  check_rank(rank, 0)
  require(alpha > 0, 'switchlora', 'alpha', alpha, 'must be greater than 0')
  whole('switchlora', 'rest', rest, 1)
  at_least_twice = f'must be a whole number, at least 2 * rest={2 * rest}'
  is_longer = int(interval) == interval and interval >= 2 * rest
  require(is_longer, 'switchlora', 'interval', interval, at_least_twice)
  require(0 < ratio <= 1, 'switchlora', 'ratio', ratio, 'must lie in (0, 1]')
  choice('switchlora', 'choose', choose, ('in order', 'random'))
  choice('switchlora', 'init', init, ('kept', 'paper', 'lora'))
  scale = alpha / rank
  most = rank // interval + 1  # vectors of a factor in one update

  def begin(key, w):
    count = min(w.shape) if candidates is None else candidates
    fits = rank + most <= count <= min(w.shape)
    few = f'of a kernel {[*w.shape]} must be from rank + {most} to its shorter side'
    require(fits, name, 'candidates', count, few)
    bounds = _bounds(*w.shape, rank)
    if init == 'lora':
      bounds = w.shape[0] ** -0.5, 0.0
    t = {}
    keys = jax.random.split(key)
    for part, own_key, length, bound in zip('ab', keys, w.shape, bounds, strict=True):
      # b begins half a turn ahead, and so do its candidates.
      start = 0 if part == 'a' else rank // 2
      slots = count - rank + (jnp.arange(rank) - start) % rank
      pool = uniform(own_key, (count, length), bound)
      vectors = pool[slots]
      t[part] = vectors.T if part == 'a' else vectors
      t |= {f'pool_{part}': pool, f'slots_{part}': slots.astype(jnp.int32)}
      t |= {f'next_{part}': jnp.int32(start), f'rest_{part}': jnp.zeros(rank, jnp.int32)}
    base = w.astype(jnp.float32)
    if init == 'kept':
      base = base - scale * _product(t['a'], t['b'])
    return {**t, 'w': base}

  def weight(t, w):
    a, b = _moving(t)
    return (t['w'] + scale * (a @ b)).astype(w.dtype)

  def dot(t, x, y, w, key):
    a, b = _moving(t)
    return x @ t['w'] + scale * ((x @ a) @ b)

  def edit(state: State, grads, step, key) -> State:
    steps = state.updates(f'{name}: how often vectors are switched')
    # Before the update that comes, whose number from 0 on is `step`.
    wanted = rank / interval * frequency(step, ratio * steps)
    state = _mapped(_rested, state)
    for part in 'ab':
      sure = jnp.floor(wanted)
      more = jax.random.uniform(named_key(key, part)) < wanted - sure
      count = sure.astype(jnp.int32) + more
      own_key = named_key(key, f'candidates of {part}') if choose == 'random' else None

      def switch(t, before, moments, part=part, count=count, own_key=own_key):
        return switched(t, moments, part, count, most, rest, scale, own_key)

      state = _mapped(switch, state)
    return state

  rule = matrix(
    name,
    begin,
    weight,
    dot,
    fixed=('w', 'pool_a', 'pool_b'),
    idle=('pool_a', 'pool_b'),
    restarts=tuple(_AXIS.items()),
    edit=edit,
  )
  method = at(targets, rule)
  if others is not None:
    method = chain(method, tune(others, name=f'{name}_others'))
  return method


def frequency(update, decay: float):
  """f: how frequent switches are, from 1 on.

  Args:
    update: its number from 0 on; may be traced.
    decay: after so many updates f is 0.3.
  """
  return jnp.maximum(_DECAY ** ((update + 1) / decay), _LEAST)


def deviations(m: int, n: int, rank: int) -> tuple[float, float]:
  """(std_a, std_b) of the vectors for a kernel [m, n] at first."""
  std_a = (n**0.5 * rank / m**1.5) ** 0.25
  std_b = (rank / (m * n) ** 0.5) ** 0.25
  return std_a * _GAIN**0.5, std_b * _GAIN**0.5


def _bounds(m: int, n: int, rank: int) -> tuple[float, ...]:
  return tuple(3**0.5 * std for std in deviations(m, n, rank))


def _product(a, b):
  # In float32 on every device: w' takes the product in for good.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _moving(t):
  """(a, b) whose resting vectors get no gradient."""
  found = []
  for part in 'ab':
    is_resting = _along(t[f'rest_{part}'] > 0, part)
    found.append(jnp.where(is_resting, jax.lax.stop_gradient(t[part]), t[part]))
  return found


def _along(x, part: str):
  """Numbers of the vectors of a factor [..., r], to be spread over the factor."""
  return x[..., None, :] if part == 'a' else x[..., None]


def _mapped(fn, state: State) -> State:
  """The state with fn(t, t before, moments of t) -> (t, moments) of every kernel."""
  theta = {}
  moments = [{} for _ in state.moments]
  for path, arrays in state.theta.items():
    theta[path] = {}
    for own in moments:
      own[path] = {}
    for array, t in arrays.items():
      before = state.before[path][array]
      found = fn(t, before, [tree[path][array] for tree in state.moments])
      theta[path][array], new = found
      for own, tree in zip(moments, new, strict=True):
        own[path][array] = tree
  return state._replace(theta=theta, moments=tuple(moments))


def _rested(t, before, moments):
  """A kernel after an update: what rests is as before, and has one update less to rest."""
  new = dict(t)
  for part in 'ab':
    left = t[f'rest_{part}']
    is_resting = left > 0
    new[part] = jnp.where(_along(is_resting, part), before[part], t[part])
    new[f'rest_{part}'] = jnp.maximum(left - 1, 0)
    moments = _cleared(moments, part, is_resting)
  return new, moments


def _cleared(moments, part: str, is_cleared):
  """Moments of a kernel with 0 for some vectors of a factor."""
  found = []
  for tree in moments:
    kept = jnp.where(_along(is_cleared, part), 0, tree[part])
    found.append({**tree, part: kept})
  return found


def switched(t, moments, part: str, wanted, most: int, rest: int, scale: float, key=None):
  """(entries, moments) of a kernel after some vectors of one factor are switched.

  All kernels of a stack or batch hold the same numbers of vectors and candidates, as each switch is
  made in all of them.

  Args:
    t: entries, those of a stack or batch with its axes in front.
    moments: trees of what the optimizer keeps for a and b.
    part: the factor, 'a' or 'b'.
    wanted: how many vectors to switch; traced.
    most: a bound of that.
    rest: updates for which the counterparts rest.
    scale: of the product a b.
    key: to draw candidates by; they are taken in order where it is None.
  """
  other, axis = _OTHER[part], _AXIS[part]
  pool, vectors = t[f'pool_{part}'], t[part]
  rank, candidates = vectors.shape[axis], pool.shape[-2]
  slots = t[f'slots_{part}'].reshape(-1, rank)[0]
  resting = t[f'rest_{part}'].reshape(-1, rank)[0] > 0
  start = t[f'next_{part}'].reshape(-1)[0]
  places = (start + jnp.arange(most)) % rank
  # The first that rests, and those behind it, have to wait.
  count = jnp.minimum(wanted, jnp.cumprod(~resting[places]).sum())
  if key is None:
    taken = (slots[start - 1] + 1 + jnp.arange(most)) % candidates
  else:
    is_used = jnp.zeros(candidates, bool).at[slots].set(True)
    taken = jnp.argsort(jax.random.uniform(key, (candidates,)) + is_used)[:most]

  def switch(i, carry):
    vectors, pool, slots = carry
    place = places[i]
    old = jax.lax.dynamic_slice_in_dim(vectors, place, 1, axis)
    pool = write_row(pool, _as_row(old, part), slots[place])
    new = _as_row(read_row(pool, taken[i]), part)
    vectors = jax.lax.dynamic_update_slice_in_dim(vectors, new, place, axis)
    return vectors, pool, slots.at[place].set(taken[i])

  new, pool, slots = jax.lax.fori_loop(0, count, switch, (vectors, pool, slots))

  def with_change(w):
    change = jnp.take(vectors - new, places, axis)
    counterparts = jnp.take(t[other], places, _AXIS[other])
    both = (change, counterparts) if part == 'a' else (counterparts, change)
    return w + scale * _product(*both)

  is_switched = jnp.zeros(rank, bool).at[places].set(jnp.arange(most) < count)
  left = t[f'rest_{other}']
  entries = {
    part: new,
    'w': jax.lax.cond(count > 0, with_change, lambda w: w, t['w']),
    f'pool_{part}': pool,
    f'slots_{part}': jnp.broadcast_to(slots, left.shape),
    f'next_{part}': jnp.broadcast_to((start + count) % rank, t[f'next_{part}'].shape),
    f'rest_{other}': jnp.where(is_switched, rest, left),
  }
  return {**t, **entries}, _cleared(moments, other, is_switched)


def _as_row(x, part: str):
  """A vector of a factor as a row of its pool, or a row as a vector."""
  return jnp.swapaxes(x, -1, -2) if part == 'a' else x
