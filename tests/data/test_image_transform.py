"""Image transforms, against what Pillow and NumPy give by hand."""

import numpy as np
import pytest
from PIL import Image

from jpeft.data import image_transform
from jpeft.data.image import IMAGENET_MEAN, IMAGENET_STD

AUGMENTED = ('flip_crop', 'imagenet')


def photo(height=30, width=40):
  return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(size, **kwargs):
  fn = image_transform(size, mean=0, std=1, **kwargs)
  return lambda pixels, rng=None: np.rint(255 * fn({'image': pixels}, rng)['image']).astype(int)


def test_squash_normalises():
  out = image_transform(16)({'image': photo(), 'label': 3})
  resized = np.asarray(
    Image.fromarray(photo()).resize((16, 16), Image.Resampling.BICUBIC), np.float64
  )
  expect = (resized / 255 - IMAGENET_MEAN) / IMAGENET_STD
  np.testing.assert_allclose(out['image'], expect, atol=1e-5)
  assert out['image'].dtype == np.float32 and out['label'] == 3


@pytest.mark.parametrize(
  'mean, std, value', [(IMAGENET_MEAN, IMAGENET_STD, 0.0741), (0.5, 0.5, 0.0039), (0, 1, 0.5020)]
)
@pytest.mark.parametrize('channels', [1, 3])
def test_a_grey_image_in_the_published_preprocessings(mean, std, value, channels):
  grey = np.full((9, 9, channels), 128, np.uint8)
  for resize in ('squash', 'crop'):
    out = image_transform(8, mean, std, resize=resize)({'image': grey})['image']
    assert out.shape == (8, 8, 3)
    np.testing.assert_allclose(out[..., 0], value, atol=5e-5)


@pytest.mark.parametrize(
  'shape, resized, corner',
  [((30, 40), (43, 32), (7, 2)), ((40, 30), (32, 43), (2, 7)), ((20, 20), (32, 32), (2, 2))],
)
def test_crop_is_the_centre_of_an_image_a_seventh_larger(shape, resized, corner):
  pixels = photo(*shape)
  left, top = corner
  expect = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR))
  expect = expect[top : top + 28, left : left + 28]
  np.testing.assert_array_equal(plain(28, resize='crop', interpolation='bilinear')(pixels), expect)


def test_grey_is_repeated_over_channels():
  grey = photo()[..., :1]
  out = plain(16)(grey)
  np.testing.assert_array_equal(out, plain(16)(np.repeat(grey, 3, -1)))


def test_flip_crop_takes_every_place_and_both_sides():
  resized = np.asarray(
    Image.fromarray(photo(8, 8)).resize((8, 8), Image.Resampling.BICUBIC)
  ).astype(int)
  places = {
    resized[y : y + 7, x : x + 7, ::1][:, ::flip].tobytes(): (x, y, flip)
    for y in range(2)
    for x in range(2)
    for flip in (1, -1)
  }
  fn, rng = plain(7, augment='flip_crop'), np.random.default_rng(0)
  found = {places[fn(photo(8, 8), rng).tobytes()] for _ in range(200)}
  assert found == set(places.values()) and len(found) == 8


def test_imagenet_crops_have_the_area_and_aspect_asked_for():
  # Pixels that tell where they come from: red runs with x, green with y.
  y, x = np.mgrid[:200, :200]
  ramp = np.stack([x, y, 0 * x], -1).astype(np.uint8)
  fn, rng = plain(20, augment='imagenet', interpolation='bilinear'), np.random.default_rng(0)
  outs = [fn(ramp, rng) for _ in range(300)]
  width = np.array([np.abs(np.ptp(o[10, :, 0])) for o in outs]) * 20 / 19
  height = np.array([np.ptp(o[:, 10, 1]) for o in outs]) * 20 / 19
  area, aspect = width * height / 200**2, width / height
  assert 0.06 < area.min() < 0.15 and 0.85 < area.max() < 1.05
  assert 0.7 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.45
  flipped = np.mean([o[10, 0, 0] > o[10, -1, 0] for o in outs])
  assert 0.4 < flipped < 0.6
  assert all(o[0, 10, 1] < o[-1, 10, 1] for o in outs)  # never upside down


def test_imagenet_falls_back_to_the_centre_of_a_long_image():
  long = np.zeros((4, 400, 3), np.uint8)
  long[:, 195:205] = 200
  out = plain(8, augment='imagenet')(long, np.random.default_rng(0))
  assert (out == 200).all()


@pytest.mark.parametrize('augment', AUGMENTED)
def test_the_rng_fixes_the_augmentation(augment):
  fn = plain(16, augment=augment)
  draw = lambda seed: fn(photo(), np.random.default_rng(seed)).tobytes()
  assert draw(1) == draw(1) and len({draw(i) for i in range(8)}) > 4


def test_without_augmentation_nothing_is_drawn():
  for augment in ('none', 'vtab'):
    np.testing.assert_array_equal(plain(16, augment=augment)(photo()), plain(16)(photo()))


@pytest.mark.parametrize(
  'kwargs, text',
  [
    ({'augment': 'imagnet'}, "augment='imagnet' is unknown; did you mean 'imagenet'"),
    ({'resize': 'squish'}, "did you mean 'squash'"),
    (
      {'interpolation': 'nearest'},
      "interpolation='nearest' is unknown; there is 'bicubic', 'bilinear'",
    ),
    ({'augment': 'vtab', 'resize': 'crop'}, "it does not go with resize='crop'"),
    ({'std': (1, 0, 1)}, 'is not positive'),
    ({'image_size': 0}, 'image_size=0'),
  ],
)
def test_arguments_are_checked_at_once(kwargs, text):
  with pytest.raises(ValueError, match=text):
    image_transform(**{'image_size': 8} | kwargs)


@pytest.mark.parametrize(
  ('image', 'said'),
  [
    (np.zeros((4, 4, 3), np.float32), r'not float32 \[4, 4, 3\]'),
    (np.zeros((3, 4, 5), np.uint8), r'not uint8 \[3, 4, 5\]'),
    (np.zeros((4, 4, 4), np.uint8), r'not uint8 \[4, 4, 4\]'),
    (
      np.zeros((4, 4), np.uint8),
      r'an image is uint8 \[H, W, 3\] or \[H, W, 1\], not uint8 \[4, 4\]',
    ),
  ],
)
def test_what_is_no_image_is_named(image, said):
  with pytest.raises(ValueError, match=said):
    image_transform(8)({'image': image})
