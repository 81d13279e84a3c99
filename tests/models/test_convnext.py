"""ConvNeXt: sizes of published models, layers by definition, and what is refused."""

import jax
import numpy as np
import pytest

from jpeft import models
from jpeft.models.convnext.model import ResponseNorm
from tests.models.goldens import GOLDEN, close, golden, outputs

TINY = {'depths': [3, 3, 9, 3], 'hidden_sizes': [96, 192, 384, 768]}


@pytest.mark.parametrize('kind,count', (('convnext', 28_589_128), ('convnextv2', 28_635_496)))
def test_the_published_tiny_models_have_their_sizes(kind, count):
  model = models.from_config({'model_type': kind, **TINY}, num_classes=1000)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_channels_are_scaled_by_their_share_of_the_response():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype('f')
  scale, bias = np.arange(1.0, 6).astype('f'), np.arange(5).astype('f')
  got = ResponseNorm().apply({'params': {'scale': scale, 'bias': bias}}, x)
  for image in range(2):
    norms = [np.linalg.norm(x[image, :, :, channel]) for channel in range(5)]
    for channel in range(5):
      own = x[image, :, :, channel]
      want = own + scale[channel] * own * norms[channel] / np.mean(norms) + bias[channel]
      np.testing.assert_allclose(got[image, :, :, channel], want, rtol=1e-5)


def test_other_image_sizes_need_no_change():
  images = golden('convnext')[0]['images']
  large = np.concatenate([images, images], 1)  # 40 x 20 pixels
  loaded = models.load(GOLDEN / 'convnext', pool='tokens', head=None)
  assert outputs(loaded, {'images': large}).shape == (2, 5 * 2, 10)
  assert models.load(GOLDEN / 'convnext', image_size=64).config['image_size'] == 64


def test_dropout_falls_on_what_a_block_adds():
  inputs, arrays = golden('convnext')
  loaded = models.load(GOLDEN / 'convnext', dropout=0.5)
  close(outputs(loaded, inputs), arrays['logits'])
  run = jax.jit(
    lambda key: loaded.model.apply(
      loaded.variables, **inputs, deterministic=False, rngs={'dropout': key}
    )
  )
  assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 1e-3


@pytest.mark.parametrize(
  'options,message',
  (
    ({'layers': 1}, 'layers=1: blocks of this model lie in stages of several widths'),
    ({'pool': 'cls'}, "pool 'cls' is none of mean, tokens"),
    ({'head': 'tokens', 'num_classes': 2}, "a convnext model has no head 'tokens'"),
  ),
)
def test_what_is_not_supported_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    models.load(GOLDEN / 'convnext', **options)
