"""`jpeft.check`: what holds passes, and each fault is found and told in one sentence."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from tests.core.small import WIDTH, Blocks, NnxBlocks, X, adapter, backbone, low_rank, shift


def checked(method, model=None, **options):
  model = Blocks() if model is None else model
  held = backbone(model)
  return jpeft.check(jpeft.attach(model, method, held, X), held, X, **options)


def found(checks, name):
  (row,) = [row for row in checks if row.name == name]
  return row


@pytest.mark.parametrize(
  'model', (Blocks(), Blocks(stack='scan remat'), NnxBlocks(), NnxBlocks(stack='scan'))
)
def test_a_sound_method_passes(model):
  checks = checked(jpeft.lora(2, targets='.*/fc|.*fc'), model)
  assert checks, str(checks)
  assert {row.passed for row in checks} == {True}


def test_what_does_not_apply_is_no_failure():
  checks = checked(adapter('.*/fc'))
  assert checks
  assert found(checks, 'merge').passed is None and 'no weights do' in found(checks, 'merge').detail
  assert found(checks, 'dot').passed is None


def test_a_method_that_starts_elsewhere_says_so():
  method = jpeft.ssf(targets='.*/fc')
  assert not checked(method)
  assert 'before training the output is' in found(checked(method), 'start').detail
  row = found(checked(method, start=None), 'start')
  assert row.passed is None and 'declared elsewhere: the output is' in row.detail
  assert checked(method, start=None)


class ZeroHead(nn.Module):
  """A model whose output is zero before training."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(nn.Dense(WIDTH, name='fc')(x))
    return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


def test_a_head_that_starts_at_zero_is_no_failure():
  model = ZeroHead()
  variables = model.init(jax.random.key(0), X)
  method = jpeft.chain(jpeft.lora(2, targets='fc'), jpeft.tune('head'))
  checks = jpeft.check(jpeft.attach(model, method, variables, X), variables, X)
  assert checks, str(checks)
  assert 'is 0.0e+00 away' in found(checks, 'start').detail


def wrong(name, init=None, weight=None, dot=None, **options):
  """A low-rank rule with one thing wrong."""

  def start(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], 2)), 'b': jnp.zeros((2, w.shape[1]))}

  rule = jpeft.matrix(
    name,
    init or start,
    weight or (lambda t, w: w + t['a'] @ t['b']),
    dot or (lambda t, x, y, w, key: y + (x @ t['a']) @ t['b']),
    **options,
  )
  return jpeft.at('.*/fc', rule)


def half(key, w):
  return {
    'a': jax.random.normal(key, (w.shape[0], 2), jnp.bfloat16),
    'b': jnp.zeros((2, w.shape[1]), jnp.bfloat16),
  }


def spare(key, w):
  return {'a': jnp.ones((w.shape[0], 2)), 'b': jnp.zeros((2, w.shape[1])), 'c': jnp.ones(3)}


FAULTS = {
  'dot': (wrong('w', weight=lambda t, w: w + 2 * t['a'] @ t['b']), 'through dot the output is'),
  'theta': (wrong('w', init=half), "theta .*/kernel/a' is bfloat16"),
  'gradient': (wrong('w', init=spare), 'no gradient reaches .*/kernel/c'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_found(name):
  method, message = FAULTS[name]
  checks = checked(method)
  assert not checks
  row = found(checks, name)
  assert row.passed is False
  assert re.search(message, row.detail)
  assert f'{name} ' in str(checks) and 'NO' in str(checks)


def test_a_wrong_merge_is_found():
  ((pattern, rule),) = shift('.*/fc')
  broken = jpeft.Call(rule.name, rule.apply, rule.init, lambda t, site, a: dict(a))
  checks = checked(jpeft.at(pattern, broken))
  assert 'the output with merged weights is' in found(checks, 'merge').detail


def test_an_output_of_another_shape_is_found():
  narrow = jpeft.Call('narrow', lambda t, call, x: call(x)[..., : WIDTH - 1])
  checks = checked(jpeft.chain(jpeft.at('', narrow), low_rank('.*/fc')))
  (row,) = checks
  assert row.name == 'output' and 'that of the untouched model' in row.detail
