"""Edits of theta with the optimizer's moments, and stages that change what is trained."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.training import optim
from tests.core.small import (
  FC,
  WIDTH,
  Blocks,
  X,
  adapter,
  backbone,
  low_rank,
  noisy,
  stacks,
)

RANK = 2
MODELS = stacks(3)


def switched(every=2, targets=FC, name='switched'):
  """Low rank whose columns of a are swapped against a pool; the function does not change.

  The base takes up the difference, and the moments of the rows of b are cleared (2406.06564).
  """

  def init(key, w):
    key_a, key_pool = jax.random.split(key)
    a = jax.random.normal(key_a, (w.shape[0], RANK))
    pool = jax.random.normal(key_pool, (3, w.shape[0]))
    return {'a': a, 'b': jnp.ones((RANK, w.shape[1])), 'pool': pool, 'base': jnp.zeros(w.shape)}

  def edit(state, grads, step, key):
    """Swaps column i of a for the first of the pool, which gets the old one as its last."""
    i = (step // every) % RANK
    due = step % every == 0

    def swapped(t):
      old, new = jnp.take(t['a'], i, -1), t['pool'][..., 0, :]
      row = jnp.take(t['b'], i, -2)
      base = t['base'] + (old - new)[..., :, None] * row[..., None, :]
      pool = jnp.concatenate([t['pool'][..., 1:, :], old[..., None, :]], -2)
      new_t = {'a': t['a'].at[..., i].set(new), 'b': t['b'], 'pool': pool, 'base': base}
      return jax.tree.map(lambda x, y: jnp.where(due, x, y), new_t, t)

    def cleared(m):
      return {**m, 'b': jnp.where(due, m['b'].at[..., i, :].set(0), m['b'])}

    theta = {path: {'kernel': swapped(t['kernel'])} for path, t in state.theta.items()}
    moments = []
    for tree in state.moments:
      moments.append({path: {'kernel': cleared(m['kernel'])} for path, m in tree.items()})
    return state._replace(theta=theta, moments=tuple(moments))

  weight = lambda t, w: w + t['base'] + t['a'] @ t['b']
  return jpeft.at(
    targets, jpeft.matrix(name, init, weight, fixed=('pool', 'base'), exact=('base',), edit=edit)
  )


def loss_of(tuned, held, theta):
  return jnp.sum(jnp.square(tuned.apply(theta, held, X)))


def run(tuned, held, tx, theta, steps, whole=False):
  """(theta, the optimizer's state) after some updates; with one tree or two."""

  @jax.jit
  def update(theta, state, step):
    trained, rest = tuned.split(theta)
    grads = jax.grad(lambda trained: loss_of(tuned, held, tuned.join(trained, rest)))(trained)
    if whole:
      full = tuned.join(grads, jax.tree.map(jnp.zeros_like, rest))
      updates, state = tx.update(full, state, theta)
      new = optax.apply_updates(theta, updates)
    else:
      updates, state = tx.update(grads, state, trained)
      new = tuned.join(optax.apply_updates(trained, updates), rest)
    return tuned.edit(theta, new, state, grads, step, jax.random.key(0))

  state = tx.init(theta if whole else tuned.split(theta)[0])
  for step in range(1, steps + 1):
    theta, state = update(theta, state, step)
  return theta, state


@pytest.mark.parametrize('name', MODELS)
def test_vectors_are_swapped_and_their_moments_cleared(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, switched(), held, X)
  theta = tuned.init(jax.random.key(0), held)
  tx = optax.adam(1e-2)
  path = next(iter(theta['switched']))
  for steps, row in ((2, 1), (4, 0)):
    before, _ = run(tuned, held, tx, theta, steps - 1)
    plain = jpeft.attach(model, switched(every=1000), held, X)  # nothing is due
    without, kept = run(plain, held, tx, theta, 1)
    after, state = run(tuned, held, tx, theta, steps)
    assert np.any(kept[0].mu['switched'][path]['kernel']['b'][..., row, :])
    for moment in (state[0].mu, state[0].nu):
      b = moment['switched'][path]['kernel']['b']
      assert not np.any(b[..., row, :]) and np.all(b[..., 1 - row, :] != 0)
      assert np.all(moment['switched'][path]['kernel']['a'] != 0)
    old, new = (t['switched'][path]['kernel'] for t in (before, after))
    np.testing.assert_array_equal(new['a'][..., row], old['pool'][..., 0, :])

  # The function does not jump: the edit alone changes nothing but rounding.
  trained, rest = tuned.split(theta)
  grads = jax.tree.map(jnp.zeros_like, trained)
  edited, _ = tuned.edit(theta, theta, tx.init(trained), grads, 2, jax.random.key(0))
  assert not np.array_equal(
    edited['switched'][path]['kernel']['a'], theta['switched'][path]['kernel']['a']
  )
  np.testing.assert_allclose(
    tuned.apply(edited, held, X), tuned.apply(theta, held, X), rtol=1e-5, atol=1e-5
  )


def test_one_tree_or_two():
  model = Blocks(2)
  held = backbone(model)
  method = jpeft.chain(switched(), adapter('block_1'))
  tuned = jpeft.attach(model, method, held, X)
  theta = tuned.init(jax.random.key(0), held)
  two, _ = run(tuned, held, optax.adam(1e-2), theta, 4)
  one, _ = run(tuned, held, jpeft.freeze(optax.adam(1e-2), tuned.trainable), theta, 4, whole=True)
  chex.assert_trees_all_close(one, two, rtol=1e-6)


def test_entries_held_still_under_momentum():
  """`before` is exact: momentum and weight decay do not move what an edit holds."""

  def edit(state, grads, step, key):
    held = jnp.arange(RANK)[:, None] < step // 2
    keep = lambda new, old: {
      'kernel': {**new['kernel'], 'b': jnp.where(held, old['kernel']['b'], new['kernel']['b'])}
    }
    return state._replace(theta={p: keep(t, state.before[p]) for p, t in state.theta.items()})

  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank('.*/fc', edit=edit), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  tx = optax.adamw(1e-2, weight_decay=0.1)
  rows = [
    run(tuned, held, tx, theta, n)[0]['low']['block_0/fc']['kernel']['b'] for n in range(1, 6)
  ]
  for i in range(1, 5):
    moved = np.any(rows[i] != rows[i - 1], -1)
    np.testing.assert_array_equal(moved, np.arange(RANK) >= (i + 1) // 2)


STAGES = ((2, ('a',)), (4, ('b',)))


@pytest.mark.parametrize('name', MODELS)
def test_stages_change_what_is_trained(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank(FC, stages=STAGES), held, X)
  assert tuned.stages(10) == (0, 2, 4)
  theta = noisy(tuned.init(jax.random.key(0), held))
  one = WIDTH * RANK * 3
  counts = [jpeft.summary(tuned.at_stage(n, 10)).trainable for n in range(6)]
  assert counts == [2 * one, 2 * one, one, one, one, one]
  assert tuned.at_stage(4, 10).at_stage(0, 10) is tuned
  path = next(iter(theta['low']))
  grads = [
    jax.grad(lambda t, n=n: loss_of(tuned.at_stage(n, 10), held, t))(theta) for n in (0, 2, 4)
  ]
  moves = [[bool(np.any(g['low'][path]['kernel'][e])) for e in ('a', 'b')] for g in grads]
  assert moves == [[True, True], [False, True], [True, False]]
  with pytest.raises(ValueError, match='a stage begins after 4 updates, and there are 4 in all'):
    tuned.stages(4)


def test_moments_go_on_by_path():
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank('.*/fc', stages=STAGES), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  first, second, third = (tuned.at_stage(n, 10) for n in (0, 2, 4))
  tx = [optim.optimizer(t, t.shapes, lambda step: 1e-2) for t in (first, second, third)]
  theta, state = run(first, held, tx[0], theta, 2)
  carried = optim.carried(state, tx[1], second.split(theta)[0])
  adam, before = (optax.tree_utils.tree_get(s, 'nu') for s in (carried, state))
  for path in adam['low']:
    assert adam['low'][path]['kernel']['a'] is None
    np.testing.assert_array_equal(
      adam['low'][path]['kernel']['b'], before['low'][path]['kernel']['b']
    )
  assert int(optax.tree_utils.tree_get(carried, 'ScaleByAdamState').count) == 2
  again = optim.carried(carried, tx[2], third.split(theta)[0])
  fresh = optax.tree_utils.tree_get(again, 'nu')['low']['block_0/fc']['kernel']
  assert fresh['b'] is None and not np.any(fresh['a'])


def test_shares_of_a_run_and_mistakes():
  model = Blocks(2)
  held = backbone(model)
  attach = lambda **options: jpeft.attach(model, low_rank('.*/fc', **options), held, X)
  assert attach(stages=((0.3, ('b',)),)).stages(1000) == (0, 300)
  for wrong in (((0, ('b',)),), ((2, ()), (1, ())), ((0.5, ()), (3, ())), ((1.5, ()),)):
    with pytest.raises(ValueError, match='stages begin at rising numbers'):
      attach(stages=wrong)
  with pytest.raises(ValueError, match=r"stages='\*/c' names no entry"):
    attach(stages=((3, ('c',)),))

  def tried(edit, tx=None):
    tuned = attach(edit=edit)
    return run(tuned, held, tx or optax.adam(1e-2), tuned.init(jax.random.key(0), held), 1)

  with pytest.raises(ValueError, match='must return a State'):
    tried(lambda state, grads, step, key: state.theta)
  with pytest.raises(ValueError, match="drops 'block_1/fc/kernel/a' of theta"):
    tried(lambda s, grads, step, key: s._replace(theta={'block_0/fc': s.theta['block_0/fc']}))
  with pytest.raises(ValueError, match='returns 0 moments of 2'):
    tried(lambda state, grads, step, key: state._replace(moments=()))
  with pytest.raises(ValueError, match=r"makes 'block_0/fc/kernel/a' of theta \(1, 6, 2\)"):
    tried(lambda s, g, step, key: s._replace(theta=jax.tree.map(lambda x: x[None], s.theta)))
  same = lambda state, grads, step, key: state
  with pytest.raises(ValueError, match='needs moments in the shape of each entry'):
    tried(same, optax.scale_by_factored_rms(min_dim_size_to_factor=2))
  parts = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key), tree)
  both = optax.partition({'a': optax.adam(1e-2), 'b': optax.adam(1e-3)}, parts)
  with pytest.raises(ValueError, match='needs moments of all entries together'):
    tried(same, both)
