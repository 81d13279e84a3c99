"""What loading and saving need of a model family."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from .heads import Heads
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
    head: what it gives, see `load`; decided before the model is built.
    fields: fields of the module that no config has: dtype, param_dtype, scan, remat.
  """

  num_classes: int | None = None
  image_size: int | None = None
  layers: int | None = None
  pool: str | None = None
  head: str | None = None
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
    sizes: {field of the model: key of transformers} of the sizes that `narrowed` changes, where
      there is a key for them: one number for all blocks.
    heads: those that its models can have.
    their_pool: what the classes of transformers with labels read, where a fresh head reads another
      feature here.
  """

  build: Callable[[Mapping, Checkpoint | None, Request], nn.Module]
  table: Callable[[nn.Module], Table]
  example: Callable[[nn.Module], tuple]
  describe: Callable[[Mapping, nn.Module], dict]
  edits: Callable[[Mapping, nn.Module], dict] = lambda config, model: {}
  colours: Mapping[str, tuple[float, ...]] | None = None
  sizes: Mapping[str, str] = {}
  heads: Heads = Heads({})
  their_pool: str | None = None


# The fields that hold the sizes of blocks, and our own key for those that transformers has no key
# for: such a file loads here, and transformers refuses its tensors by their shapes.
_SIZES = (
  'head_dim',
  'heads',
  'kv_heads',
  'mlp_dim',
  'decoder_heads',
  'cross_heads',
  'decoder_mlp_dim',
  'bias_heads',
  'decoder_bias_heads',
)
_OWN_SIZES = 'jpeft_sizes'


def built(
  family: Family, config: Mapping, checkpoint: Checkpoint | None, request: Request
) -> nn.Module:
  """The model of a config, with the sizes of its blocks.

  Raises:
    ValueError: of those of `build`; or the first blocks of a T5 whose blocks read other heads of
      the position bias: with the last blocks its table would lose columns.
  """
  model = family.build(config, checkpoint, request)
  own = {}
  _check_sizes(config.get(_OWN_SIZES, {}))
  if request.layers is not None and any(
    'bias_heads' in name for name in config.get(_OWN_SIZES, {})
  ):
    raise ValueError(
      f'layers={request.layers}: blocks of this model read different heads of a shared position '
      'bias; load it whole, '
      f'then take jpeft.narrowed(..., jpeft.Keep(layers=range({request.layers}), ...))'
    )
  for name, size in config.get(_OWN_SIZES, {}).items():
    if isinstance(size, (list, tuple)):
      size = _tuples(size)[: request.layers]  # those of the blocks that are built
    own[name] = size
  return model.clone(**own)


def _check_sizes(sizes: Mapping[str, Any]) -> None:
  """Raises a ValueError for a size of blocks that models have not, or that is none."""
  for name, size in sizes.items():
    if name not in _SIZES:
      raise ValueError(f'{_OWN_SIZES} of the config has {name!r}, which is none of its sizes')
    for number in _flat(size):
      if not isinstance(number, int) or not 0 <= number < 2**24:
        raise ValueError(f'{name!r} in {_OWN_SIZES} of the config has {number!r:.60}, no size')


def _flat(size: Any) -> list[Any]:
  """The numbers of a size, which may be one of each block and each head; None says all."""
  if isinstance(size, (list, tuple)):
    return [number for part in size for number in _flat(part)]
  return [] if size is None else [size]


def described(family: Family, config: Mapping, model: nn.Module) -> dict:
  """The config for a file of a model.

  Args:
    family: of the model.
    config: of the model that it was made from.
    model: perhaps with other sizes, see `narrowed`.

  Raises:
    ValueError: its vocabulary is cut, so that ids in the config mean other words.
  """
  words = getattr(model, 'vocab', None)
  if words is not None and words != config['vocab_size']:
    raise ValueError(
      f'the model knows {words} words and its config says vocab_size={config["vocab_size"]}: give '
      'the config with the new size, and with new numbers of the tokens that it names, such as '
      'eos_token_id'
    )
  config = family.describe(config, model)
  config.pop(_OWN_SIZES, None)
  # Sizes do not depend on the head.
  plain = family.build(config, None, Request())
  for name, key in family.sizes.items():
    size = getattr(model, name)
    if isinstance(size, int) and size != getattr(plain, name):
      config[key] = size
  plain = family.build(config, None, Request())
  own = {}
  for name in _SIZES:
    size = getattr(model, name, None)
    if size != getattr(plain, name, None):
      own[name] = size
  if own:
    config[_OWN_SIZES] = own
  return config


def _tuples(size):
  """A size as it is read from a file, with tuples in place of lists."""
  if isinstance(size, (list, tuple)):
    return tuple(_tuples(part) for part in size)
  return size


def shape_of(checkpoint: Checkpoint | None, key: str) -> tuple[int, ...] | None:
  """The shape of a tensor, with or without a prefix before its key; None if there is none."""
  if checkpoint is None:
    return None
  for name, shape in checkpoint.shapes.items():
    if name == key or name.endswith(f'.{key}'):
      return shape
  return None


def classes_of(checkpoint: Checkpoint | None, request: Request) -> int | None:
  """The number of classes: that of the request, else that of `classifier` in the files.

  None where there is no head.
  """
  if request.head is None or request.num_classes is not None:
    return request.num_classes
  stored = shape_of(checkpoint, 'classifier.weight')
  return stored[0] if stored else None


def check_whole(request: Request) -> None:
  """Raises a ValueError if the request asks for the first blocks of a model in stages."""
  if request.layers is not None:
    raise ValueError(
      f'layers={request.layers}: blocks of this model lie in stages of several widths, and what '
      'follows them reads the last one: load it whole'
    )


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
