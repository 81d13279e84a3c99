"""What loading and saving need of a model family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from .io import Checkpoint, Table

# Mean and std of the pixels, per channel.
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}


class Request(NamedTuple):
  """What the caller of `load` wants other than the config; None keeps the config's value.

  Attributes:
    num_classes: outputs of a fresh head.
    image_size: side of the images in pixels.
    layers: number of blocks, from the first.
    pool: what the head reads.
    fields: fields of the module that no config has: dtype, param_dtype, scan, remat.
  """

  num_classes: int | None = None
  image_size: int | None = None
  layers: int | None = None
  pool: str | None = None
  fields: Mapping[str, Any] = {}


class Family(NamedTuple):
  """One family of checkpoints.

  Attributes:
    build: (config, checkpoint or None, request) -> model. Without a checkpoint there is a head only
      if the request has num_classes.
    table: model -> the keys of its arrays on disk.
    example: model -> abstract inputs of one call.
    describe: (config, model) -> config for a file of this model.
    edits: (config, model) -> {path: function of an array that was read}.
    colours: mean and std of the pixels in [0, 1]; None for text.
  """

  build: Callable[[Mapping, Checkpoint | None, Request], nn.Module]
  table: Callable[[nn.Module], Table]
  example: Callable[[nn.Module], tuple]
  describe: Callable[[Mapping, nn.Module], dict]
  edits: Callable[[Mapping, nn.Module], dict] = lambda config, model: {}
  colours: Mapping[str, tuple[float, ...]] | None = None


def shape_of(checkpoint: Checkpoint | None, key: str) -> tuple[int, ...] | None:
  """The shape of a tensor, with or without a prefix before its key; None if there is none."""
  if checkpoint is None:
    return None
  for name, shape in checkpoint.shapes.items():
    if name == key or name.endswith(f'.{key}'):
      return shape
  return None


def depth_of(config: Mapping, key: str, request: Request) -> int:
  """The number of blocks to build.

  Raises:
    ValueError: the request asks for more than there are, or for none.
  """
  depth = config[key]
  if request.layers is None:
    return depth
  if not 1 <= request.layers <= depth:
    raise ValueError(
      f'layers={request.layers} is not between 1 and the {depth} blocks of the model'
    )
  return request.layers


def with_labels(config: Mapping, classes: int | None) -> dict:
  """The config with as many labels as the model has classes; the same config if they fit.

  Args:
    config: of the checkpoint.
    classes: number of classes of the model; None if it has no head.
  """
  config = dict(config)
  labels = config.get('id2label') or {}
  if classes is not None and len(labels) != classes:
    config['id2label'] = {str(i): f'LABEL_{i}' for i in range(classes)}
    config['label2id'] = {f'LABEL_{i}': i for i in range(classes)}
  return config
