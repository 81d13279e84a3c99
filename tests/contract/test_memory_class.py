"""The memory class is proved: which frozen products a cotangent crosses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft import programs
from tests.contract.table import SERVED, memory_class, over
from tests.core.small import adapter, backbone, low_rank


@over(SERVED)
def test_the_program_crosses_what_the_method_declares(pair):
  assert pair.tuned.memory == memory_class(pair.method, pair.b.name)
  assert pair.tuned.unused == []


class Half(nn.Module):
  """Two parts of three layers each, of which the second reads the first."""

  @nn.compact
  def __call__(self, x):
    for part in ('encoder', 'decoder'):
      for i in range(3):
        x = nn.relu(nn.Dense(6, name=f'{part}_{i}')(x))
    return nn.Dense(3, name='head')(x)


X = jnp.ones((2, 6))


def attached(method):
  model = Half()
  return jpeft.attach(model, method, backbone(model, X), X)


def declared(method, memory):
  return jpeft.Method((at, dataclasses.replace(rule, memory=memory)) for at, rule in method)


@pytest.mark.parametrize(
  ('targets', 'found'),
  (
    ('head', 'no backbone backprop'),
    ('decoder_2', 'no backbone backprop'),  # the head alone is crossed, a thirteenth
    ('decoder_0', 'partial re-entry'),
    ('encoder_1', 'full crossing'),
  ),
)
def test_what_lies_behind_an_adapted_layer_is_crossed(targets, found):
  for method in (low_rank(targets), adapter(targets)):
    tuned = attached(declared(method, 'no backbone backprop'))
    assert tuned.memory == jpeft.summary(tuned).memory == found, tuned.crossing
  # What a rule declares is the least.
  assert attached(declared(low_rank('head'), 'full crossing')).memory == 'full crossing'


def test_entries_that_reach_no_output_are_told():
  def init(key, site, arrays):
    return {'s': jnp.ones(()), 'lost': jnp.ones(2), 'n': jnp.zeros((), int)}

  rule = jpeft.Call('scale', lambda t, call, x: call(x) * t['s'], init)
  tuned = attached(jpeft.at('decoder_1', rule))
  assert tuned.unused == ['scale/decoder_1/lost']
  assert '1 arrays of theta reach no output: scale/decoder_1/lost' in str(jpeft.summary(tuned))


def test_scans_and_branches_are_followed():
  def fn(theta, backbone, x, flag):
    def body(carry, w):
      return jnp.tanh(carry @ w), None

    x, _ = jax.lax.scan(body, x * theta['first'], backbone['stack'])
    x = jax.lax.cond(flag, lambda x: x @ backbone['one'], lambda x: x, x)
    x = jax.lax.stop_gradient(x) + theta['last']
    return x @ backbone['one']

  theta = {name: jnp.ones(()) for name in ('first', 'last', 'none')}
  frozen = {'stack': jnp.ones((4, 6, 6)), 'one': jnp.ones((6, 6))}
  # Four products of the scan, half of that in the branch, and one behind: all lie on the way of
  # one of the two, as far as the gradient of `first` comes.
  found = programs.crossing(fn, theta, frozen, X, True)
  assert found.share == pytest.approx(1.0) and found.unused == (2,)
  without = programs.crossing(
    lambda theta, *rest: fn({**theta, 'first': 1.0}, *rest),
    {'last': theta['last']},
    frozen,
    X,
    True,
  )
  assert without.share == pytest.approx(1 / 5.5) and without.unused == ()
