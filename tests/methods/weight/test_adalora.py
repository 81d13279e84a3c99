"""AdaLoRA: worked numbers, its budget, importance, what is left out, the penalty, and counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.weight.adalora import adalora, budget
from tests.fixtures import noisy
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(7, 12)), jnp.float32)


class Two(nn.Module):
  """Two layers of unlike sizes."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(5, name='second')(jnp.tanh(nn.Dense(9, name='first')(x)))


MODEL = Two()
VARIABLES = MODEL.init(jax.random.key(0), X)


def attached(**hyperparameters):
  method = adalora(**{'rank': 4, 'target': 2, 'targets': 'first|second', **hyperparameters})
  return jpeft.attach(MODEL, method, VARIABLES, X)


def test_a_worked_update():
  """a diag(e) b of a = [1, 2]^T, e = 3, b = [1, -1], scaled by 4 / 1."""
  model = nn.Dense(2, use_bias=False)
  x = jnp.eye(2)
  variables = {'params': {'kernel': jnp.zeros((2, 2))}}
  tuned = jpeft.attach(model, adalora(1, 1, 4, targets=''), variables, x)
  theta = tuned.init(jax.random.key(0), variables)
  t = theta['adalora']['']['kernel']
  t |= {'a': jnp.array([[1.0], [2.0]]), 'e': jnp.array([3.0]), 'b': jnp.array([[1.0, -1.0]])}
  want = [[12, -12], [24, -24]]
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), want)
  np.testing.assert_array_equal(tuned.merge(theta, variables)['params']['kernel'], want)


def test_the_budget_falls_as_a_cube():
  """Of 100 triplets 20 at the end, from update 10 to update 50: half way 20 + 80 / 8."""
  found = [int(budget(step, 10, 50, 100, 20)) for step in (1, 10, 30, 49, 50, 90)]
  assert found == [100, 100, 30, 20, 20, 20]


def trained(steps: int, tuned, total: int):
  """[theta after 0, 1, ... updates], [gradients of each]."""
  theta = noisy(tuned.init(jax.random.key(0), VARIABLES))
  theta['adalora'] = jax.tree.map(lambda x: x, theta['adalora'])
  for t in (arrays['kernel'] for arrays in theta['adalora'].values()):
    for part in t:
      if '_' in part:
        t[part] = jnp.zeros_like(t[part])
  tx = optax.adamw(1e-2)
  state = tx.init(tuned.split(theta)[0])

  @jax.jit
  def update(theta, state, number):
    trained, held = tuned.split(theta)

    def loss(p):
      run = lambda: tuned.apply(tuned.join(p, held), VARIABLES, X, aux=True)
      value, _, _ = tuned.objective(run, lambda out: jnp.sum(jnp.sin(out)))
      return value

    grads = jax.grad(loss)(trained)
    updates, state = tx.update(grads, state, trained)
    new = tuned.join(optax.apply_updates(trained, updates), held)
    return *tuned.edit(theta, new, state, grads, number, jax.random.key(0), total), grads

  thetas, all_grads = [theta], []
  for number in range(1, steps + 1):
    theta, state, grads = update(theta, state, number)
    thetas.append(theta)
    all_grads.append(grads)
  return thetas, all_grads


def test_importance_and_what_is_left_out_are_those_of_the_paper():
  """warmup 2, settle 4, of 12 updates: choices in updates 4, 6 and 8, the last of which holds."""
  tuned = attached(warmup=2, settle=4, every=2)
  thetas, grads = trained(10, tuned, 12)
  sites = ('first', 'second')
  means, doubts = {}, {}
  of = lambda tree, site: tree['adalora'][site]['kernel']
  for number, gradient in enumerate(grads, 1):
    scores = {}
    for site in sites:
      before, g = of(thetas[number - 1], site), of(gradient, site)
      for part in 'aeb':
        now = np.abs(before[part] * g[part])
        mean = 0.85 * means.get((site, part), 0) + 0.15 * now
        doubt = 0.85 * doubts.get((site, part), 0) + 0.15 * np.abs(now - mean)
        means[site, part], doubts[site, part] = mean, doubt
        np.testing.assert_allclose(of(thetas[number], site)[f'mean_{part}'], mean, rtol=1e-5)
        np.testing.assert_allclose(of(thetas[number], site)[f'doubt_{part}'], doubt, rtol=1e-4)
      both = {part: means[site, part] * doubts[site, part] for part in 'aeb'}
      scores[site] = both['e'] + both['a'].mean(0) + both['b'].mean(1)
    if number in (4, 6, 8):
      count = {4: 4 + int(4 * (4 / 6) ** 3), 6: 4 + int(4 * (2 / 6) ** 3), 8: 4}[number]
      least = np.sort(np.concatenate([scores[site] for site in sites]))[8 - count]
      chosen = {site: scores[site] >= least for site in sites}
    for site in sites:
      after = of(thetas[number], site)
      if number in (4, 6, 8):
        np.testing.assert_array_equal(after['kept'], chosen[site])
      if number in (4, 6, 8, 9, 10):
        np.testing.assert_array_equal(after['e'] != 0, chosen[site])
      else:
        assert np.all(after['e'] != 0)


def test_the_penalty_is_added_once():
  tuned = attached(orth=2)
  theta = noisy(tuned.init(jax.random.key(0), VARIABLES))
  run = lambda: tuned.apply(theta, VARIABLES, X, aux=True)
  value, out, _ = tuned.objective(run, jnp.sum)
  apart = []
  for arrays in theta['adalora'].values():
    a, b = np.asarray(arrays['kernel']['a']), np.asarray(arrays['kernel']['b'])
    apart += [np.linalg.norm(a.T @ a - np.eye(4)), np.linalg.norm(b @ b.T - np.eye(4))]
  np.testing.assert_allclose(value, jnp.sum(out) + 2 * np.mean(apart), rtol=1e-5)
  assert not attached(orth=0).has_loss
  at_rest = jpeft.frozen(adalora(4, 2, targets='first|second'), theta)
  assert not jpeft.attach(MODEL, at_rest, VARIABLES, X).has_loss


def test_two_of_them_are_two_means():
  first, second = (adalora(4, 2, targets=site, orth=1, name=site) for site in ('first', 'second'))
  tuned = jpeft.attach(MODEL, jpeft.chain(first, second), VARIABLES, X)
  theta = noisy(tuned.init(jax.random.key(0), VARIABLES))

  def penalty(tuned, theta):
    run = lambda: tuned.apply(theta, VARIABLES, X, aux=True)
    return tuned.objective(run, lambda out: 0.0)[0]

  alone = [penalty(tuned.only(site), {site: theta[site]}) for site in ('first', 'second')]
  np.testing.assert_allclose(penalty(tuned, theta), sum(alone), rtol=1e-6)


def test_counts_on_llama_7b():
  """r (fan_in + 1 + fan_out) a kernel, queries and values of 32 layers."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, adalora(12), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64 * 12 * (4096 + 1 + 4096) == 6_292_224


def test_an_unknown_or_too_short_training_is_refused():
  tuned = attached()
  theta = tuned.init(jax.random.key(0), VARIABLES)
  grads, _ = tuned.split(theta)
  state = optax.sgd(1e-3).init(grads)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='adalora: its budget depends on how many updates'):
    tuned.edit(theta, theta, state, grads, 1, key)
  with pytest.raises(ValueError, match='of 4 updates warmup=2 and settle=2 leave none in between'):
    attached(warmup=2, settle=2).edit(theta, theta, state, grads, 1, key, 4)


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'rank must be a whole number, at least 1'),
    ({'alpha': 0}, 'adalora: alpha=0 must be greater than 0'),
    ({'target': 13}, 'adalora: target=13 must not exceed rank=12'),
    ({'settle': 1.5}, 'adalora: settle=1.5 must be a share below 1'),
    ({'every': 0}, 'adalora: every=0 must be a whole number'),
    ({'orth': -1}, 'adalora: orth=-1 must be at least 0'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    adalora(**hyperparameters)
