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
  try:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
      image.load()
  except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
    raise ValueError(f'{name} is no readable image ({error})') from error
  if image.mode[0] in 'IF':
    raise ValueError(f'{name} has pixels of mode {image.mode}; convert it to 8 bits a channel')
  if image.has_transparency_data:
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
  pixels = np.array(image.convert('L' if image.mode in ('1', 'L') else 'RGB'))
  return pixels[..., None] if pixels.ndim == 2 else pixels
