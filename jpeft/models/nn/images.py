"""What models of images have in common: the grid of their patches, and their keys in configs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches.

  Raises:
    ValueError: the image does not split into whole patches.
  """
  if isinstance(image_size, int):
    height = width = image_size
  else:
    height, width = image_size
  if height % patch_size or width % patch_size:
    near = max(1, round(height / patch_size)) * patch_size
    raise ValueError(
      f'image_size {image_size} is no multiple of the patch size {patch_size}; '
      f'the nearest that is: {near}'
    )
  return height // patch_size, width // patch_size


def check_images(images, found: tuple[int, int], wanted: tuple[int, int], patch_size: int) -> None:
  """Checks that images [B, height, width, 3] are of the size that a model is made for.

  Args:
    images: what it was called with.
    found: rows and columns of their patches.
    wanted: rows and columns of the patches of the model.
    patch_size: side of a patch in pixels.

  Raises:
    ValueError: they are of another size.
  """
  if found != wanted:
    rows, columns = wanted
    raise ValueError(
      f'images of {images.shape[1]}x{images.shape[2]} pixels do not fit a model '
      f'made for {rows * patch_size}x{columns * patch_size}; load it with image_size='
      f'{images.shape[1]}'
    )


def image_size_of(config: Mapping) -> int | tuple[int, int]:
  """The image size of a config: its side, or (height, width)."""
  size = config['image_size']
  if isinstance(size, int):
    return size
  return tuple(size)


def patch_size_of(config: Mapping) -> int:
  """The side of a patch, of a config with images of three colours in square patches.

  Raises:
    ValueError: it has others.
  """
  if config.get('num_channels', 3) != 3:
    raise ValueError(
      f'num_channels={config["num_channels"]}: images have three colours, others are not supported'
    )
  sides = config['patch_size']
  if isinstance(sides, int):
    return sides
  if len(set(sides)) != 1:
    raise ValueError(f'patch_size={list(sides)}: patches that are no squares are not supported')
  return sides[0]


def size_in_config(model) -> int | list[int]:
  """The image size of a model as a config has it."""
  if isinstance(model.image_size, int):
    return model.image_size
  return list(model.image_size)


def image_example(model) -> tuple:
  """Abstract inputs of one call of a model with the fields image_size and patch_size."""
  rows, columns = grid(model.image_size, model.patch_size)
  size = rows * model.patch_size, columns * model.patch_size
  return (jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),)
