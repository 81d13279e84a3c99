"""SwitchLoRA: its worked switch, rates and start, what rests, starts anew and is stored."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import optim
from jpeft.methods.weight.switchlora import deviations, frequency, switched, switchlora
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 12)), jnp.float32)


def dense(width=9, **hyperparameters):
  """(tuned, variables) of one Dense layer [12, width]."""
  model = nn.Dense(width)
  variables = model.init(jax.random.key(0), X)
  return jpeft.attach(model, switchlora(targets='', **hyperparameters), variables, X), variables


def test_the_worked_switch():
  """In the paper's orientation W = I, B = [[1, 0], [0, 1], [1, 1]], A = [[1, 2, 3], [0, 1, 0]]."""
  a = jnp.array([[1.0, 2, 3], [0, 1, 0]]).T
  b = jnp.array([[1.0, 0], [0, 1], [1, 1]]).T
  new = jnp.array([0.5, 0, -1])
  t = {
    'a': a,
    'b': b,
    'w': jnp.eye(3),
    'pool_a': jnp.stack([new, a[:, 0], a[:, 1]]),
    'slots_a': jnp.array([1, 2]),
    'next_a': jnp.int32(0),
    'rest_a': jnp.zeros(2, jnp.int32),
    'rest_b': jnp.zeros(2, jnp.int32),
  }
  moments = [{'a': jnp.ones_like(a), 'b': jnp.ones_like(b)}]
  after, (mean,) = switched(t, moments, 'a', 1, most=1, rest=5, scale=1.0)
  np.testing.assert_array_equal(after['w'].T, [[1.5, 2, 4], [0, 1, 0], [0.5, 2, 5]])
  before = t['w'] + a @ b
  np.testing.assert_array_equal(after['w'] + after['a'] @ after['b'], before)
  np.testing.assert_array_equal(after['a'][:, 0], new)
  np.testing.assert_array_equal(mean['a'], 1)
  np.testing.assert_array_equal(mean['b'], [[0, 0, 0], [1, 1, 1]])
  np.testing.assert_array_equal(after['rest_b'], [5, 0])
  # The vector that follows in order: slot 1, where the first has been stored.
  again, _ = switched(after | {'next_a': jnp.int32(0)}, moments, 'a', 1, 1, 5, 1.0)
  assert int(again['slots_a'][0]) == 0
  back, _ = switched(after | {'slots_a': jnp.array([0, 0])}, moments, 'a', 1, 1, 5, 1.0)
  assert int(back['slots_a'][1]) == 1 or int(back['slots_a'][0]) == 0


def test_switching_back_restores_the_stored_vector():
  """With one candidate beside those in use, a turn of three switches ends where it began."""
  tuned, variables = dense(rank=2, candidates=3)
  t = tuned.init(jax.random.key(0), variables)['switchlora']['']['kernel']
  stored = {'a': np.asarray(t['a']), 'w': np.asarray(t['w'])}
  seen = []
  for _ in range(6):
    t, _ = switched(t, [], 'a', 1, 1, 5, 1 / 2)
    seen.append(np.asarray(t['a']))
  assert all(np.any(a != stored['a']) for a in seen[:-1])
  np.testing.assert_array_equal(seen[-1], stored['a'])
  np.testing.assert_allclose(t['w'], stored['w'], atol=1e-6)


def test_switches_grow_rare():
  expected = {0: 0.999699, 3999: 0.3, 8000: 0.0899729, 20_000: 0.00242927}
  switches = {0: 6.398, 3999: 1.92, 8000: 0.576, 20_000: 0.0155}
  for update, value in expected.items():
    assert float(frequency(update, 4000)) == pytest.approx(value, rel=1e-5)
    assert 256 / 40 * frequency(jnp.int32(update), 4000) == pytest.approx(
      switches[update], rel=5e-3
    )
  assert float(frequency(10**6, 4000)) == pytest.approx(1e-8)


def test_deviations_at_the_start():
  assert deviations(1024, 1024, 256) == pytest.approx((0.537285, 0.537285), abs=1e-6)
  # The paper's m is our n.
  assert deviations(1024, 2736, 256) == pytest.approx((0.607515, 0.475174), abs=1e-6)
  model = nn.Dense(400)
  x = jnp.zeros((1, 300))
  variables = model.init(jax.random.key(0), x)
  tuned = jpeft.attach(model, switchlora(64, targets=''), variables, x)
  t = tuned.init(jax.random.key(1), variables)['switchlora']['']['kernel']
  for part, std in zip('ab', deviations(300, 400, 64), strict=True):
    for array in (t[part], t[f'pool_{part}']):
      assert array.std() == pytest.approx(std, rel=0.03)
      assert jnp.abs(array).max() <= 3**0.5 * std
  np.testing.assert_array_equal(t['slots_a'], 300 - 64 + np.arange(64))
  np.testing.assert_array_equal(t['slots_b'], 300 - 64 + (np.arange(64) - 32) % 64)
  np.testing.assert_array_equal(t['a'].T, t['pool_a'][t['slots_a']])
  np.testing.assert_array_equal(t['b'], t['pool_b'][t['slots_b']])


@pytest.mark.parametrize('init', ['kept', 'paper', 'lora'])
def test_starts(init):
  tuned, variables = dense(rank=4, init=init)
  theta = tuned.init(jax.random.key(0), variables)
  t = theta['switchlora']['']['kernel']
  w = variables['params']['kernel']
  expected = w + t['a'] @ t['b'] / 4 if init == 'paper' else w
  assert np.any(t['b']) == (init != 'lora')
  merged = tuned.merge(theta, variables)['params']['kernel']
  np.testing.assert_allclose(merged, expected, atol=1e-6)
  out = tuned.apply(theta, variables, X)
  np.testing.assert_allclose(out, X @ expected + variables['params']['bias'], atol=1e-5)


@functools.cache
def trained(scan=False, steps=40, **hyperparameters):
  """[(theta, state, grads, outputs) after 0, 1, ... updates] of Adam, at rank 4."""
  model, variables = vit(scan=scan)
  method = switchlora(4, targets='{q}|{fc1}', interval=10, ratio=1.0, rest=5, **hyperparameters)
  tuned = jpeft.attach(model, method, variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  # Decay moves what rests, until the edit.
  decay = optax.add_decayed_weights(0.0 if scan else 0.1)
  adam = optim.by_vector(tuned, optax.scale_by_adam())
  tx = optax.chain(adam, decay, optax.scale(-0.01))
  state = tx.init(tuned.split(theta)[0])

  @jax.jit
  def update(theta, state, number):
    trained, held = tuned.split(theta)
    grads = jax.grad(
      lambda p: jnp.sum(jnp.sin(tuned.apply(tuned.join(p, held), variables, IMAGES)))
    )(trained)
    updates, state = tx.update(grads, state, trained)
    new = tuned.join(optax.apply_updates(trained, updates), held)
    key = jax.random.fold_in(jax.random.key(1), number)
    after, state = tuned.edit(theta, new, state, grads, number + 1, key, steps)
    # The function before the edit and after it.
    jump = [tuned.apply(t, variables, IMAGES) for t in (new, after)]
    return after, state, grads, jump

  found = [(theta, state, None, None)]
  for number in range(steps):
    theta, state, grads, jump = update(theta, state, number)
    found.append((theta, state, grads, jump))
  return found


def kernels(found, of, scan):
  """What the fc1 of the second block has of a tree like theta, after each update."""
  for theta, state, grads, _ in found:
    tree = {'theta': theta, 'grads': grads, 'mean': state[0].mu, 'count': state[0].count}[of]
    if scan:
      yield jax.tree.map(lambda x: np.asarray(x[1]), tree['switchlora']['encoder/blocks/mlp/fc1'])
    else:
      yield jax.tree.map(np.asarray, tree['switchlora']['encoder/block_1/mlp/fc1'])


@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
def test_a_switch_rests_and_starts_anew_its_counterpart_alone(scan):
  found = trained(scan)
  theta = [t['kernel'] for t in kernels(found, 'theta', scan)]
  grads = [None] + [g['kernel'] for g in kernels(found[1:], 'grads', scan)]
  mean = [m['kernel'] for m in kernels(found, 'mean', scan)]
  count = [c['kernel'] for c in kernels(found, 'count', scan)]
  switches = 0
  for part, other, axis in (('a', 'b', 1), ('b', 'a', 0)):
    for i in range(4):
      since = 0  # updates of the counterpart
      for u in range(1, len(theta)):
        t = theta[u]
        is_switched = t[f'slots_{part}'][i] != theta[u - 1][f'slots_{part}'][i]
        vector = lambda x, axis=1 - axis, i=i: np.take(x, i, axis)  # of the counterpart
        if theta[u - 1][f'rest_{other}'][i] > 0:
          if t[f'slots_{other}'][i] == theta[u - 1][f'slots_{other}'][i]:
            np.testing.assert_array_equal(vector(t[other]), vector(theta[u - 1][other]))
          else:  # it has rested, and is switched itself
            assert theta[u - 1][f'rest_{other}'][i] == 1
          assert not vector(grads[u][other]).any() and not vector(mean[u][other]).any()
          assert count[u][other].squeeze()[i] == 0
          assert not is_switched or t[f'rest_{other}'][i] == 5
          since = 0
        else:
          since += 1
          assert vector(t[other]).tolist() != vector(theta[u - 1][other]).tolist()
        if is_switched:
          switches += 1
          assert theta[u - 1][f'rest_{part}'][i] <= 1  # it did not rest itself
          assert t[f'rest_{other}'][i] == 5
          since = 0
          assert not vector(mean[u][other]).any()
        assert count[u][other].squeeze()[i] == since
        assert vector(mean[u][other]).any() == (since > 0)
  assert switches > 10


def test_the_function_does_not_jump_and_the_change_has_a_high_rank():
  scan = True
  found = trained(scan)
  for _, _, _, (before, after) in found[1:]:
    np.testing.assert_allclose(after, before, atol=1e-5)
  theta = [t['kernel'] for t in kernels(found, 'theta', scan)]
  whole = [t['w'] + t['a'] @ t['b'] / 4 for t in (theta[0], theta[-1])]
  assert np.linalg.matrix_rank(whole[1] - whole[0], tol=1e-4) > 4
  np.testing.assert_array_equal(np.sort(theta[-1]['slots_a']), np.unique(theta[-1]['slots_a']))


def test_random_candidates_are_none_in_use():
  for t in kernels(trained(choose='random'), 'theta', False):
    for part in 'ab':
      assert len(set(t['kernel'][f'slots_{part}'].tolist())) == 4


def test_adam_of_a_vector_counts_its_own_updates():
  """After a restart the first update is that of a fresh Adam."""
  tuned, variables = dense(rank=4)
  theta, _ = tuned.split(tuned.init(jax.random.key(0), variables))
  tx = optim.by_vector(tuned, optax.scale_by_adam())
  plain = optax.scale_by_adam()
  state, other = tx.init(theta), plain.init(theta)
  grads = jax.tree.map(lambda x: jnp.cos(3 * x), theta)
  for _ in range(3):
    updates, state = tx.update(grads, state, theta)
    expected, other = plain.update(grads, other, theta)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)
  one = lambda tree: tree['switchlora']['']['kernel']
  assert one(state.count)['a'].shape == (1, 4) and one(state.count)['b'].shape == (4, 1)
  cleared = jax.tree.map(lambda x: x.at[..., 2].set(0) if x.shape[-1] == 4 else x, state)
  updates, _ = tx.update(grads, cleared, theta)
  first, _ = plain.update(grads, plain.init(theta), theta)
  goes_on, _ = plain.update(grads, other, theta)
  np.testing.assert_allclose(one(updates)['a'][:, 2], one(first)['a'][:, 2], rtol=1e-6)
  np.testing.assert_allclose(one(updates)['a'][:, 1], one(goes_on)['a'][:, 1], rtol=1e-6)


def test_pools_do_not_enter_the_model():
  tuned, variables = dense(rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  active, idle = tuned.active(theta)
  assert {path.split('/')[-1] for path in jpeft.core.leaf_paths(idle)} == {'pool_a', 'pool_b'}
  np.testing.assert_array_equal(tuned.apply(active, variables, X), tuned.apply(theta, variables, X))


def test_counts_at_full_size():
  """LLaMA-350M, r = 256: r (m + n) a kernel, and pools of min(m, n) candidates."""
  model = full_size.llama(24, 1024, 2736)
  tuned = jpeft.attach(model.model, switchlora(256), *model.shapes)
  factors = 256 * (4 * 2 * 1024 + 3 * (1024 + 2736)) * 24
  assert jpeft.summary(tuned).trainable == factors
  idle = jax.tree.leaves(tuned.active(tuned.shapes)[1])
  assert sum(x.size for x in idle) == 1024 * (4 * 2 * 1024 + 3 * (1024 + 2736)) * 24


def test_what_is_refused():
  for hyperparameters, message in (
    ({'rank': 0}, 'rank must be a whole number'),
    ({'alpha': 0}, 'switchlora: alpha=0 must be greater than 0'),
    ({'interval': 9}, r'switchlora: interval=9 must be a whole number, at least 2 \* rest=10'),
    ({'rest': 0}, 'switchlora: rest=0 must be a whole number'),
    ({'ratio': 0}, r'switchlora: ratio=0 must lie in \(0, 1\]'),
    ({'init': 'zero'}, "switchlora: init='zero' is none of"),
    ({'choose': 'any'}, "switchlora: choose='any' is none of"),
  ):
    with pytest.raises(ValueError, match=message):
      switchlora(**hyperparameters)
  with pytest.raises(ValueError, match=r'switchlora: candidates=9 of a kernel \[12, 9\]'):
    dense(rank=9)
  tuned, variables = dense(rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  grads, _ = tuned.split(theta)
  key = jax.random.key(0)
  own = optim.by_vector(tuned, optax.scale_by_adam()).init(grads)
  with pytest.raises(ValueError, match='give Tuned.edit the number, as steps='):
    tuned.edit(theta, theta, own, grads, 1, key)
  for tx in (optax.adam(1e-3), optax.adamw(1e-3)):
    with pytest.raises(ValueError, match='counts the updates of all together'):
      tuned.edit(theta, theta, tx.init(grads), grads, 1, key, 10)
  tuned.edit(theta, theta, optax.sgd(1e-3, 0.9).init(grads), grads, 1, key, 10)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion'])
def test_the_optimizers_of_a_run(name):
  tuned, variables = dense(rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  tx = optim.optimizer(tuned, tuned.shapes, lambda step: 1e-2, name=name)
  grads, _ = tuned.split(theta)
  _, state = tx.update(grads, tx.init(grads), grads)
  tuned.edit(theta, theta, state, grads, 1, jax.random.key(0), 10)


@pytest.mark.parametrize('name', ['galore', 'natural_galore', 'muon'])
def test_rules_of_matrices_are_refused(name):
  tuned, _ = dense(rank=4)
  with pytest.raises(ValueError, match=f'switchlora .* and {name!r} keeps those of many'):
    optim.optimizer(tuned, tuned.shapes, lambda step: 1e-2, name=name, rank=2)
