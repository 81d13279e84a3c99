"""One update: what it differentiates, what it calls, what it counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import tasks
from jpeft.programs import compile
from jpeft.tasks import losses
from jpeft.training import Layout, fit, sharding, step


class Net(nn.Module):
  @nn.compact
  def __call__(self, images, deterministic=True):
    x = nn.Dense(8, name='body')(images.reshape(len(images), -1))
    x = nn.Dropout(0.5, deterministic=deterministic)(x)
    return nn.Dense(3, name='head')(nn.relu(x))


BATCH = {
  'image': np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32),
  'label': np.array([0, 1, 2, 1], np.int32),
}


def prepared(method, tx=None):
  model = Net()
  backbone = jax.jit(model.init)(jax.random.key(0), BATCH['image'])
  tuned = jpeft.attach(model, method, backbone, BATCH['image'])
  tx = tx or optax.sgd(0.1)
  return tuned, tx, backbone, step.initial_state(tuned, tx, backbone, 0)


def test_update_against_plain_jax():
  tuned, tx, backbone, state = prepared(jpeft.tune('.*'))
  new, out = jax.jit(step.train_step(tuned, step.Forward(tuned, True), tx, 0))(
    state, backbone, BATCH
  )
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step.STREAM_STEP), 0)

  def loss(params):
    logits = Net().apply(
      {'params': params}, BATCH['image'], deterministic=False, rngs={'dropout': key}
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH['label']).mean()

  value, grads = jax.value_and_grad(loss)(backbone['params'])
  np.testing.assert_allclose(out['loss'], value, rtol=1e-6)
  np.testing.assert_allclose(out['grad_norm'], optax.tree.norm(grads), rtol=1e-5)
  for site in ('body', 'head'):
    for array, grad in grads[site].items():
      expected = backbone['params'][site][array] - 0.1 * grad
      np.testing.assert_allclose(new['theta']['tune'][site][array], expected, atol=1e-6)


def test_donating_the_state_leaves_the_backbone_alone():
  # A theta of `tune` starts as the backbone's own arrays.
  tuned, tx, backbone, state = prepared(jpeft.tune('.*'))
  before = jax.tree.map(np.array, backbone)
  fn = step.train_step(tuned, step.Forward(tuned, True), tx, 0)
  update, cost = fit.compiled(fn, state, backbone, BATCH, donate=(0,))
  for _ in range(2):
    state, _ = update(state, backbone, BATCH)
  jax.tree.map(np.testing.assert_array_equal, backbone, before)
  assert cost['flops'] > 0 and cost['argument_bytes'] > 0


def test_schedules_of_a_method_are_called_with_the_number_of_updates():
  seen = jpeft.Weight(
    'count',
    lambda key, site, arrays: {'n': jnp.zeros(()), 'w': jnp.zeros(3)},
    lambda t, site, arrays: {'bias': arrays['bias'] + t['w']},
    fixed=('n',),
    update=lambda t, site, number, key: {**t, 'n': t['n'] + 10 * number},
  )
  tuned, tx, backbone, state = prepared(jpeft.at('head', seen))
  update = jax.jit(step.train_step(tuned, step.Forward(tuned, True), tx, 0))
  for _ in range(3):
    state, _ = update(state, backbone, BATCH)
  assert float(state['theta']['count']['head']['n']) == 10 + 20 + 30
  assert np.abs(state['theta']['count']['head']['w']).min() > 0


def test_dropout_changes_with_the_step_and_not_between_runs():
  tuned, _, backbone, state = prepared(jpeft.tune('head'))
  update = jax.jit(step.train_step(tuned, step.Forward(tuned, True), optax.sgd(0.0), 0))
  one, first = update(state, backbone, BATCH)
  _, second = update(one, backbone, BATCH)
  _, again = update(state, backbone, BATCH)
  assert float(first['loss']) == float(again['loss']) != float(second['loss'])


def test_sums_count_what_was_seen():
  tuned, tx, backbone, state = prepared(jpeft.tune('head'))
  update = jax.jit(step.train_step(tuned, step.Forward(tuned, True), tx, 0, accumulate=2))
  losses = []
  for _ in range(3):
    state, out = update(state, backbone, BATCH)
    losses.append(float(out['loss']))
  found = step.means(state['sums'])
  assert float(state['sums']['labels']) == 12
  np.testing.assert_allclose(found['loss'], np.mean(losses), rtol=1e-6)
  assert found['accuracy'] * 12 == round(found['accuracy'] * 12)


def test_the_optimizers_state_alone_goes_to_the_host():
  mesh = sharding.mesh(1, 1)
  tuned, _, _, state = prepared(jpeft.tune('head'), optax.adam(0.1))
  layout = Layout(tuned, mesh)
  for offload in (False, True):
    kinds = jax.tree.map(
      lambda place: place.memory_kind == 'pinned_host',
      layout.of_state(state, offload),
    )
    assert {name: set(jax.tree.leaves(part)) for name, part in kinds.items()} == {
      name: {offload and name == 'optimizer'} for name in ('theta', 'optimizer', 'step', 'sums')
    }
  held = sharding.with_sharding(state, layout.of_state(state, True))
  assert compile.nbytes(held) == compile.nbytes({**state, 'optimizer': ()})
  assert not sharding.offloads(mesh, True)  # a CPU's memory is the host's


def test_state_that_comes_from_the_host_is_updated_as_if_it_had_stayed():
  tuned, tx, backbone, state = prepared(jpeft.tune('head'), optax.adam(0.1))
  here, there = (
    jax.jit(step.train_step(tuned, step.Forward(tuned, True), tx, 0, offload=offload))(
      state, backbone, BATCH
    )[0]
    for offload in (False, True)
  )
  jax.tree.map(np.testing.assert_array_equal, here, there)


UNKNOWN = np.nan
OBJECTIVES = {
  'numbers': (
    losses.distance('huber'),
    [[0.5, 9, -2], [UNKNOWN, -1, 1], [0, 0, UNKNOWN], [3, 2, 1]],
  ),
  'sets': (
    losses.sigmoid((2.0, 1.0, 5.0), 1.5),
    [[1, 0, 0], [UNKNOWN, 1, 1], [0, 0, UNKNOWN], [0, 1, 1]],
  ),
  'weighed classes': (tasks.softmax(0.0, (0.5, 3.0, 1.0), 2.0), [0, 2, -1, 1]),
}


@pytest.mark.parametrize('has_loss', (False, True))
@pytest.mark.parametrize('accumulate', (1, 2))
@pytest.mark.parametrize('kind', OBJECTIVES)
def test_an_objective_is_the_weighed_mean_of_the_whole_batch(kind, accumulate, has_loss):
  objective, labels = OBJECTIVES[kind]
  labels = np.asarray(labels, np.int32 if np.ndim(labels) == 1 else np.float32)
  batch = BATCH | {'label': labels}
  method = jpeft.tune('head')
  if has_loss:
    rule = jpeft.Call(
      'seen', lambda t, call, x: call(x), loss=lambda loss, run: (loss(run()[0]) + 7, run()[0])
    )
    method = jpeft.chain(method, jpeft.at('head', rule))
  tuned, tx, backbone, state = prepared(method)
  assert tuned.has_loss == has_loss
  forward = step.Forward(tuned, False)
  update = jax.jit(step.train_step(tuned, forward, tx, 0, objective, accumulate))
  new, out = update(state, backbone, batch)

  def loss(theta):
    outputs = forward(theta, backbone, batch, jax.random.key(0))
    each = np.asarray(objective.weights(labels)) * objective.losses(outputs, labels)
    return each.sum() / objective.weights(labels).sum()

  value, gradient = jax.value_and_grad(loss)(state['theta'])
  np.testing.assert_allclose(out['loss'], value + 7 * has_loss, rtol=1e-5)
  expected = jax.tree.map(lambda x, g: x - 0.1 * g, state['theta'], gradient)
  for a, b in zip(jax.tree.leaves(new['theta']), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  known = labels >= 0 if labels.ndim == 1 else ~np.isnan(labels)
  assert float(new['sums']['labels']) == known.sum()
  assert ('accuracy' in step.means(new['sums'], objective)) == (kind != 'numbers')


@pytest.mark.parametrize('accumulate', (1, 2, 4))
def test_what_a_method_minimises_does_not_grow_with_micro_batches(accumulate):
  def apply(t, call, x, double=False):
    call.aux(gate=t['g'])
    call.write(passes=t['passes'] + 1)
    return (call(x) + t['g']) * (2 if double else 1)

  def init(key, site, arrays):
    return {'g': jnp.ones(3), 'passes': jnp.zeros((), jnp.int32)}

  def minimised(loss, run):
    out, aux = run()
    return loss(out) + 10 * jnp.sum(aux['gate'] ** 2), out

  rule = jpeft.Call('gated', apply, init, loss=minimised)
  tuned, tx, backbone, state = prepared(jpeft.at('head', rule))
  forward = step.Forward(tuned, False)
  update = jax.jit(step.train_step(tuned, forward, tx, 0, accumulate=accumulate))
  new, out = update(state, backbone, BATCH)
  logits = forward(state['theta'], backbone, BATCH, jax.random.key(0))
  task = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH['label']).mean()
  np.testing.assert_allclose(out['loss'], task + 30, rtol=1e-6)
  # Each micro-batch reads the state that the one before has written.
  assert new['theta']['gated']['head']['passes'] == accumulate


@pytest.mark.parametrize('accumulate', (1, 2))
@pytest.mark.parametrize('kind', OBJECTIVES)
def test_a_method_that_learns_from_a_pass_of_its_own(kind, accumulate):
  """The distance of two passes is the weighed mean of the whole batch, as the loss is."""
  objective, labels = OBJECTIVES[kind]
  labels = np.asarray(labels, np.int32 if np.ndim(labels) == 1 else np.float32)
  batch = BATCH | {'label': labels}

  def root(t, call, x, half=False, **kwargs):
    out = call(x, **kwargs)
    return 0.5 * out if half else out

  def minimised(loss, run):
    out, _ = run()
    told, _ = run(half=True)
    return loss(out) + 3 * loss.between(out, jax.lax.stop_gradient(told)), out

  rule = jpeft.at('', jpeft.Call('halved', root, takes=('half',), loss=minimised))
  tuned, tx, backbone, state = prepared(jpeft.chain(jpeft.tune('head'), rule))
  forward = step.Forward(tuned, False)
  update = jax.jit(step.train_step(tuned, forward, tx, 0, objective, accumulate))
  _, out = update(state, backbone, batch)
  outputs = forward(state['theta'], backbone, batch, jax.random.key(0))
  weights = np.asarray(objective.weights(labels))
  each = np.asarray(objective.losses(outputs, labels))
  apart = np.asarray(objective.distances(outputs, 0.5 * outputs, labels))
  expected = (weights * (each + 3 * apart)).sum() / weights.sum()
  np.testing.assert_allclose(out['loss'], expected, rtol=1e-5)
