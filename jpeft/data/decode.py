"""From an image file to an array."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.lazy import extra

if TYPE_CHECKING:
  from PIL import Image

CHECKED = 20_000  # images whose beginnings are read in about a second


def decode(file: Path | bytes, name: str) -> np.ndarray:
  """The pixels of an image file as a viewer shows them; transparent parts become white.

  A photograph that is turned by its EXIF orientation alone is turned. Of an animation the first
  frame is taken, CMYK and other colour spaces become RGB.

  Args:
    file: path or content of a file that Pillow reads.
    name: of the file, for messages.

  Returns:
    uint8 [H, W, 3], or [H, W, 1] of a grey image.

  Raises:
    ValueError: not an image, cut off, with more than 8 bits a channel, or with more pixels than
      twice `PIL.Image.MAX_IMAGE_PIXELS`.
  """
  pil = _pillow()
  with _named(name), _opened(file) as image:
    image.load()
    _check_depth(image, name)
    image = _upright(image)
    if image.has_transparency_data:
      white = pil.Image.new('RGBA', image.size, 'white')
      image = pil.Image.alpha_composite(white, image.convert('RGBA'))
    if image.mode in ('1', 'L'):
      return np.array(image.convert('L'))[..., None]  # [H, W, 1]
    return np.array(image.convert('RGB'))


def check_files(files: Sequence[Path]) -> None:
  """Raises a ValueError if a file is empty or, of up to CHECKED, begins as no image does."""
  for file in files:
    if not file.stat().st_size:
      raise ValueError(f'{file} is no readable image (it is empty)')
  if len(files) > CHECKED:
    return
  for file in files:
    name = str(file)
    with _named(name), _opened(file) as image:
      _check_depth(image, name)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Makes of what Pillow raises about a file a ValueError that names it."""
  image = _pillow().Image
  try:
    yield
  except _Refused:
    raise
  except (image.DecompressionBombError, image.DecompressionBombWarning) as error:
    most = 2 * (image.MAX_IMAGE_PIXELS or 0)
    raise _Refused(
      f'{name} has more than {most:,} pixels; make it smaller or, if the file can be trusted and '
      'fits into memory, raise PIL.Image.MAX_IMAGE_PIXELS in a module for --import'
    ) from error
  except Exception as error:  # on broken files Pillow raises nearly everything
    raise _Refused(f'{name} is no readable image ({error or type(error).__name__})') from error


def _pillow() -> Any:
  """The package PIL, which is an extra."""
  with extra('quickstart'):
    import PIL.Image
    import PIL.ImageOps
  return PIL


class _Refused(ValueError):
  """A ValueError that names the file already."""


def _opened(file: Path | bytes) -> 'Image.Image':
  if isinstance(file, bytes):
    file = io.BytesIO(file)
  return _pillow().Image.open(file)


def _check_depth(image: 'Image.Image', name: str) -> None:
  if image.mode[0] in 'IF':
    raise _Refused(f'{name} has pixels of mode {image.mode}; convert it to 8 bits a channel')


def _upright(image: 'Image.Image') -> 'Image.Image':
  """The image, turned as its EXIF data say; as it is where these cannot be read."""
  try:
    return _pillow().ImageOps.exif_transpose(image)
  except Exception:  # viewers show a picture with broken EXIF data as it is stored, too
    return image
