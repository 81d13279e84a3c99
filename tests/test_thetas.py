"""Arithmetic on trained thetas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import Blocks, X, backbone, low_rank, noisy


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
