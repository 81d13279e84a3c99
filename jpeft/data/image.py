"""From images of any size to normalised arrays of one size.

The published preprocessings of the benchmarks (they change the scores, so say which one was used):

    VTAB-1k, most ViT adapters      augment='vtab', which is resize='squash' without augmentation
    SSF                             resize='crop', mean=0.5, std=0.5
    [0, 1] pixels, unnormalised     mean=0, std=1
    FGVC                            augment='flip_crop', resize='crop'; evaluation resize='crop'
    ImageNet                        augment='imagenet'; evaluation resize='crop'
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .source import suggestion

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}
AUGMENTATIONS = ('none', 'vtab', 'flip_crop', 'imagenet')
RESIZES = ('squash', 'crop')
# The side that an image is resized to before a crop, over the side of the crop.
MARGIN = 256 / 224


def image_transform(
  image_size: int,
  mean: float | Sequence[float] = IMAGENET_MEAN,
  std: float | Sequence[float] = IMAGENET_STD,
  augment: str = 'none',
  resize: str = 'squash',
  interpolation: str = 'bicubic',
) -> Callable[..., dict[str, Any]]:
  """Turns images of any size into normalised ones of one size.

  {'image': uint8 [H, W, 1 or 3], ...} becomes {'image': float32 [image_size, image_size, 3], ...}.

  Args:
    image_size: side in pixels.
    mean: mean of the channels, for pixels in [0, 1].
    std: standard deviation of the channels, for pixels in [0, 1].
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
  _check_choice('augment', augment, AUGMENTATIONS)
  _check_choice('resize', resize, RESIZES)
  _check_choice('interpolation', interpolation, FILTERS)
  if augment == 'vtab' and resize != 'squash':
    raise ValueError(f"augment='vtab' squashes images; it does not go with resize={resize!r}")
  if image_size < 1:
    raise ValueError(f'image_size={image_size} is not a positive number of pixels')
  if not np.all(np.asarray(std) > 0):
    raise ValueError(f'std={std} is not positive')
  resampling = FILTERS[interpolation]
  # (pixels / 255 - mean) / std, as one multiplication and one subtraction.
  scale = (1 / (255 * np.asarray(std))).astype(np.float32)
  shift = (np.asarray(mean) / std).astype(np.float32)

  def resized(image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
    """A square of `image_size`."""
    if augment == 'imagenet':
      return _random_area(image, rng).resize((image_size, image_size), resampling)
    if augment == 'flip_crop':
      return _cropped(_with_margin(image, image_size, resize, resampling), image_size, rng)
    if resize == 'crop':
      return _cropped(_with_margin(image, image_size, resize, resampling), image_size)
    return image.resize((image_size, image_size), resampling)

  def transform(example: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
    pixels = example['image']
    if pixels.shape[-1] == 1:
      pixels = pixels[..., 0]  # Pillow has no grey images of three axes
    image = resized(Image.fromarray(pixels), rng)
    pixels = np.asarray(image.convert('RGB'))
    if augment in ('flip_crop', 'imagenet') and rng.random() < 0.5:
      pixels = pixels[:, ::-1]
    return example | {'image': pixels * scale - shift}

  return transform


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
  if value not in known:
    raise ValueError(f'{name}={value!r} is unknown; {suggestion(value, known)}')


def _with_margin(
  image: Image.Image, size: int, resize: str, resampling: Image.Resampling
) -> Image.Image:
  """The image, its short side (or both, squashed) larger than a crop of `size` by the margin."""
  side = round(size * MARGIN)
  if resize == 'squash':
    return image.resize((side, side), resampling)
  short = min(image.size)
  # Rounding must not make the short side smaller than the crop.
  width, height = (max(side, round(length * side / short)) for length in image.size)
  return image.resize((width, height), resampling)


def _cropped(image: Image.Image, size: int, rng: np.random.Generator | None = None) -> Image.Image:
  """A square of `size` at a random place of the image, or its centre without an rng."""
  room = np.array(image.size) - size
  corner = room // 2
  if rng is not None:
    corner = rng.integers(room + 1)
  left, top = corner.tolist()
  return image.crop((left, top, left + size, top + size))


def _random_area(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """A random rectangle of 8 to 100 % of the area and aspect 3/4 to 4/3.

  If 10 of them do not fit into the image, the largest centre of such an aspect.
  """
  width, height = image.size
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      left = rng.integers(width - crop_width + 1)
      top = rng.integers(height - crop_height + 1)
      return image.crop((left, top, left + crop_width, top + crop_height))
  crop_width = min(width, round(height * 4 / 3))
  crop_height = min(height, round(width * 4 / 3))
  left = (width - crop_width) // 2
  top = (height - crop_height) // 2
  return image.crop((left, top, left + crop_width, top + crop_height))
