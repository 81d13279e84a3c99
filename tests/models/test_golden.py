"""Our models give the numbers that transformers gave on the same files (make_golden.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import models
from tests.models.goldens import GOLDEN, NAMES, close, golden, outputs


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_transformers(name):
  inputs, arrays = golden(name)
  close(outputs(models.load(GOLDEN / name), inputs), arrays['logits'])


LAYOUTS = [
  *((name, {'scan': True, 'remat': True}) for name in NAMES),
  ('t5', {'scan': True}),
  ('t5', {'remat': True}),
]


@pytest.mark.parametrize('name,options', LAYOUTS, ids=[f'{n}-{"-".join(o)}' for n, o in LAYOUTS])
def test_scan_and_remat_change_nothing(name, options):
  inputs, arrays = golden(name)
  loaded = models.load(GOLDEN / name, **options)
  close(outputs(loaded, inputs), arrays['logits'])
  stack = loaded.variables['params'].get('encoder') or loaded.variables['params']['decoder']
  assert ('blocks' in stack) == options.get('scan', False)


@pytest.mark.parametrize(
  'name', ('vit', 'dinov2', 'beit', 'beit_shared', 'dinov3', 'clip', 'siglip')
)
@pytest.mark.parametrize('scan', (False, True))
def test_resized_position_tables_equal_transformers(name, scan):
  _, arrays = golden(name)
  pool = 'tokens' if name == 'dinov3' else None
  loaded = models.load(GOLDEN / name, image_size=42, scan=scan, pool=pool)
  tower = loaded.config.get('vision_config', loaded.config)
  assert loaded.preprocess['image_size'] == tower['image_size'] == 42
  close(outputs(loaded, {'images': arrays['large_images']}), arrays['large_logits'])


def test_a_swin_of_larger_images_equals_transformers():
  _, arrays = golden('swin')
  loaded = models.load(GOLDEN / 'swin', image_size=28)  # windows that shift, and others filled up
  close(outputs(loaded, {'images': arrays['large_images']}), arrays['large_logits'])


def test_gradients_of_scan_and_remat_equal_those_of_the_plain_stack():
  inputs, _ = golden('dinov2')

  def gradient(**options):
    loaded = models.load(GOLDEN / 'dinov2', **options)
    loss = lambda v: 100 * (loaded.model.apply(v, **inputs) ** 2).mean()
    params = jax.jit(jax.grad(loss))(loaded.variables)['params']
    first = params['encoder'].get('blocks') or params['encoder']['block_0']
    kernel = first['attention']['query']['kernel']
    return np.asarray(kernel[0] if options.get('scan') else kernel)

  plain = gradient()
  for remat in (True, 'dots'):
    close(gradient(scan=True, remat=remat), plain, 1e-5)


def test_remat_dots_keeps_products_with_weights():
  def kept(**options):
    """(arrays as large as the scores, as the stream, as the hidden layer) kept of the scanned
    blocks.
    """
    model = models.ViT(
      width=32,
      depth=5,
      heads=4,
      mlp_dim=128,
      patch_size=4,
      image_size=32,
      num_classes=3,
      scan=True,
      **options,
    )
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    held = jax.eval_shape(model.init, jax.random.key(0), images)
    back = jax.eval_shape(lambda v, x: jax.vjp(lambda v: model.apply(v, x), v)[1], held, images)
    sizes = [x.size for x in jax.tree.leaves(back)]
    return [sizes.count(5 * 2 * n) for n in (4 * 65 * 65, 65 * 32, 65 * 128)]

  assert kept(remat=True) == [0, 1, 0]  # a block's input
  assert kept(remat='dots') == [0, 5, 1]  # query, key, value and out besides; fc1
  assert all(plain > dots for plain, dots in zip(kept(), kept(remat='dots'), strict=True))


def test_another_remat_is_an_error():
  told = "remat='all' is none of False, True, 'dots', 'packed', 'packed4'"
  with pytest.raises(ValueError, match=told):
    models.load(GOLDEN / 'vit', remat='all')


@pytest.mark.parametrize('name', ('dinov2', 't5'))
def test_bfloat16_compute_stays_near_float32(name):
  inputs, arrays = golden(name)
  loaded = models.load(GOLDEN / name, dtype='bfloat16', param_dtype='bfloat16')
  assert {str(x.dtype) for x in jax.tree.leaves(loaded.variables)} == {'bfloat16'}
  got = outputs(loaded, inputs)
  assert got.dtype == 'bfloat16'
  close(got.astype('float32'), arrays['logits'], 0.1)


@pytest.mark.parametrize('name,scan', (('bert', False), ('t5', True)))
def test_dropout_follows_its_key(name, scan):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, scan=scan)
  run = jax.jit(
    lambda key: loaded.model.apply(
      loaded.variables, **inputs, deterministic=False, rngs={'dropout': key}
    )
  )
  first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  assert np.abs(first - outputs(loaded, inputs)).max() > 1e-3


def test_mask_hides_tokens():
  inputs, _ = golden('bert')
  loaded = models.load(GOLDEN / 'bert', pool='mean', num_classes=3)
  inputs['tokens'] = np.where(inputs['mask'], inputs['tokens'], 7)
  changed = inputs | {'tokens': np.where(inputs['mask'], inputs['tokens'], 9)}
  np.testing.assert_array_equal(outputs(loaded, inputs), outputs(loaded, changed))
  assert (
    np.abs(
      outputs(loaded, inputs | {'mask': np.ones_like(inputs['mask'])}) - outputs(loaded, inputs)
    ).max()
    > 1e-4
  )


def test_masked_patches_are_replaced():
  inputs, arrays = golden('dinov2')
  loaded = models.load(GOLDEN / 'dinov2')
  close(outputs(loaded, {**inputs, 'masked': np.zeros((2, 16), bool)}), arrays['logits'])
  hidden = outputs(loaded, {**inputs, 'masked': np.ones((2, 16), bool)})
  np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-5)
