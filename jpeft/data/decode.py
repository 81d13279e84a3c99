"""From an image file to an array."""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft import textfiles
from jpeft.lazy import extra

if TYPE_CHECKING:
  from PIL import Image

CHECKED = 20_000  # images whose beginnings are read in about a second
# What is read, by content: other plugins of Pillow start programs or read what is no picture.
FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'AVIF', 'BMP', 'TIFF', 'PPM')
MEMORY = 1.6e9  # bytes that an image may take while it is decoded
# Bytes a pixel while a format is decoded: copies in the decoder, the image, the result.
_BYTES = {'WEBP': 20, 'AVIF': 20}
_BYTES_ELSE = 12
_BAND = 2**22  # pixels that change their colour space at a time


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
    FileNotFoundError: there is no such file.
    ValueError: no file, not an image of FORMATS, cut off, with more than 8 bits a channel, or with
      more pixels than fit into MEMORY.
  """
  with _named(name), _opened(file, name) as image:
    image.load()
    return _pixels(_upright(image))


def _pixels(image: 'Image.Image') -> np.ndarray:
  """The pixels of an image on white, in bands: the steps to them are several times as large."""
  width, height = image.size
  transparent = image.has_transparency_data
  grey = image.mode in ('1', 'L') and not transparent
  pixels = np.empty((height, width, 1 if grey else 3), np.uint8)
  rows = max(1, _BAND // max(1, width))
  for top in range(0, height, rows):
    bottom = min(height, top + rows)
    band = image.crop((0, top, width, bottom))
    if transparent:
      white = _pillow().Image.new('RGBA', band.size, 'white')
      band = _pillow().Image.alpha_composite(white, band.convert('RGBA'))
    flat = np.asarray(band.convert('L' if grey else 'RGB'))
    pixels[top:bottom] = flat.reshape(bottom - top, width, -1)
  return pixels


def check_files(files: Sequence[Path]) -> None:
  """Raises a ValueError if a file is empty or, of up to CHECKED, begins as no image does."""
  for file in files:
    if not textfiles.check_regular(file):
      raise ValueError(f'{file} is no readable image (it is empty)')
  if len(files) > CHECKED:
    return
  for file in files:
    name = str(file)
    with _named(name), _opened(file, name):
      pass  # its beginning was read


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Makes of what Pillow raises about a file a ValueError that names it."""
  image = _pillow().Image
  unknown = _pillow().UnidentifiedImageError
  try:
    yield
  except (_Refused, FileNotFoundError):
    raise
  except unknown as error:
    raise _Refused(
      f'{name} is no readable image: it does not begin as one of {", ".join(_formats())} does'
    ) from error
  except (image.DecompressionBombError, image.DecompressionBombWarning) as error:
    most = 2 * (image.MAX_IMAGE_PIXELS or 0)
    raise _Refused(
      f'{name} has more than {most:,} pixels; make it smaller: Pillow refuses more than twice '
      'PIL.Image.MAX_IMAGE_PIXELS'
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


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of FORMATS that the installed Pillow has."""
  image = _pillow().Image
  image.init()
  return tuple(name for name in FORMATS if name in image.OPEN)


def _opened(file: Path | bytes, name: str) -> 'Image.Image':
  """An image whose beginning was read, and whose size and mode will do."""
  if isinstance(file, bytes):
    file = io.BytesIO(file)
  else:
    textfiles.check_regular(file)
  image = _pillow().Image.open(file, formats=_formats())
  try:
    _check(image, name)
  except _Refused:
    image.close()
    raise
  return image


def _check(image: 'Image.Image', name: str) -> None:
  """Raises a _Refused for pixels of more than 8 bits, and for more of them than fit into MEMORY."""
  if image.mode[0] in 'IF':
    raise _Refused(f'{name} has pixels of mode {image.mode}; convert it to 8 bits a channel')
  most = int(MEMORY / _BYTES.get(image.format or '', _BYTES_ELSE))
  if image.width * image.height > most:
    raise _Refused(
      f'{name} has {image.width} x {image.height} pixels, and at most {most:,} of a {image.format} '
      'file are read: make it smaller'
    )


def _upright(image: 'Image.Image') -> 'Image.Image':
  """The image, turned as its EXIF data say; as it is where these cannot be read."""
  try:
    return _pillow().ImageOps.exif_transpose(image)
  except Exception:  # viewers show a picture with broken EXIF data as it is stored, too
    return image
