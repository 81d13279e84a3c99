"""LaMDA: its schedule, spectral start, what is held and kept, counts, and the stage without b."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.weight.lamda import frozen_rows, lamda
from jpeft.methods.weight.lora import lora
from tests.fixtures import noisy
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, attached, vit

RNG = np.random.default_rng(0)
LLAMA_7B = full_size.llama(32, 4096, 11008)
X = jnp.asarray(RNG.normal(size=(7, 12)), jnp.float32)


def dense(**hyperparameters):
  """(tuned, variables) of one Dense layer [12, 9]."""
  model = nn.Dense(9)
  variables = model.init(jax.random.key(0), X)
  return jpeft.attach(model, lamda(targets='', **hyperparameters), variables, X), variables


@pytest.mark.parametrize(
  'schedule, expected',
  [
    ('paper', {0: 0, 10: 1, 150: 16, 299: 31, 300: 32, 900: 32}),
    ('official', {0: 0, 299: 0, 300: 1, 600: 2, 900: 3}),
  ],
)
def test_rows_freeze_one_after_the_other(schedule, expected):
  """f = 300 of 1,000 updates, r = 32."""
  for update, count in expected.items():
    assert frozen_rows(32, 300, schedule, update) == count
    assert frozen_rows(32, 300, schedule, jnp.int32(update)) == count


@pytest.mark.parametrize('init', ['spectral', 'uniform'])
@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
def test_both_starts_are_the_backbone(init, fields):
  model, variables = vit(**fields)
  tuned = jpeft.attach(model, lamda(rank=8, alpha=20, init=init), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  out = tuned.apply(theta, variables, IMAGES)
  np.testing.assert_allclose(out, model.apply(variables, IMAGES), atol=1e-5)


def test_the_spectral_start_holds_the_top_of_the_kernel():
  tuned, variables = dense(rank=4, alpha=20)
  t = tuned.init(jax.random.key(0), variables)['lamda']['']['kernel']
  top = 5 * t['a'] @ t['m'] @ t['b']
  u, s, vt = np.linalg.svd(variables['params']['kernel'])
  np.testing.assert_allclose(top, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
  assert np.all(np.diff(np.diag(t['m'])) <= 0)  # the largest is frozen first


@functools.cache
def trained(steps=10, total=20, **hyperparameters):
  """[theta after 0, 1, ... updates] of decayed Adam with momentum, at rank 4 until freeze = 8."""
  model, variables = vit()
  method = lamda(rank=4, targets='{q}|{fc1}', freeze=0.4, **hyperparameters)
  tuned, theta = attached(model, variables, method, IMAGES)
  tx = optax.adamw(1e-2, weight_decay=0.1)
  state = tx.init(tuned.split(theta)[0])

  @jax.jit
  def update(theta, state, number):
    trained, held = tuned.split(theta)
    grads = jax.grad(
      lambda p: jnp.sum(jnp.sin(tuned.apply(tuned.join(p, held), variables, IMAGES)))
    )(trained)
    updates, state = tx.update(grads, state, trained)
    new = tuned.join(optax.apply_updates(trained, updates), held)
    return tuned.edit(theta, new, state, grads, number + 1, jax.random.key(0), total)

  found = [theta]
  for number in range(steps):
    theta, state = update(theta, state, number)
    found.append(theta)
  return [t['lamda']['encoder/block_1/mlp/fc1']['kernel'] for t in found]


def test_a_never_changes_and_rows_of_b_stay_once_they_are_frozen():
  found = trained()
  for before, after in zip(found[:-1], found[1:], strict=True):
    np.testing.assert_array_equal(before['a'], after['a'])
    np.testing.assert_array_equal(before['b0'], after['b0'])
    assert np.any(before['m'] != after['m'])
  for number, (before, after) in enumerate(zip(found[:-1], found[1:], strict=True)):
    is_frozen = np.arange(4) < min(4, 4 * number // 8)
    changed = np.any(before['b'] != after['b'], axis=1)
    np.testing.assert_array_equal(changed, ~is_frozen)


def test_the_adapter_keeps_no_input():
  tuned, variables = dense(rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  trained, held = tuned.split(theta)
  kept = residuals(
    lambda p, held, variables, x: tuned.apply(tuned.join(p, held), variables, x),
    trained,
    held,
    variables,
    X,
    weights=(variables, theta),
  )
  shapes = [leaf.shape for leaf in kept]
  assert (7, 4) in shapes and X.shape not in shapes


def test_with_a_unit_square_it_is_lora():
  """In values and gradients, a trained as well."""
  model = nn.Dense(9)
  variables = model.init(jax.random.key(0), X)
  a = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32)
  b = jnp.asarray(RNG.normal(size=(4, 9)), jnp.float32)
  square = jnp.eye(4)
  ((_, rule),) = lamda(4, 8, targets='', init='uniform')
  all_trained = jpeft.at('', dataclasses.replace(rule, fixed=(), stages=()))
  ours = jpeft.attach(model, all_trained, variables, X)
  theirs = jpeft.attach(model, lora(4, 8, targets=''), variables, X)

  def run(tuned, name, more):
    def loss(a, b):
      return jnp.sum(
        jnp.sin(tuned.apply({name: {'': {'kernel': {'a': a, 'b': b, **more}}}}, variables, X))
      )

    return jax.value_and_grad(loss, (0, 1))(a, b)

  found = run(ours, 'lamda', {'m': square})
  expected = run(theirs, 'lora', {})
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), found, expected)


def test_counts_on_llama_7b():
  """r = 32, seven maps a layer: before and after b is frozen."""
  tuned = jpeft.attach(LLAMA_7B.model, lamda(32), *LLAMA_7B.shapes)
  assert jpeft.summary(tuned).trainable == 43_745_280
  assert tuned.stages(1000) == (0, 300)
  assert jpeft.summary(tuned.at_stage(300, 1000)).trainable == 229_376
  plain = jpeft.attach(LLAMA_7B.model, lora(32, targets='{linear}'), *LLAMA_7B.shapes)
  assert jpeft.summary(plain).trainable == 79_953_920


@pytest.mark.parametrize('init', ['spectral', 'uniform'])
def test_merged_weights_are_the_same_function(init):
  model, variables = vit()
  tuned, theta = attached(model, variables, lamda(rank=8, init=init), IMAGES)
  out = tuned.apply(theta, variables, IMAGES)
  assert np.abs(out - model.apply(variables, IMAGES)).max() > 1e-3
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), IMAGES), out, atol=1e-5)


def test_after_its_stage_the_optimizer_has_the_squares_alone():
  tuned, variables = dense(rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  later = tuned.at_stage(300, 1000)
  state = jax.eval_shape(optax.adam(1e-3).init, later.split(theta)[0])
  assert [x.shape for x in jax.tree.leaves(state[0].mu)] == [(4, 4)]
  assert jpeft.attach(nn.Dense(9), lamda(4, targets='', schedule='official'), variables, X).stages(
    1000
  ) == (0,)


def test_a_share_of_an_unknown_number_of_updates_is_refused():
  tuned, variables = dense(rank=4)
  theta = noisy(tuned.init(jax.random.key(0), variables))
  trained, _ = tuned.split(theta)
  state = optax.adam(1e-3).init(trained)
  with pytest.raises(ValueError, match='lamda: freeze=0.3 depends on how many updates'):
    tuned.edit(theta, theta, state, trained, 1, jax.random.key(0))
  counted, _ = dense(rank=4, freeze=10)
  counted.edit(theta, theta, state, trained, 1, jax.random.key(0))


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'rank must be a whole number, at least 1'),
    ({'alpha': 0}, 'lamda: alpha=0 must be greater than 0'),
    ({'freeze': 1.5}, 'lamda: freeze=1.5 must be a share below 1 or a number'),
    ({'schedule': 'code'}, "lamda: schedule='code' is none of"),
    ({'init': 'svd'}, "lamda: init='svd' is none of"),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    lamda(**hyperparameters)


def test_a_rank_beyond_the_kernel_is_refused():
  with pytest.raises(ValueError, match='lamda: rank=10 cannot be cut out of a kernel'):
    dense(rank=10)
