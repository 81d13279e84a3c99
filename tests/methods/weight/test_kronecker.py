"""LoKr: worked numbers, divisors, starts, merging, counts, and what a step forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.kronecker import divided, lokr, shapes_of
from tests.methods.golden import full_size
from tests.methods.small import attached
from tests.traced import variables_of

X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 24)), jnp.float32)
MODEL = nn.Dense(20)
METHODS = {'w1_whole': lokr(2, 3), 'both': lokr(1, 3, both=True), 'w2_whole': lokr(9, 3, factor=2)}


def test_a_worked_update():
  """[[1], [2]] (x) [[1, 3]], scaled by 4 / 2: a kernel [2, 2]."""
  model = nn.Dense(2, use_bias=False)
  x = jnp.eye(2)
  variables = {'params': {'kernel': jnp.zeros((2, 2))}}
  tuned = jpeft.attach(model, lokr(2, 4, targets='', factor=2), variables, x)
  assert tuned.shapes['lokr']['']['kernel']['w1'].shape == (2, 2)
  t = {'w1': jnp.array([[1.0, 3.0], [2.0, 6.0]]), 'w2': jnp.array([[1.0]])}
  theta = {'lokr': {'': {'kernel': t}}}
  want = [[2, 6], [4, 12]]
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), want)
  np.testing.assert_array_equal(tuned.merge(theta, variables)['params']['kernel'], want)


@pytest.mark.parametrize(
  ('size', 'factor', 'expected'),
  [
    (256, -1, (16, 16)),
    (128, -1, (8, 16)),
    (127, -1, (1, 127)),
    (128, 4, (4, 32)),
    (128, 64, (64, 2)),
    (120, 7, (6, 20)),
    (11008, -1, (86, 128)),
  ],
)
def test_divisors_are_those_of_peft(size, factor, expected):
  assert divided(size, factor) == expected


def test_which_factors_are_whole():
  assert shapes_of(64, 64, 3) == {'w1': (8, 8), 'a2': (8, 3), 'b2': (3, 8)}
  assert shapes_of(64, 64, 4) == {'w1': (8, 8), 'w2': (8, 8)}
  both = {'a1': (8, 3), 'b1': (3, 8), 'a2': (8, 3), 'b2': (3, 8)}
  assert shapes_of(64, 64, 3, both=True) == both


@pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
def test_a_step_forms_no_update(method):
  variables = MODEL.init(jax.random.key(0), X)

  def step_of(method):
    tuned, theta = attached(MODEL, variables, jpeft.at('', method[0][1]), X)
    step = jax.grad(lambda theta: jnp.sum(jnp.sin(tuned.apply(theta, variables, X))))
    program = jax.make_jaxpr(step)(theta).jaxpr
    formed = [x for x in variables_of(program) if x.aval.shape == (24, 20)]
    return tuned, theta, step, len(formed)

  tuned, theta, step, formed = step_of(method)
  *_, of_lora = step_of(jpeft.lora(2))
  assert formed == of_lora

  def of_whole(theta):
    return jnp.sum(jnp.sin(MODEL.apply(tuned.merge(theta, variables), X)))

  found, want = step(theta), jax.grad(of_whole)(theta)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, want)


def test_counts_on_llama_7b():
  """4096 = 64 x 64: w1 64 x 64 and 2 x 64 x 8, queries and values of 32 layers."""
  llama = full_size.llama(32, 4096, 11008)
  tuned = jpeft.attach(llama.model, lokr(8), *llama.shapes)
  assert jpeft.summary(tuned).trainable == 64 * (4096 + 1024) == 327_680


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'rank must be a whole number, at least 1'),
    ({'alpha': 0}, 'lokr: alpha=0 must be greater than 0'),
    ({'factor': 0}, 'lokr: factor=0 must be -1, or a whole number'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    lokr(**hyperparameters)
