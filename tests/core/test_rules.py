"""Methods as values: equality, hash and repr; what a Weight's `init` can read of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import Blocks, X, backbone, gain


def test_methods_are_equal_by_their_hyperparameters():
  assert jpeft.lora(8) == jpeft.lora(rank=8)
  assert hash(jpeft.lora(8)) == hash(jpeft.lora(8))
  assert jpeft.lora(8) != jpeft.lora(4)
  assert jpeft.lora(8) != jpeft.dora(8)
  both = jpeft.chain(jpeft.lora(8), jpeft.tune('{head}'))
  assert both == jpeft.chain(jpeft.lora(8), jpeft.tune('{head}'))
  assert both != jpeft.chain(jpeft.tune('{head}'), jpeft.lora(8))


def test_rules_of_ones_own_are_equal_where_their_functions_are():
  one = gain('.*')
  assert one == jpeft.Method(one)
  assert one != gain('.*')


def test_arrays_among_hyperparameters_are_compared_by_identity():
  scores = np.ones(3)
  assert jpeft.lst(prune=scores) == jpeft.lst(prune=scores)
  assert jpeft.lst(prune=scores) != jpeft.lst(prune=np.ones(3))


def test_a_method_prints_its_calls():
  assert repr(jpeft.linear()) == "linear(name='head')"
  shown = repr(jpeft.chain(jpeft.lora(4, targets='{q}'), gain('.*/fc')))
  assert shown.startswith("chain(lora(rank=4, alpha=8, targets='{q}'")
  assert shown.endswith("at('.*/fc', Weight('gain')))")


def test_what_a_rule_requires_is_one_of_a_few():
  with pytest.raises(ValueError, match="requires='dot' must be one of 'nothing', 'input'"):
    jpeft.Weight('mine', lambda *_: {}, lambda *_: {}, requires='dot')


@pytest.mark.parametrize('stack', ('', 'scan'))
def test_the_init_of_a_weight_reads_the_model(stack):
  model = Blocks(stack=stack)
  held = backbone(model)
  path = 'blocks/fc/bias' if stack else 'block_0/fc/bias'

  def init(key, site, arrays):
    return {'like': arrays['bias'] + 0 * jnp.sum(arrays.model[path]), 'all': arrays.model[path]}

  rule = jpeft.Weight('mine', init, lambda t, site, arrays: {'bias': t['like']})
  tuned = jpeft.attach(model, jpeft.at('.*/fc', rule), held, X)
  theta = tuned.init(jax.random.key(0), held)
  (entry, *_) = theta['mine'].values()
  found = held['params']
  for part in path.split('/'):
    found = found[part]
  every = entry['all'][0] if stack else entry['all']
  np.testing.assert_array_equal(every, found)
