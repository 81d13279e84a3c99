"""From images of any size to normalised arrays of one size.

The published preprocessings of the benchmarks (they change the scores, so say which one was used):

    VTAB-1k, most ViT adapters      augment='vtab', which is resize='squash' without augmentation
    SSF                             resize='crop', mean=0.5, std=0.5
    [0, 1] pixels, unnormalised     mean=0, std=1
    FGVC                            augment='flip_crop', resize='crop'; evaluation resize='crop'
    ImageNet                        augment='imagenet'; evaluation resize='crop'
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .source import nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}
AUGMENTATIONS, RESIZES = ('none', 'vtab', 'flip_crop', 'imagenet'), ('squash', 'crop')
MARGIN = 256 / 224  # side that an image is resized to before a crop, over the side of the crop


def image_transform(
  image_size: int,
  mean: float | Sequence[float] = IMAGENET_MEAN,
  std: float | Sequence[float] = IMAGENET_STD,
  augment: str = 'none',
  resize: str = 'squash',
  interpolation: str = 'bicubic',
) -> Callable[..., dict[str, Any]]:
  """Turns {'image': uint8 [H, W, 1 or 3], ...} into {'image': float32 [image_size, image_size, 3],
  ...}.

  Args:
    image_size: side in pixels.
    mean: of the channels, for pixels in [0, 1].
    std: of the channels, for pixels in [0, 1].
    augment: 'none'; 'vtab', the same with resize='squash'; 'flip_crop', a random crop of an image
      resized to 256/224 of the side, and a random left-right flip; 'imagenet', a random crop of 8
      to 100 % of the area and aspect 3/4 to 4/3, resized, and a flip. Digits and texts must not be
      flipped.
    resize: 'squash' both sides, or 'crop': the short side to 256/224 of image_size, then its
      centre.
    interpolation: 'bicubic' or 'bilinear', with antialiasing.

  Returns:
    A transform for `Batches`: (example, rng) -> example.

  Raises:
    ValueError: a value that is none of these.
  """
  for name, value, known in (
    ('augment', augment, AUGMENTATIONS),
    ('resize', resize, RESIZES),
    ('interpolation', interpolation, FILTERS),
  ):
    if value not in known:
      raise ValueError(f'{name}={value!r} is unknown; {nearest(value, known)}')
  if augment == 'vtab' and resize != 'squash':
    raise ValueError(f"augment='vtab' squashes images; it does not go with resize={resize!r}")
  if image_size < 1:
    raise ValueError(f'image_size={image_size} is not a positive number of pixels')
  if not np.all(np.asarray(std) > 0):
    raise ValueError(f'std={std} is not positive')
  scale, shift = (
    (1 / (255 * np.asarray(std))).astype(np.float32),
    (np.asarray(mean) / std).astype(np.float32),
  )
  filter = FILTERS[interpolation]

  def transform(example: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
    pixels = example['image']
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if augment == 'imagenet':
      image = _random_area(image, rng).resize((image_size, image_size), filter)
    elif augment == 'flip_crop':
      image = _cropped(_resized(image, image_size, resize, filter), image_size, rng)
    elif resize == 'crop':
      image = _cropped(_resized(image, image_size, resize, filter), image_size)
    else:
      image = image.resize((image_size, image_size), filter)
    pixels = np.asarray(image.convert('RGB'))
    if augment in ('flip_crop', 'imagenet') and rng.random() < 0.5:
      pixels = pixels[:, ::-1]
    return example | {'image': pixels * scale - shift}

  return transform


def _resized(image: Image.Image, size: int, resize: str, filter: Image.Resampling) -> Image.Image:
  """The image with its short side (or both, squashed) a margin larger than a crop of `size`."""
  side = round(size * MARGIN)
  if resize == 'squash':
    return image.resize((side, side), filter)
  short = min(image.size)
  return image.resize(tuple(max(side, round(n * side / short)) for n in image.size), filter)


def _cropped(image: Image.Image, size: int, rng: np.random.Generator | None = None) -> Image.Image:
  """A square of `size` anywhere in the image, or its centre without an rng."""
  room = np.array(image.size) - size
  left, top = (room // 2 if rng is None else rng.integers(room + 1)).tolist()
  return image.crop((left, top, left + size, top + size))


def _random_area(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """A rectangle of 8 to 100 % of the area and aspect 3/4 to 4/3; the centre if none fits in 10
  tries.
  """
  width, height = image.size
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return image.crop((left, top, left + w, top + h))
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return image.crop((left, top, left + w, top + h))
