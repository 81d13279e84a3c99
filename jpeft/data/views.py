"""Several random views of an image, of one size each."""

from collections.abc import Sequence

import numpy as np

from .image import image_transform
from .source import Example, Transform

# Shares of the area of an image that a view shows, of large and of small ones (DINOv2).
LARGE, SMALL = (0.32, 1.0), (0.05, 0.32)


def views_transform(
  image_size: int,
  mean: float | Sequence[float],
  std: float | Sequence[float],
  small: int = 2,
  flip: bool = True,
) -> Transform:
  """Turns an image into two large views of it and some small ones.

  {'image': uint8 [H, W, 1 or 3], ...} becomes {'image': float32 [image_size, image_size, 3], a
  large view; 'views': [1 + small, image_size, image_size, 3], the other large one first; ...}.
  A view is a random rectangle, resized to `image_size`: 32 to 100 % of the area of the image, or 5
  to 32 %, and aspect 3/4 to 4/3.

  Args:
    image_size: side in pixels.
    mean, std: of the channels, for pixels in [0, 1].
    small: number of small views.
    flip: whether half of the views are mirrored.
  """

  def of(area):
    return image_transform(image_size, mean, std, 'imagenet', area=area, flip=flip)

  large_view, small_view = of(LARGE), of(SMALL)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    first = large_view(example, rng)
    others = [large_view(example, rng)] + [small_view(example, rng) for _ in range(small)]
    return first | {'views': np.stack([view['image'] for view in others])}

  return transform
