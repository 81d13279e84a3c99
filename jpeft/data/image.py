"""From images of any size to normalised arrays of one size.

The published preprocessings of the benchmarks (they change the scores, so say which one was used):

    VTAB-1k, most ViT adapters      augment='vtab', which is resize='squash' without augmentation
    SSF                             resize='crop', mean=0.5, std=0.5 (data.pixels='half')
    [0, 1] pixels, unnormalised     mean=0, std=1 (data.pixels='none')
    FGVC                            augment='flip_crop', resize='crop'; evaluation resize='crop'
    ImageNet                        augment='imagenet'; evaluation resize='crop'
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jpeft.lazy import extra

from .conventions import IMAGENET_MEAN, IMAGENET_STD, MARGIN
from .source import Example, Transform, suggestion

with extra('quickstart'):
  from PIL import Image

FILTERS = {'bicubic': Image.Resampling.BICUBIC, 'bilinear': Image.Resampling.BILINEAR}
AUGMENTATIONS = ('none', 'vtab', 'flip_crop', 'imagenet')
RESIZES = ('squash', 'crop')
MOST_PIXELS = 2**27  # of an image that is made on the way to a crop


def image_transform(
  image_size: int,
  mean: float | Sequence[float] = IMAGENET_MEAN,
  std: float | Sequence[float] = IMAGENET_STD,
  augment: str = 'none',
  resize: str = 'squash',
  interpolation: str = 'bicubic',
  area: tuple[float, float] = (0.08, 1),
  flip: bool = True,
) -> Transform:
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
    area: the least and the largest share of the area that augment='imagenet' takes.
    flip: whether augment='imagenet' and 'flip_crop' flip.

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
  square = (image_size, image_size)
  # (pixels / 255 - mean) / std, as one multiplication and one subtraction.
  scale = (1 / (255 * np.asarray(std))).astype(np.float32)
  shift = (np.asarray(mean) / std).astype(np.float32)

  def resized(image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
    if augment == 'imagenet':
      return _random_area(image, rng, area).resize(square, resampling)
    if augment == 'flip_crop':
      image = _with_margin(image, image_size, resize, resampling)
      return _random_crop(image, image_size, image_size, rng)
    if resize == 'crop':
      image = _with_margin(image, image_size, resize, resampling)
      return _centre_crop(image, image_size, image_size)
    return image.resize(square, resampling)

  def transform(example: Example, rng: np.random.Generator | None = None) -> Example:
    pixels = np.asarray(example['image'])
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
      raise ValueError(
        f'an image is uint8 [H, W, 3] or [H, W, 1], not {pixels.dtype} {list(pixels.shape)}'
      )
    if pixels.shape[-1] == 1:
      pixels = pixels[..., 0]  # Pillow takes grey images without an axis of channels
    image = resized(Image.fromarray(pixels), rng)
    pixels = np.asarray(image.convert('RGB'))  # [image_size, image_size, 3]
    if flip and augment in ('flip_crop', 'imagenet') and rng.random() < 0.5:
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
  if width * height > MOST_PIXELS:
    raise ValueError(
      f"an image of {image.width} x {image.height} pixels is too narrow for resize='crop', which "
      f"would make {width} x {height} of it; use resize='squash'"
    )
  return image.resize((width, height), resampling)


def _random_area(
  image: Image.Image, rng: np.random.Generator, share: tuple[float, float]
) -> Image.Image:
  """A random rectangle of a share of the area in a range, and aspect 3/4 to 4/3.

  If 10 of them do not fit into the image, the largest centre of such an aspect.
  """
  image_width, image_height = image.size
  for _ in range(10):
    area = image_width * image_height * rng.uniform(*share)
    # Uniform in the logarithm: 3/4 and 4/3 are equally likely.
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = round(math.sqrt(area * aspect))
    height = round(math.sqrt(area / aspect))
    if 0 < width <= image_width and 0 < height <= image_height:
      return _random_crop(image, width, height, rng)
  width = min(image_width, round(image_height * 4 / 3))
  height = min(image_height, round(image_width * 4 / 3))
  return _centre_crop(image, width, height)


def _random_crop(
  image: Image.Image, width: int, height: int, rng: np.random.Generator
) -> Image.Image:
  image_width, image_height = image.size
  left = rng.integers(image_width - width + 1)
  top = rng.integers(image_height - height + 1)
  return image.crop((left, top, left + width, top + height))


def _centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
  image_width, image_height = image.size
  left = (image_width - width) // 2
  top = (image_height - height) // 2
  return image.crop((left, top, left + width, top + height))
