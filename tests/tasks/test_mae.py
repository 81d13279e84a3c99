"""MAE: hidden patches reach no block, the loss by another way, and runs that end without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import export, tasks, training
from jpeft.models import Encoder, PatchDecoder, PreNormBlock, ViT, block_of
from jpeft.tasks.mae import mae, normalised, patches_of
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, leaf_paths, noisy

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
HIDDEN = np.stack([np.arange(16) % 4 != 1, np.arange(16) % 4 != 2])  # 12 of 16
SIZES = {'width': 32, 'depth': 2, 'heads': 2, 'mlp_dim': 48, 'patch_size': 4, 'image_size': 16}


@functools.cache
def tuned_of(**fields):
  """(tuned, variables, theta off its start)."""
  model = ViT(**SIZES, **fields)
  variables = noisy(jax.jit(model.init)(jax.random.key(1), IMAGES), 0.05)
  method = jpeft.chain(jpeft.explora(rank=2), mae(width=32, depth=1))
  tuned = jpeft.attach(model, method, variables, IMAGES)
  return tuned, variables, noisy(jax.jit(tuned.init)(jax.random.key(2), variables), 0.05)


def test_the_loss_by_another_way():
  tuned, variables, theta = tuned_of()
  found = jax.jit(functools.partial(tuned.apply, hidden=HIDDEN))(theta, variables, IMAGES)
  shown = np.stack([np.flatnonzero(~row) for row in np.asarray(HIDDEN)])
  kept = np.concatenate([np.zeros((2, 1), int), shown + 1], 1)

  @jax.jit
  def by_hand(theta, variables):
    params = tuned.merge(theta, variables)['params']
    _, seen = tuned.model.apply(
      {'params': params},
      IMAGES,
      capture_intermediates=lambda module, _: module.name == 'embed',
      mutable='intermediates',
    )
    (x,) = seen['intermediates']['embed']['__call__']
    # The blocks by themselves, on the tokens of some patches.
    x = jnp.take_along_axis(x, kept[..., None], 1)
    encoder = Encoder(block_of(tuned.model, PreNormBlock), 2)
    x = encoder.apply({'params': params['encoder']}, x)
    mean, deviation = x.mean(-1, keepdims=True), jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = (x - mean) / deviation * params['final_norm']['scale'] + params['final_norm']['bias']
    decoder = PatchDecoder(32, 1, 1, (4, 4), 48)
    return decoder.apply({'params': theta['mae']['']['decoder']}, x, shown)

  pixels = np.asarray(by_hand(theta, variables))
  np.testing.assert_allclose(found['pixels'], pixels, atol=1e-4)
  for i, image in enumerate(np.asarray(IMAGES)):
    losses = []
    for patch in np.flatnonzero(np.asarray(HIDDEN)[i]):
      row, column = divmod(patch, 4)
      part = image[4 * row :, 4 * column :][:4, :4].reshape(-1)
      target = (part - part.mean()) / np.sqrt(part.var(ddof=1) + 1e-6)
      losses.append(np.square(pixels[i, patch] - target).mean())
    np.testing.assert_allclose(found['losses'][i], np.mean(losses), rtol=1e-4)


def check_hidden(tuned, theta, held, images, hidden, kwargs):
  """That the pixels of hidden patches change what is to be told, and not what is told."""
  size = images.shape[1] // 4
  images, hidden = np.asarray(images), np.asarray(hidden)
  pixels = hidden.reshape(-1, 4, 4).repeat(size, 1).repeat(size, 2)
  others = np.where(pixels[..., None], np.cos(7 * images), images)
  run = jax.jit(lambda x: tuned.apply(theta, held, x, hidden=hidden, **kwargs))
  one, other = run(images), run(others)
  np.testing.assert_array_equal(one['pixels'], other['pixels'])
  assert np.all(one['losses'] != other['losses'])
  seen = run(np.where(pixels[..., None], images, np.cos(7 * images)))
  assert np.all(np.any(seen['pixels'] != one['pixels'], (1, 2)))


@pytest.mark.slow
def test_hidden_patches_reach_no_block():
  tuned, held, theta = tuned_of(scan=True, remat=True)
  check_hidden(tuned, theta, held, IMAGES, HIDDEN, {})


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('linen_vit', marks=pytest.mark.slow),
    pytest.param('linen_vit_scan', marks=pytest.mark.slow),
    pytest.param('nnx_vit', marks=pytest.mark.slow),
    'nnx_vit_scan',
  ],
)
def test_hidden_patches_reach_no_block_of_others_models(name):
  b = BACKBONES[name]
  with described(b):
    method = jpeft.chain(jpeft.explora(rank=2), mae(width=32, depth=1))
    tuned = jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)
    theta = noisy(jax.jit(tuned.init)(jax.random.key(0), b.backbone), 0.05)
    check_hidden(tuned, theta, b.backbone, b.args[0], HIDDEN, b.kwargs)


def test_the_blocks_run_on_a_quarter_of_the_patches():
  seen = []

  def apply(t, call, x, *args, **kwargs):
    seen.append(x.shape)
    return call(x, *args, **kwargs)

  tuned, held, theta = tuned_of(scan=True)
  spied = jpeft.chain(tuned.method, jpeft.at('{block}', jpeft.Call('spy', apply)))
  spied = jpeft.attach(tuned.model, spied, held, IMAGES)
  seen.clear()
  jax.eval_shape(spied.apply, theta, held, IMAGES)
  assert set(seen) == {(2, 5, 32)}


@pytest.mark.slow
def test_patches_are_drawn_anew_in_training_and_alike_in_evaluations():
  tuned, held, theta = tuned_of(scan=True)

  @jax.jit
  def losses(key):
    rngs = {'dropout': key}
    return tuned.apply(theta, held, IMAGES, deterministic=False, rngs=rngs)['losses']

  one, other = losses(jax.random.key(0)), losses(jax.random.key(1))
  assert np.all(one != other) and np.array_equal(one, losses(jax.random.key(0)))
  fixed = jax.jit(tuned.apply)
  np.testing.assert_array_equal(
    fixed(theta, held, IMAGES)['losses'], fixed(theta, held, IMAGES)['losses']
  )


@pytest.mark.slow
def test_what_it_adds_is_not_in_merged_weights():
  tuned, held, theta = tuned_of(scan=True)
  merged = jax.jit(tuned.merge)(theta, held)
  without = tuned.only('explora', 'explora_lora', 'explora_norm')
  plain = jax.jit(tuned.model.apply)(merged, IMAGES)
  own = {name: theta[name] for name in without.method.names}
  np.testing.assert_allclose(jax.jit(without.apply)(own, held, IMAGES), plain, atol=1e-5)
  assert leaf_paths(merged).keys() == leaf_paths(held).keys()


def test_patches():
  patches = jax.jit(lambda x: patches_of(x, (2, 4), (8, 4)))(IMAGES)
  patches = np.asarray(patches)
  np.testing.assert_array_equal(patches[1, 6], IMAGES[1, 8:, 8:12].reshape(-1))
  found = np.asarray(jax.jit(normalised)(patches))
  np.testing.assert_allclose(found.mean(-1), 0, atol=1e-5)
  np.testing.assert_allclose(found.std(-1, ddof=1), 1, atol=1e-4)


@pytest.mark.parametrize(
  'fields', [{'rope_theta': 100.0}, {'position_bias': 'own'}, {'position_bias': 'shared'}]
)
def test_blocks_that_know_patches_by_number_are_refused(fields):
  model = ViT(**SIZES, **fields)
  held = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  tuned = jpeft.attach(model, mae(width=32, depth=1), held, IMAGES)
  with pytest.raises(ValueError, match='mae: the blocks of this model run on all patches'):
    jax.eval_shape(tuned.apply, tuned.shapes, held, IMAGES)


def test_a_model_without_patches_is_refused():
  b = BACKBONES['linen_cnn']
  with described(b), pytest.raises(ValueError, match='no site matches|no role|makes a grid'):
    jpeft.attach(b.model, mae(), b.backbone, *b.args, **b.kwargs)


MAE = {
  'task': 'mae',
  'method.layers': -1,
  'method.rank': 2,
  'pretraining.width': 32,
  'pretraining.depth': 1,
}


def test_a_run_leaves_a_backbone_for_the_second_stage(load, tmp_path):
  first = training.train(load('explora', **MAE, steps=12), tmp_path / 'first')
  assert first['mergeable'] and set(first['eval']) == {'loss'}
  assert '| loss ' in (tmp_path / 'first/report.md').read_text()
  pretrained, tuned, theta = training.reopen(tmp_path / 'first')
  assert set(theta) == {'explora', 'explora_lora', 'explora_norm'}
  config, info = training.describe(tmp_path / 'first')
  merged = tmp_path / 'merged'
  example = tasks.of(config).example(config, pretrained)
  arguments = pretrained, tuned, theta, example, info['labels'], config
  assert export.save_merged(merged, *arguments) < 1e-5

  second = load('lora', **{'model.source': str(merged), 'method.rank': 2, 'steps': 2})
  training.train(second, tmp_path / 'second')
  start, _, theta = training.reopen(tmp_path / 'second')
  assert set(theta) == {'lora', 'head'}
  expected = leaf_paths(tuned.merge(training.reopen(tmp_path / 'first')[2], pretrained.variables))
  found = leaf_paths(start.variables)
  assert expected.keys() == {path for path in found if 'head' not in path}
  for path, x in expected.items():
    np.testing.assert_array_equal(found[path], x, err_msg=path)


@pytest.mark.slow
def test_it_learns():
  """That a decoder and ExPLoRA tell pixels better than the mean of a patch, whose loss is 1."""
  tuned, held, theta = tuned_of(scan=True)
  images = np.sin(np.arange(16) / 3)[None, :, None, None] * np.ones((4, 16, 16, 3), np.float32)
  images = (images + np.linspace(0, 1, 4)[:, None, None, None]).astype(np.float32)
  tx = optax.adam(3e-3)

  @jax.jit
  def update(theta, state, key):
    def loss(theta):
      rngs = {'dropout': key}
      return tuned.apply(theta, held, images, deterministic=False, rngs=rngs)['losses'].mean()

    value, grads = jax.value_and_grad(loss)(theta)
    updates, state = tx.update(grads, state, theta)
    return optax.apply_updates(theta, updates), state, value

  state = tx.init(theta)
  for step in range(60):
    theta, state, value = update(theta, state, jax.random.key(step))
  assert value < 0.6


def test_the_task_is_refused_where_it_makes_no_sense(load):
  cached = load('explora', **MAE, **{'data.cache_features': True})
  with pytest.raises(ValueError, match='cache_features: config.task=.mae. shows'):
    tasks.TASKS['mae'].check(cached, None)
  with pytest.raises(ValueError, match='pretraining.width=32 says nothing .* it is for mae'):
    load('lora', **{'pretraining.width': 32})
