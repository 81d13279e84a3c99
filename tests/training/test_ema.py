"""A teacher that is a moving average: what it has, how it moves, and what it shares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import tasks
from jpeft.models import ViT
from jpeft.tasks.dino import DINO, dino, losses
from jpeft.training import Ema, step
from jpeft.training import ema as ema_lib

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
BATCH = {
  'image': IMAGES,
  'views': np.random.default_rng(1).normal(size=(4, 2, 8, 8, 3)).astype(np.float32),
  'label': np.zeros(4, np.int32),
}


def half_held(name='held'):
  """A shift that is trained beside one that is not."""

  def init(key, site, arrays):
    return {'trained': jnp.zeros(16), 'kept': jnp.ones(16)}

  def apply(t, call, *args, **kwargs):
    out = call(*args, **kwargs)
    return call.site.map_stream(out, lambda x: x + t['trained'] + t['kept'])

  return jpeft.at('final_norm', jpeft.Call(name, apply, init, fixed=('kept',)))


def prepared(m=lambda number: 0.9, method=None, accumulate=1):
  """(tuned, backbone, the first state, the update)."""
  model = ViT(width=16, depth=2, heads=2, mlp_dim=32, patch_size=4, image_size=8, scan=True)
  backbone = jax.jit(model.init)(jax.random.key(0), IMAGES)
  own = method or jpeft.chain(jpeft.explora(rank=2), half_held())
  tuned = jpeft.attach(model, jpeft.chain(own, dino(8, 16, 2)), backbone, IMAGES)
  tx = optax.adam(1e-2)
  teaching = Ema(DINO.teacher, m, step.Forward(tuned, False))
  objective = DINO.objective(None, {})
  update = step.train_step(
    tuned, step.Forward(tuned, True), tx, 0, objective, accumulate, teaching=teaching
  )
  first = functools.partial(step.initial_state, tuned, tx, seed=0, taught=True)
  state = jax.jit(first)(backbone)
  return tuned, backbone, state, jax.jit(update)


def test_it_stays_at_momentum_one_and_else_moves_behind_the_student():
  tuned, backbone, state, update = prepared(lambda number: jnp.where(number < 2, 1.0, 0.75))
  first, _ = tuned.split(state['theta'])
  for _ in range(2):
    state, _ = update(state, backbone, BATCH)
  jax.tree.map(np.testing.assert_array_equal, state['teacher'], first)
  last, _ = tuned.split(state['theta'])
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), first, last)
  assert all(jax.tree.leaves(moved['explora_norm']))

  @jax.jit
  def by_hand(teacher, theta):
    """What an update learns from."""
    views = jnp.asarray(BATCH['views'])
    told_by = ema_lib.theta_of(tuned, teacher, theta)
    outputs = tuned.apply(told_by, backbone, IMAGES, views=views[:, :1])
    says = tuned.apply(theta, backbone, IMAGES, views=views)
    return losses(says['logits'], DINO.teacher.told(outputs)).mean()

  for _ in range(2):
    before = state
    state, out = update(state, backbone, BATCH)
    np.testing.assert_allclose(out['loss'], by_hand(before['teacher'], before['theta']), rtol=1e-4)
    after, _ = tuned.split(state['theta'])
    for old, new, found in zip(
      *map(jax.tree.leaves, (before['teacher'], after, state['teacher'])), strict=True
    ):
      expected = 0.75 * np.asarray(old) + 0.25 * np.asarray(new)
      np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_has_what_is_trained_and_shares_the_rest():
  tuned, backbone, state, _ = prepared()
  trained, held = tuned.split(state['theta'])
  assert jpeft.count(state['teacher']) == jpeft.count(trained)
  assert jpeft.count(state['teacher']) == jpeft.summary(tuned).trainable
  theta = ema_lib.theta_of(tuned, state['teacher'], state['theta'])
  assert theta['held']['final_norm']['kept'] is state['theta']['held']['final_norm']['kept']
  own = theta['held']['final_norm']['trained']
  assert own is state['teacher']['held']['final_norm']['trained']
  assert own is not state['theta']['held']['final_norm']['trained']


@pytest.mark.slow
def test_micro_batches_are_taught_as_one_batch():
  found = []
  for accumulate in (1, 2):
    _, backbone, state, update = prepared(method=jpeft.explora(rank=2), accumulate=accumulate)
    found.append(update(state, backbone, BATCH)[1])
  np.testing.assert_allclose(found[0]['loss'], found[1]['loss'], rtol=1e-5)
  np.testing.assert_allclose(found[0]['grad_norm'], found[1]['grad_norm'], rtol=1e-4)


def test_in_a_stage_that_trains_less_it_keeps_what_it_has():
  def init(key, site, arrays):
    return {'a': jnp.zeros(16), 'b': jnp.zeros(16)}

  def apply(t, call, *args, **kwargs):
    return call(*args, **kwargs) + t['a'] + t['b']

  rule = jpeft.Call('staged', apply, init, stages=((2, ('a',)),))
  tuned, _, state, _ = prepared(method=jpeft.at('final_norm', rule))
  later = tuned.at_stage(2, 10)
  teacher = jax.tree.map(lambda x: x + 1, state['teacher'])
  entered = ema_lib.entered(later, teacher, state['theta'])
  kept = entered['staged']['final_norm']
  assert kept['a'] is None
  np.testing.assert_array_equal(kept['b'], 1)
  assert tasks.TASKS['mae'].teacher is None
