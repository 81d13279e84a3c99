"""A trained method as the base that another one learns on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import (
  BLOCKS,
  Blocks,
  X,
  adapter,
  backbone,
  low_rank,
  noisy,
  shift,
  stacks,
)

MODELS = stacks(4)


def trained(model, method):
  held = backbone(model)
  tuned = jpeft.attach(model, method, held, X)
  return held, tuned, noisy(tuned.init(jax.random.key(0), held))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(
  'method',
  (
    low_rank('.*fc'),
    adapter(BLOCKS),
    jpeft.in_layers(low_rank('.*fc'), '1,-1'),
    jpeft.tune('.*fc', 'bias'),
  ),
  ids=('weight', 'call', 'layers', 'tune'),
)
def test_a_frozen_method_computes_as_it_was_trained(name, method):
  model = MODELS[name]()
  held, tuned, theta = trained(model, method)
  base = jpeft.attach(model, jpeft.frozen(method, theta), held, X)
  again = jax.jit(base.init)(jax.random.key(7), held)
  chex.assert_trees_all_equal(again, theta)
  np.testing.assert_array_equal(base.apply(again, held, X), tuned.apply(theta, held, X))
  assert jpeft.summary(base).trainable == 0
  assert jax.tree.leaves(base.split(again)[0]) == []


@pytest.mark.parametrize('name', MODELS)
def test_another_method_learns_on_it(name):
  model = MODELS[name]()
  held, _, theta = trained(model, low_rank('.*fc'))
  method = jpeft.chain(jpeft.frozen(low_rank('.*fc'), theta), adapter(BLOCKS))
  tuned = jpeft.attach(model, method, held, X)
  both = tuned.init(jax.random.key(0), held)
  learned, state = tuned.split(both)
  grads = jax.grad(lambda p: jnp.sum(tuned.apply(tuned.join(p, state), held, X) ** 2))(learned)
  leaves = jax.tree.leaves(grads)
  assert leaves and set(tuned.shapes) == {'low', 'adapter'}
  assert max(np.abs(g).max() for g in leaves) > 0
  assert jpeft.summary(tuned).trainable == jpeft.count(both['adapter'])
  assert jpeft.check(tuned, held, X, start=None)


def test_a_frozen_method_merges():
  held, tuned, theta = trained(Blocks(2), jpeft.chain(shift('.*/fc'), low_rank('.*/fc')))
  base = jpeft.attach(Blocks(2), jpeft.frozen(tuned.method, theta), held, X)
  merged = base.merge(base.init(jax.random.key(0), held), held)
  np.testing.assert_allclose(
    Blocks(2).apply(merged, X), tuned.apply(theta, held, X), rtol=1e-4, atol=1e-5
  )


def test_a_theta_that_is_not_of_the_method():
  held, _, theta = trained(Blocks(2), low_rank('block_0/fc'))
  with pytest.raises(ValueError, match="no entry 'low' for 'block_1/fc'; its sites are block_0/fc"):
    jpeft.attach(Blocks(2), jpeft.frozen(low_rank('.*/fc'), theta), held, X)
  wide = jax.tree.map(lambda x: jnp.concatenate([x, x], -1), theta)
  with pytest.raises(ValueError, match="other arrays for 'low' at 'block_0/fc' than the method"):
    jpeft.attach(Blocks(2), jpeft.frozen(low_rank('block_0/fc'), wide), held, X)
