"""Modalities: what an example is, and how it becomes the arguments of a model's call."""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft import cli, data, models
from jpeft.core import Method
from jpeft.messages import did_you_mean
from jpeft.registering import module_of

Transform = Callable[..., dict[str, Any]]


def _nothing(*_) -> None:
  """Checks nothing."""


@dataclasses.dataclass(frozen=True)
class Modality:
  """One kind of input: images, texts, or what `register_modality` adds.

  Attributes:
    name: in run.json.
    field: the entry of an example that a data set gives, and that no other modality has.
    key: the array of a batch that no other modality has; the model's first argument.
    fits: pretrained -> whether the backbone reads this modality.
    transform: (config, pretrained, training) -> a function (example, rng) -> example of arrays,
      those of a batch's row.
    example: (config, pretrained) -> the arrays of a batch of one row, [1, ...] each: shapes to
      attach a method and to compile with.
    call: batch -> (args, kwargs) of the model's call.
    read: files that a user names -> (a name for each example, the examples). A name may be a dict
      with 'input' and what else says which one it is. Raises a ValueError or an OSError that names
      the file which cannot be read.
    has_length: whether `data.max_length` is the length of its rows.
    check: (pretrained, source, its transform) -> nothing; raises a ValueError, before training, for
      examples that the backbone cannot read.
  """

  name: str
  field: str
  key: str
  fits: Callable[[Any], bool]
  transform: Callable[[Any, Any, bool], Transform]
  example: Callable[[Any, Any], dict[str, np.ndarray]]
  call: Callable[[Mapping[str, Any]], tuple[tuple, dict[str, Any]]]
  read: Callable[[Sequence[str]], tuple[Sequence[Any], Sequence[dict[str, Any]]]]
  has_length: bool = False
  check: Callable[[Any, Any, Transform], None] = _nothing


# ---- Images.


def _is_image_model(pretrained) -> bool:
  return pretrained.preprocess is not None


def _image_transform(config, pretrained, training: bool) -> Transform:
  """Images as the backbone was trained on: its size, its mean and deviation."""
  augment = config.data.augment if training else 'none'
  return data.image_transform(**pretrained.preprocess, resize=config.data.resize, augment=augment)


def _image_example(config, pretrained) -> dict[str, np.ndarray]:
  size = pretrained.preprocess['image_size']
  return {'image': np.zeros((1, size, size, 3), np.float32)}


def _image_call(batch: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
  return (batch['image'],), {}


class _Picture(dict):
  """The example of an image file, which is decoded each time that it is read."""

  def __init__(self, file: pathlib.Path):
    super().__init__()
    self._file = file

  def __missing__(self, key: str) -> np.ndarray:
    if key != 'image':
      raise KeyError(key)
    return data.decode(self._file, str(self._file))


def _read_images(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[_Picture]]:
  """Files, all images below folders, and those that tables name."""
  places: list[dict[str, Any]] = []
  files = []
  for name in names:
    path = pathlib.Path(name)
    if data.kind_of_table(name) is not None:
      for row in data.asked(name):
        if 'image' not in row.example:
          raise ValueError(f'the run reads images: say which column has their paths, {name}?image=')
        places.append(_place(str(row.example['image']), name, row))
        files.append(row.example['image'])
      continue
    if not path.is_dir():
      places.append({'input': name})
      files.append(path)
      continue
    found = data.images_below(path)
    if not found:
      raise ValueError(f'there is no image in the folder {name}')
    places += [{'input': str(file)} for file in found]
    files += found
  data.check_files(list(dict.fromkeys(files)))
  return places, [_Picture(file) for file in files]


def _place(text: str, spec: str, row: data.Asked) -> dict[str, Any]:
  """What says which row of a table an example is."""
  place = {'input': text, 'file': spec.partition('?')[0], 'line': row.line}
  if 'pair' in row.example:
    place['pair'] = row.example['pair']
  if row.kept:
    place['kept'] = row.kept
  return place


IMAGE = Modality(
  name='image',
  field='image',
  key='image',
  fits=_is_image_model,
  transform=_image_transform,
  example=_image_example,
  call=_image_call,
  read=_read_images,
)


# ---- Texts.


def _is_text_model(pretrained) -> bool:
  return pretrained.preprocess is None


def by_tokenizer(make: Callable[..., Any], config, pretrained) -> Any:
  """`make`, such as `data.text_transform`, of the tokenizer of a backbone and its tables.

  Raises:
    ValueError: the backbone has no tokenizer.json, or one with tokens that it has no row for.
  """
  if pretrained.tokenizer is None:
    raise ValueError(f'{config.model.source} has no tokenizer.json, so texts cannot be read')
  return make(
    pretrained.tokenizer,
    config.data.max_length,
    pad_token=padding(pretrained),
    vocabulary=pretrained.config.get('vocab_size'),
    types=pretrained.config.get('type_vocab_size'),
  )


def padding(pretrained) -> str | None:
  """The token that a decoder is padded with; None where tokenizer.json says it.

  Tokenizers of decoders often have none. Theirs is what tokenizer_config.json calls `pad_token`,
  else the token that ends a text: it is masked, so that any will do. Without that file the padding
  is a token that tokenizer.json knows.
  """
  if not models.is_decoder(pretrained.model):
    return None
  path = pathlib.Path(pretrained.tokenizer)
  if path.suffix == '.json' and not path.with_name('tokenizer_config.json').exists():
    return None
  tokenizer = models.load_tokenizer(pretrained.tokenizer)
  return tokenizer.token(tokenizer.pad)


def _check_text_source(pretrained, source, transform: Transform) -> None:
  """Raises a ValueError if a text has a token that the backbone has no row for."""
  vocabulary = pretrained.config.get('vocab_size')
  if vocabulary is not None:
    data.check_texts(source, transform, pretrained.tokenizer, vocabulary)


def check_length(config, pretrained) -> None:
  """Raises a ValueError if rows of tokens are longer than the backbone has positions for."""
  length = config.data.max_length
  known = pretrained.config
  positions = known.get('max_position_embeddings', known.get('n_positions'))
  if positions is not None and length > positions:
    raise ValueError(
      f'config.data.max_length is {length}, more than the {positions} positions that the model was '
      'made for'
    )


def _text_example(config, pretrained) -> dict[str, np.ndarray]:
  check_length(config, pretrained)
  tokens = np.zeros((1, config.data.max_length), np.int32)
  arrays = {'tokens': tokens, 'token_mask': np.ones(tokens.shape, bool), 'types': tokens}
  return _taken(pretrained, arrays)


def _taken(pretrained, arrays: dict[str, Any]) -> dict[str, Any]:
  """The arrays that the backbone takes: a decoder has no segments."""
  if 'types' in inspect.signature(type(pretrained.model).__call__).parameters:
    return arrays
  return {name: x for name, x in arrays.items() if name != 'types'}


def _taken_of_texts(config, pretrained, training: bool) -> Transform:
  """The transform of texts, to what the backbone takes."""
  transform = by_tokenizer(data.text_transform, config, pretrained)

  def taken(example, rng=None):
    return _taken(pretrained, transform(example, rng))

  return taken


# The arrays that go by keyword: name of the model's argument -> name in the batch.
_TEXT_KEYWORDS = {'mask': 'token_mask', 'types': 'types'}


def _text_call(batch: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
  args = [batch['tokens']]
  if 'decoder_tokens' in batch:
    args.append(batch['decoder_tokens'])
  kwargs = {name: batch[key] for name, key in _TEXT_KEYWORDS.items() if key in batch}
  return tuple(args), kwargs


def _read_texts(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The lines of files, and the rows of tables."""
  places = []
  examples = []
  for name in names:
    if data.kind_of_table(name) is None:
      for line, text in cli.numbered_lines(name):
        example = {'text': text.strip()}
        places.append({'input': example['text'], 'file': name, 'line': line})
        examples.append(example)
      continue
    for row in data.asked(name):
      if 'text' not in row.example:
        raise ValueError(f'the run reads texts: say which column has them, {name}?text=')
      places.append(_place(row.example['text'], name, row))
      examples.append(row.example)
  if not examples:
    raise ValueError(f'there is no text in {", ".join(names)}')
  return places, examples


TEXT = Modality(
  name='text',
  field='text',
  key='tokens',
  fits=_is_text_model,
  transform=_taken_of_texts,
  example=_text_example,
  call=_text_call,
  read=_read_texts,
  has_length=True,
  check=_check_text_source,
)


# ---- The table of them.

_OWN = {modality.name: modality for modality in (IMAGE, TEXT)}
# Those from outside come first: they may claim backbones that the two above would take.
_REGISTERED: dict[str, Modality] = {}


def register_modality(modality: Modality) -> None:
  """Adds a kind of input that `jpeft train`, `plan` and `predict` then serve.

  Raises:
    ValueError: a modality of another module has its name, the entry of its examples or its array.
  """
  for other in _OWN.values():
    for attribute in ('name', 'field', 'key'):
      if getattr(other, attribute) == getattr(modality, attribute):
        raise ValueError(
          f'{attribute}={getattr(modality, attribute)!r} is that of the modality {other.name!r} of '
          'jpeft: choose another'
        )
  _REGISTERED[modality.name] = modality


def modalities() -> dict[str, Modality]:
  """All modalities by name, those from outside jpeft first."""
  return {**_REGISTERED, **_OWN}


def modality(name: str) -> Modality:
  """A modality by name.

  Raises:
    ValueError: there is none of that name.
  """
  known = modalities()
  if name not in known:
    raise ValueError(f'unknown modality {name!r}{did_you_mean(name, known)}')
  return known[name]


def modality_of(pretrained) -> Modality:
  """The modality that a backbone reads."""
  for found in modalities().values():
    if found.fits(pretrained):
      return found
  raise ValueError(f'no modality fits this backbone; there are {", ".join(modalities())}')


def check_example(pretrained, example: Mapping[str, Any], source: str) -> None:
  """Raises a ValueError where a data set has another modality than the backbone.

  Args:
    pretrained: the backbone.
    example: any example of the data set.
    source: its name.
  """
  wanted = modality_of(pretrained)
  if wanted.field in example:
    return
  there = [found.name for found in modalities().values() if found.field in example]
  holds = f'examples of the modality {there[0]!r}' if there else f'the entries {sorted(example)}'
  raise ValueError(
    f'the backbone reads examples of the modality {wanted.name!r}, and {source} has {holds}'
  )


def modality_module(name: str) -> str | None:
  """The module that registered a modality; None for one of jpeft."""
  if name in _OWN:
    return None
  return module_of(_REGISTERED[name].call)


# The arrays of a batch that are of the trainer, whatever the arguments of rules are called.
_OF_TRAINER = ('label', 'mask', 'index')


def taken(method: Method, batch: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of a batch that rules of a method take as arguments of the model's call."""
  names = {name for _, rule in method for name in rule.takes}
  return {name: x for name, x in batch.items() if name in names and name not in _OF_TRAINER}


def length_of(batch: Mapping[str, Any]) -> int | None:
  """The tokens of a row of a batch; None where examples are no rows of tokens, such as images."""
  for found in modalities().values():
    if found.key in batch:
      return batch[found.key].shape[1] if found.has_length else None
  return None


def inputs(batch: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
  """(args, kwargs) of the model's call for a batch.

  Raises:
    ValueError: the batch has the array of no modality.
  """
  for found in modalities().values():
    if found.key in batch:
      return found.call(batch)
  keys = ', '.join(repr(found.key) for found in modalities().values())
  raise ValueError(f'a batch has one of {keys}; this one has {", ".join(sorted(batch))}')
