"""SNELLA: the mixed kernel, the budget and how it is shared out, the running means, and counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.weight import snella as parts
from jpeft.methods.weight.snell import chosen, left_out, snell
from jpeft.methods.weight.snella import Competition, allocated, averaged, budget, mixed, snella
from tests.fixtures import noisy
from tests.methods.small import IMAGES, vit
from tests.methods.weight.test_snell import vit_base

D = jnp.array([[0.0, 0], [-0.1, 0.1]])
LAYOUTS = pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])


def attached(method, **fields):
  """(model, tuned, variables, a theta)."""
  model, variables = vit(**fields)
  tuned = jpeft.attach(model, method, variables, IMAGES)
  return model, tuned, variables, jax.jit(tuned.init)(jax.random.key(0), variables)


def moved(theta, size):
  """A theta off its start that keeps as many entries."""
  new = noisy(theta, size)
  for path, arrays in theta['snella'].items():
    for name, t in arrays.items():
      new['snella'][path][name]['kept'] = t['kept']
  return new


def kernels(theta, entry):
  """An entry of all kernels, by path and number in the stack."""
  found = {}
  for path, arrays in theta['snella'].items():
    for name, t in arrays.items():
      for i, value in enumerate(jnp.atleast_1d(t[entry])):
        found[path, name, i] = value
  return found


def test_without_the_second_kernel_it_is_snell():
  method = snella(rank=4, sparsity=0.6, sparsity_start=0.6)
  model, tuned, variables, theta = attached(method, depth=1)
  theta = moved(theta, 0.3)
  plain = jpeft.attach(model, snell(rank=4, sparsity=0.6), variables, IMAGES)
  same = {'snell': {}}
  for path, arrays in theta['snella'].items():
    same['snell'][path] = {a: {'p': t['p'], 'q': t['q']} for a, t in arrays.items()}
    for t in arrays.values():
      t |= {'alpha': jnp.zeros(()), 'beta': jnp.zeros(())}
  out = plain.apply(same, variables, IMAGES)
  assert np.abs(out - model.apply(variables, IMAGES)).max() > 1e-2
  np.testing.assert_allclose(tuned.apply(theta, variables, IMAGES), out, atol=1e-6)


def test_the_worked_example_of_the_mixed_kernel():
  values = mixed(D, 1.0, jnp.array(1.0), 0.0)
  np.testing.assert_allclose(values, [[0.5, 0.5], [0.350166, 0.649834]], atol=1e-6)
  delta = chosen(values, left_out(0.5, 2, 2))
  np.testing.assert_allclose(delta, [[0, 0], [0, 0.422284]], atol=1e-6)


def test_gamma_is_guarded_and_can_leave():
  values = jnp.linspace(-1e-3, 1e-3, 12).reshape(3, 4)
  for gamma in (0.0, 1e-9, -1e-9):
    value, grad = jax.value_and_grad(lambda g: mixed(values, 1.0, g, 0.0)[0, 0])(gamma)
    assert np.isfinite(value) and np.isfinite(grad) and grad != 0
  assert mixed(values, 1.0, jnp.array(-1.0), 0.0)[0, 0] > mixed(values, 1.0, 1.0, 0.0)[0, 0]


def test_the_budget_falls_from_the_start_to_the_end():
  schedule = Competition(sparsity=0.8, sparsity_start=0.01, every=1, rounds=100)
  size = 84_934_656.0
  volumes = [float(budget(size, schedule, e)) for e in range(0, 102)]
  assert volumes[0] == pytest.approx(size * 0.99) and volumes[100] == pytest.approx(size * 0.2)
  assert volumes[101] == volumes[100] and np.all(np.diff(volumes[:101]) < 0)
  assert volumes[50] == pytest.approx(size * (0.2 + 0.79 / 8), rel=1e-6)


BLOCK = [768.0 * 768] * 4 + [768.0 * 3072] * 2


@pytest.mark.parametrize('share', [0.01, 0.2, 0.6, 0.99, 1.0])
@pytest.mark.parametrize('spread', [0, 1, 8])
def test_all_of_the_budget_is_shared_out(share, spread):
  """Among the 72 kernels of ViT-B, with scores that are alike or differ by many powers of ten."""
  sizes = jnp.array(BLOCK * 12)
  assert sizes.sum() == 84_934_656
  scores = jnp.exp(spread * jax.random.normal(jax.random.key(0), sizes.shape))
  kept = allocated(scores, sizes, share * sizes.sum())
  assert abs(np.sum(np.asarray(kept, float)) - share * 84_934_656) <= len(sizes)
  assert jnp.all(kept >= 0) and jnp.all(kept <= sizes)
  if spread == 0:
    assert len({float(x) for x in kept[:4]}) == 1 and kept[0] == kept[6]


def test_what_a_full_kernel_cannot_take_goes_to_the_others():
  sizes = jnp.array([10.0, 100])
  kept = allocated(jnp.array([0.9, 0.1]), sizes, 50.0)
  np.testing.assert_array_equal(kept, [10, 40])
  np.testing.assert_allclose(1 - kept / sizes, [0, 0.6], atol=1e-6)
  # One fills up after another.
  kept = allocated(jnp.array([0.90, 0.08, 0.02]), jnp.array([10.0, 20, 100]), 60.0)
  np.testing.assert_array_equal(kept, [10, 20, 30])


def test_kernels_without_a_score():
  sizes = jnp.array([10.0, 10, 10])
  np.testing.assert_array_equal(allocated(jnp.zeros(3), sizes, 15.0), [5, 5, 5])
  np.testing.assert_array_equal(allocated(jnp.array([1.0, 0, 0]), sizes, 6.0), [6, 0, 0])
  np.testing.assert_array_equal(allocated(jnp.array([1.0, 0, 0]), sizes, 18.0), [10, 4, 4])


def one_kernel(importance=0.0, uncertainty=0.0):
  x = jnp.ones((2, 1, 1))
  means = [{'p': x * value, 'q': x * value} for value in (importance, uncertainty)]
  return {'p': x, 'q': x, 'importance': means[0], 'uncertainty': means[1]}


def test_the_running_means():
  t = one_kernel()
  first = averaged(t, t, {'p': t['p'], 'q': -t['q']})
  for part in 'pq':
    np.testing.assert_allclose(first['importance'][part], 0.15, rtol=1e-6)
    np.testing.assert_allclose(first['uncertainty'][part], 0.15 * abs(1 - 0.15), rtol=1e-6)
    np.testing.assert_allclose(first['uncertainty'][part], 0.1275, rtol=1e-6)
  second = averaged({**t, **first}, t, jax.tree.map(jnp.zeros_like, {'p': t['p'], 'q': t['q']}))
  np.testing.assert_allclose(second['importance']['p'], 0.1275, rtol=1e-6)


def test_a_gradient_that_is_no_number_leaves_scores_finite():
  t = one_kernel(0.5, 0.5)
  after = averaged(t, t, {'p': jnp.full((2, 1, 1), jnp.nan), 'q': t['q']})
  np.testing.assert_allclose(after['importance']['p'], 0.85 * 0.5)
  scores = parts.Kernels.of({**t, **after}).scores
  assert scores.shape == (1,) and jnp.isfinite(scores).all()


def updates(tuned, variables, theta, rate):
  """Yields theta after each update by SGD with momentum."""
  tx = optax.sgd(rate, 0.9)
  state = tx.init(tuned.split(theta)[0])

  @jax.jit
  def step(theta, state, number):
    now, held = tuned.split(theta)
    loss = lambda now: jnp.sum(tuned.apply(tuned.join(now, held), variables, IMAGES) ** 2)
    grads = jax.grad(loss)(now)
    changes, state = tx.update(grads, state, now)
    new = tuned.join(optax.apply_updates(now, changes), held)
    return tuned.edit(theta, new, state, grads, number, jax.random.key(0))

  for number in itertools.count(1):
    theta, state = step(theta, state, number)
    yield theta


def kept_of(theta):
  return {place: float(x) for place, x in kernels(theta, 'kept').items()}


@LAYOUTS
def test_layers_compete_and_merge(fields):
  """Four kernels, a round each second update, and sparsity 0.5 after two rounds."""
  method = snella(4, 0.5, sparsity_start=0.0, every=2, rounds=2, targets='{q}|{fc1}')
  model, tuned, variables, theta = attached(method, depth=2, **fields)
  sizes = kept_of(theta)
  assert sorted(sizes.values()) == [32 * 32, 32 * 32, 32 * 64, 32 * 64]

  first, *later = itertools.islice(updates(tuned, variables, theta, 1e-3), 6)
  assert kept_of(first) == sizes  # no round is over
  for theta, number in zip(later, (1, 1, 2, 2, 2), strict=True):
    kept = kept_of(theta)
    volume = float(budget(sum(sizes.values()), method[0][1].edit, number))
    assert volume - len(kept) <= sum(kept.values()) <= volume + 0.01
    assert all(0 <= kept[place] <= sizes[place] for place in kept)
  assert len(set(kept.values())) > 2  # the layers differ

  theta = moved(theta, 0.1)
  out = tuned.apply(theta, variables, IMAGES)
  scale = np.abs(out).max()
  assert np.abs(out - model.apply(variables, IMAGES)).max() > 1e-3 * scale
  merged = model.apply(tuned.merge(theta, variables), IMAGES)
  np.testing.assert_allclose(merged, out, atol=1e-5 * scale)


def test_a_stack_is_shared_out_as_its_layers():
  def layer(key):
    key_p, key_q = jax.random.split(key)
    t = {'p': jax.random.normal(key_p, (2, 6, 1)), 'q': jax.random.normal(key_q, (2, 5, 1))}
    means = {part: jnp.abs(t[part]) for part in 'pq'}
    return {**t, 'importance': means, 'uncertainty': means, 'kept': jnp.float32(30)}

  layers = [layer(key) for key in jax.random.split(jax.random.key(0), 3)]
  competition = Competition(sparsity=0.6, sparsity_start=0.1, every=1, rounds=2)
  apart = competition.shared_out({str(i): {'kernel': t} for i, t in enumerate(layers)}, 1)
  stack = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  together = competition.shared_out({'stack': {'kernel': stack}}, 1)
  kept = [float(apart[str(i)]['kernel']['kept']) for i in range(3)]
  assert kept == together['stack']['kernel']['kept'].tolist() and len(set(kept)) > 1


def test_the_counts_on_vit_base():
  base = vit_base(scan=True)
  tuned = jpeft.attach(base.model, snella(8), *base.shapes)
  assert jpeft.summary(tuned).trainable == 165_888 * 8 + 216 == 1_327_104 + 216
  numbers = [x.size for x in jax.tree.leaves(tuned.shapes['snella']) if x.ndim <= 1]
  assert sum(numbers) == 216 + 72  # and how many entries each kernel keeps


def test_all_of_the_kernel_without_a_competition():
  method = snella(rank=4, sparsity=0.0, sparsity_start=0.0)
  assert method[0][1].edit is None
  model, tuned, variables, theta = attached(method, depth=1)
  t = theta['snella']['encoder/block_0/mlp/fc1']['kernel']
  assert set(t) == {'p', 'q', 'alpha', 'gamma', 'beta'}
  merged = tuned.merge(theta, variables)
  new, old = (x['params']['encoder']['block_0']['mlp']['fc1'] for x in (merged, variables))
  delta = new['kernel'] - old['kernel']
  np.testing.assert_allclose(delta.mean(), 1 / 64, atol=2e-3)  # the mean of the inputs


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 5}, 'snella: rank=5 must be even'),
    ({'sparsity': 1.0}, r'snella: sparsity=1.0 must lie in \[0, 1\)'),
    (
      {'sparsity': 0.1, 'sparsity_start': 0.2},
      'snella: sparsity_start=0.2 must not exceed sparsity=0.1',
    ),
    ({'every': 0}, 'snella: every=0 must be a whole number, at least 1'),
    ({'rounds': 0}, 'snella: rounds=0 must be a whole number, at least 1'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    snella(**hyperparameters)
