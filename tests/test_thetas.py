"""Arithmetic on trained thetas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import Blocks, X, backbone, low_rank, noisy
from tests.fixtures import EDGES


def hadamard(rank):
  """w * (1 + a b)."""

  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], rank)), 'b': jnp.zeros((rank, w.shape[1]))}

  def weight(t, w):
    return w * (1 + t['a'] @ t['b'])

  return jpeft.at('.*fc', jpeft.matrix('hadamard', init, weight))


@pytest.fixture(scope='module')
def made():
  """A method on a model, its backbone and two thetas."""
  model = Blocks(stack='scan')
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank('.*fc'), held, X)
  one = noisy(tuned.init(jax.random.key(0), held))
  other = noisy(tuned.init(jax.random.key(1), held))
  return tuned, held, one, other


def test_sums_means_and_differences(made):
  _, _, one, other = made
  both = jpeft.thetas.add(one, other)
  chex.assert_trees_all_close(both, jax.tree.map(jnp.add, one, other))
  chex.assert_trees_all_close(jpeft.thetas.subtract(both, other), one, atol=1e-6)
  chex.assert_trees_all_close(
    jpeft.thetas.average([one, other]), jpeft.thetas.scale(both, 0.5), atol=1e-6
  )
  quarter = jpeft.thetas.average([one, other], [1, 3])
  wanted = jpeft.thetas.add(jpeft.thetas.scale(one, 0.25), jpeft.thetas.scale(other, 0.75))
  chex.assert_trees_all_close(quarter, wanted, atol=1e-6)
  chex.assert_trees_all_equal_shapes_and_dtypes(quarter, one)


def test_a_mean_by_fisher_information(made):
  tuned, _, one, other = made
  certain = jax.tree.map(jnp.ones_like, one)
  ignorant = jax.tree.map(jnp.zeros_like, one)
  chex.assert_trees_all_close(
    jpeft.thetas.fisher_average([one, other], [certain, ignorant]), one, atol=1e-6
  )
  chex.assert_trees_all_close(
    jpeft.thetas.fisher_average([one, other], [ignorant, ignorant]),
    jpeft.thetas.average([one, other]),
    atol=1e-6,
  )
  # What is not trained has no information: None, as `split` leaves it.
  trained, _ = tuned.split(certain)
  found = jpeft.thetas.fisher_average([one, other], [trained, trained])
  chex.assert_trees_all_close(found, jpeft.thetas.average([one, other]), atol=1e-6)


def test_state_stays_and_must_agree():
  one = {'m': {'fc': {'rows': jnp.array([1, 2]), 'p': jnp.ones(2)}}}
  other = {'m': {'fc': {'rows': jnp.array([1, 3]), 'p': jnp.ones(2)}}}
  found = jpeft.thetas.add(one, one)
  np.testing.assert_array_equal(found['m']['fc']['rows'], [1, 2])
  np.testing.assert_array_equal(found['m']['fc']['p'], [2, 2])
  with pytest.raises(ValueError, match="'m/fc/rows' is state and differs between thetas"):
    jpeft.thetas.add(one, other)


@pytest.mark.parametrize(
  ('other', 'message'),
  (
    ({'m': {'fc': {'a': np.ones(3)}}}, r"'m/fc/a' has the shape \(2,\) in one theta and \(3,\)"),
    ({'m': {'fc': {'b': np.ones(2)}}}, "'m/fc/a' is in one theta and not in another"),
  ),
)
def test_thetas_of_other_methods(other, message):
  with pytest.raises(ValueError, match=message):
    jpeft.thetas.add({'m': {'fc': {'a': np.ones(2)}}}, other)


def test_numbers_that_do_not_fit(made):
  *_, one, other = made
  with pytest.raises(ValueError, match='2 thetas and 1 weights'):
    jpeft.thetas.average([one, other], [1])
  with pytest.raises(ValueError, match='the weights sum to 0'):
    jpeft.thetas.average([one, other], [1, -1])
  with pytest.raises(ValueError, match='1 thetas and 2 fishers'):
    jpeft.thetas.fisher_average([one], [one, one])


def test_some_adapters_of_a_theta():
  theta = {'en': {'fc': 1}, 'de': {'fc': 2}}
  assert jpeft.thetas.only(theta, 'de') == {'de': {'fc': 2}}
  with pytest.raises(ValueError, match="no adapter 'dee', only en, de; did you mean 'de'"):
    jpeft.thetas.only(theta, 'dee')


def test_parts_by_name():
  theta = {'lora': {'fc': {}}, 'head': {'head': {}}}
  assert jpeft.thetas.drop(theta, 'head') == jpeft.thetas.only(theta, 'lora')
  with pytest.raises(ValueError, match="no adapter 'heads', only lora, head.*did you mean 'head'"):
    jpeft.thetas.drop(theta, 'heads')


# ---- Ranks.


def lora(rank, targets='.*fc', **kwargs):
  return jpeft.lora(rank, targets=targets, **kwargs)


def tuned_of(method, model=None, args=(X,)):
  model = model or Blocks(3, 'scan')
  held = backbone(model, *args)
  return jpeft.attach(model, method, held, *args), held


def added(tuned, theta, held):
  """What theta adds to the weights."""
  return jax.tree.map(lambda new, old: new - old, tuned.merge(theta, held), held)


RANKS = {
  'lora': (lora(4, alpha=3), lambda rank: lora(rank, alpha=3)),
  'rslora': (lora(4, rslora=True), lambda rank: lora(rank, rslora=True)),
  'another alpha': (lora(4, alpha=2), lambda rank: lora(rank, alpha=5)),
  'another scale': (lora(4), lambda rank: lora(rank, rslora=True)),
  'no scale': (low_rank('.*fc', 'lora'), lambda rank: lora(rank)),
  'layers': (jpeft.in_layers(lora(4), '0,2'), lambda rank: jpeft.in_layers(lora(rank), '0,2')),
}


@pytest.mark.parametrize('name', RANKS)
@pytest.mark.parametrize('stack', ('', 'scan'))
def test_a_higher_rank_adds_the_same(name, stack):
  method, other = RANKS[name]
  tuned, held = tuned_of(method, Blocks(3, stack))
  target, _ = tuned_of(other(5), Blocks(3, stack))
  theta = noisy(tuned.init(jax.random.key(0), held))
  fresh = target.init(jax.random.key(1), held)
  found = jpeft.thetas.re_rank(tuned, theta, target, fresh)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, target.shapes)
  wanted = added(tuned, theta, held)
  chex.assert_trees_all_close(added(target, found, held), wanted, rtol=1e-5, atol=1e-5)
  # What is new can be trained: its b has a gradient.
  grads = jax.grad(lambda theta: jnp.sum(target.apply(theta, held, X) ** 2))(found)
  for pair in jax.tree.leaves(grads, is_leaf=lambda x: 'b' in x):
    assert np.abs(pair['b'][..., -1, :]).min() > 0


@pytest.mark.parametrize('name', RANKS)
def test_a_lower_rank_is_the_nearest_of_that_rank(name):
  method, other = RANKS[name]
  tuned, held = tuned_of(method)
  target, _ = tuned_of(other(1))
  theta = noisy(tuned.init(jax.random.key(0), held))
  found = jpeft.thetas.re_rank(tuned, theta, target)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, target.shapes)

  def best(delta):
    u, s, vt = np.linalg.svd(delta)
    return s[0] * np.outer(u[:, 0], vt[0])

  wanted = added(tuned, theta, held)['params']['blocks']['fc']['kernel']
  kernel = added(target, found, held)['params']['blocks']['fc']['kernel']
  np.testing.assert_allclose(kernel, [best(layer) for layer in wanted], rtol=1e-4, atol=1e-5)


def test_a_rank_that_suffices_loses_nothing_and_batches_are_cut_one_by_one():
  row = EDGES['linen_moe']
  tuned, _ = tuned_of(lora(6, ''), row.model, row.args)
  target, held = tuned_of(lora(2, ''), row.model, row.args)
  thin = noisy(target.init(jax.random.key(0), held))
  wide = jpeft.thetas.re_rank(target, thin, tuned)  # of rank 2, in 6 columns
  again = jpeft.thetas.re_rank(tuned, wide, target)
  wanted = added(target, thin, held)
  chex.assert_trees_all_close(added(tuned, wide, held), wanted, atol=1e-5)
  chex.assert_trees_all_close(added(target, again, held), wanted, atol=1e-5)


def test_the_sum_of_several_as_one():
  method = jpeft.chain(lora(2, alpha=3), jpeft.tune('.*fc', 'bias', name='head'))
  tuned, held = tuned_of(method)
  target, _ = tuned_of(jpeft.chain(lora(4, rslora=True), jpeft.tune('.*fc', 'bias', name='head')))
  one, other = (
    {**tuned.init(jax.random.key(0), held), 'lora': noisy(tuned.init(key, held))['lora']}
    for key in jax.random.split(jax.random.key(1))
  )
  found = jpeft.thetas.concat(tuned, [one, other], target)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, target.shapes)
  both = jax.tree.map(jnp.add, added(tuned, one, held), added(tuned, other, held))
  chex.assert_trees_all_close(added(target, found, held), both, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='the ranks sum to 6 and the target has rank 4'):
    jpeft.thetas.concat(tuned, [one, other, one], target)
  moved = {**other, 'head': noisy(other['head'])}
  with pytest.raises(ValueError, match="'head/blocks/fc/bias' differs between thetas"):
    jpeft.thetas.concat(tuned, [one, moved], target)
  with pytest.raises(ValueError, match='there is no theta'):
    jpeft.thetas.concat(tuned, [], target)


@pytest.mark.parametrize(
  ('method', 'other', 'message'),
  (
    (
      jpeft.dora(4, targets='.*fc'),
      jpeft.dora(2, targets='.*fc'),
      r'\(a, b, m\) is no pair of a and b',
    ),
    (lora(4, init='pissa'), lora(2, init='pissa'), r'\(a, a0, b, b0\) is no pair of a'),
    (lora(4), lora(2, name='other'), "'lora/blocks/fc/kernel' is in theta or in the target"),
    (hadamard(4), hadamard(2), 'hadamard does not add a multiple of a b to a matrix'),
  ),
)
def test_ranks_that_cannot_be_changed(method, other, message):
  tuned, held = tuned_of(method)
  target, _ = tuned_of(other)
  theta = tuned.init(jax.random.key(0), held)
  with pytest.raises(ValueError, match=message):
    jpeft.thetas.re_rank(tuned, theta, target)


def test_a_trained_theta_is_no_start_for_new_directions():
  tuned, held = tuned_of(lora(2))
  target, _ = tuned_of(lora(4))
  fresh = noisy(target.init(jax.random.key(0), held))
  with pytest.raises(ValueError, match='what `fresh` has there is not zero'):
    jpeft.thetas.re_rank(tuned, tuned.init(jax.random.key(0), held), target, fresh)
