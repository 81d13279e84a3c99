"""Swin: windows by definition, sizes of published models, and what is refused."""

import json

import jax
import numpy as np
import pytest

from jpeft import models
from jpeft.models.nn import Windows
from tests.models.goldens import GOLDEN

TINY = {
  'model_type': 'swin',
  'image_size': 224,
  'depths': [2, 2, 6, 2],
  'num_heads': [3, 6, 12, 24],
}


def test_tokens_share_a_window_with_their_neighbours_alone():
  windows = Windows((4, 6), side=3, shift=1)  # two rows of two windows, filled up by two rows
  places = np.arange(24).reshape(1, 24, 1)
  split = np.asarray(windows.split(places))[..., 0]
  mask = np.asarray(windows.mask(1))[:, 0]
  assert split.shape == (4, 9) and windows.padded == (6, 6)
  padded = np.pad(np.arange(24).reshape(4, 6), ((0, 2), (0, 0)))
  rows = np.roll(np.arange(6), -1)
  for window in range(4):
    top, left = 3 * (window // 2), 3 * (window % 2)
    of_row, of_column = rows[top : top + 3], rows[left : left + 3]
    np.testing.assert_array_equal(split[window], padded[of_row][:, of_column].ravel())
    # Of a window that hangs over the end, what is left there and what came from the start.
    at = np.stack(np.meshgrid(of_row, of_column, indexing='ij'), -1).reshape(9, 2)
    wide = np.abs(at[:, None] - at[None]).max(-1) > 3
    assert not mask[window][wide].any() and mask[window][~wide].all()
  np.testing.assert_array_equal(windows.join(windows.split(places)), places)


def test_a_shift_keeps_windows_of_a_batch_in_order():
  windows = Windows((4, 4), side=2, shift=1)
  x = np.random.default_rng(0).normal(size=(3, 16, 5)).astype('f')
  split = np.asarray(windows.split(x))
  for i in range(3):
    np.testing.assert_array_equal(split[4 * i : 4 * i + 4], windows.split(x[i : i + 1]))
  assert windows.mask(3).shape == (12, 1, 4, 4) and Windows((4, 4), 2).mask(3) is None


def test_the_published_tiny_model_has_its_size():
  model = models.from_config(TINY, num_classes=1000)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 28_288_354


@pytest.mark.parametrize(
  'change,options,message',
  (
    ({}, {'scan': True}, 'every second block of a Swin has shifted windows: use scan=False'),
    ({}, {'layers': 1}, 'layers=1: blocks of this model lie in stages of several widths'),
    ({}, {'pool': 'cls'}, "pool 'cls' is none of mean, tokens"),
    ({}, {'image_size': 8}, 'windows of 3 x 3 tokens do not fit into 2 x 2: load the model with'),
    ({'num_heads': [2, 5]}, {}, 'a width of 16 in stage 1 cannot be shared by 5 heads'),
    ({'num_heads': [2]}, {}, 'depths, num_heads must have one number a stage'),
    ({'depths': 2}, {}, 'depths'),
  ),
)
def test_what_is_not_supported_is_named(change, options, message, tmp_path):
  config = json.loads((GOLDEN / 'swin' / 'config.json').read_text()) | change
  (tmp_path / 'config.json').write_text(json.dumps(config))
  tensors = models.read_tensors(GOLDEN / 'swin' / 'model.safetensors')
  models.write_tensors(tmp_path / 'model.safetensors', tensors)
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path, **options)
