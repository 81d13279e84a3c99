"""From an image file to an array."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def decode(file: Path | bytes, name: str) -> np.ndarray:
  """The pixels of an image file; transparent parts become white.

  Args:
    file: path or content of a file that Pillow reads; of an animation the first frame is taken.
    name: of the file, for messages.

  Returns:
    uint8 [H, W, 3], or [H, W, 1] of a grey image.

  Raises:
    ValueError: not an image, cut off, or with more than 8 bits a channel.
  """
  if isinstance(file, bytes):
    file = io.BytesIO(file)
  try:
    with Image.open(file) as image:
      image.load()
  except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
    raise ValueError(f'{name} is no readable image ({error})') from error
  if image.mode[0] in 'IF':
    raise ValueError(f'{name} has pixels of mode {image.mode}; convert it to 8 bits a channel')
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  if image.mode in ('1', 'L'):
    return np.array(image.convert('L'))[..., None]  # [H, W, 1]
  return np.array(image.convert('RGB'))
