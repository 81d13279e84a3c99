"""What stands beside merged weights, so that transformers reads texts and images as the run did."""

import inspect
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from jpeft import data, models, tokenizer_json
from jpeft.writing import write

# Copied as they are; what they lack is added.
_COPIED = (*models.FILES, 'special_tokens_map.json', 'generation_config.json')
_BICUBIC = 3  # Pillow's number of the filter


# ---- Texts.


class _Words(NamedTuple):
  """The words of a tokenizer.json.

  Attributes:
    ids: {word: its number}.
    pad: the word of the padding; None if there is none.
  """

  ids: dict[str, int]
  pad: str | None


def _words(file: pathlib.Path) -> _Words:
  # Read as JSON: merging needs no package for tokenizers.
  content = tokenizer_json.content(file)
  words = content['model'].get('vocab', {})
  if isinstance(words, list):  # of pairs (word, score)
    words = {pair[0]: number for number, pair in enumerate(words)}
  ids = dict(words)
  for token in content.get('added_tokens') or ():
    ids[token['content']] = token['id']
  pads = data.PADS
  if content.get('padding'):
    pads = (content['padding']['pad_token'], *pads)
  return _Words(ids, next((pad for pad in pads if pad in ids), None))


def save_tokenizer(
  folder: pathlib.Path, pretrained: models.Pretrained, max_length: int | None
) -> dict[str, Any]:
  """Writes the files of a tokenizer, and generation_config.json of a model that writes text.

  Args:
    folder: where to.
    pretrained: the backbone.
    max_length: tokens that a text is cut to; None of a model that writes text.

  Returns:
    What config.json has to say of it.
  """
  if pretrained.tokenizer is None:
    return {}
  path = pathlib.Path(pretrained.tokenizer)
  if path.suffix == '.gguf':
    models.save_tokenizer(models.load_tokenizer(path), folder)
  else:
    for name in _COPIED:
      if path.with_name(name).exists():
        shutil.copy(path.with_name(name), folder)
  words = _words(folder / 'tokenizer.json')
  config = _tokenizer_config(folder, pretrained, words, max_length)
  _write(folder / 'tokenizer_config.json', config)
  specials = tokenizer_json.special_tokens(config, folder / 'tokenizer_config.json')
  _write(folder / 'special_tokens_map.json', specials)
  numbers = {
    f'{name}_id': words.ids[token] for name, token in specials.items() if token in words.ids
  }
  if max_length is not None:
    if words.pad is None or getattr(pretrained.model, 'pad_id', None) is not None:
      return {}  # positions depend on the number that the config has
    return {'pad_token_id': words.ids[words.pad]}
  file = folder / 'generation_config.json'
  if not file.exists():
    # Else transformers takes numbers of its own, and texts do not end where ours do.
    known = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    _write(file, {name: number for name, number in numbers.items() if name in known})
  return {}


def _tokenizer_config(
  folder: pathlib.Path, pretrained: models.Pretrained, words: _Words, max_length: int | None
) -> dict[str, Any]:
  """The content of tokenizer_config.json."""
  config = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (folder / name).exists():
      config |= models.read_json(folder / name)
  if 'tokenizer_class' not in config:
    # tokenizer.json as it stands; a class by the kind of model would build its own.
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    config['model_input_names'] = ['input_ids', 'attention_mask']
    if _has_segments(pretrained):
      config['model_input_names'].insert(1, 'token_type_ids')
  if max_length is not None:
    config['model_max_length'] = max_length
    config['padding_side'] = 'right'
    config['truncation_side'] = 'right'
    if words.pad:
      config['pad_token'] = words.pad
  return config


def _has_segments(pretrained: models.Pretrained) -> bool:
  takes = inspect.signature(type(pretrained.model).__call__).parameters
  return 'types' in takes and (pretrained.config.get('type_vocab_size') or 0) > 1


# ---- Images.


def save_preprocessing(folder: pathlib.Path, pretrained: models.Pretrained, resize: str) -> None:
  """Writes preprocessor_config.json for images that get their size as `data.resize` says."""
  preprocess = pretrained.preprocess
  if preprocess is None:
    return
  size = preprocess['image_size']
  config: dict[str, Any] = {
    'do_convert_rgb': True,
    'do_resize': True,
    'resample': _BICUBIC,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': preprocess['mean'],
    'image_std': preprocess['std'],
  }
  if resize == 'crop':
    config |= {
      'image_processor_type': 'BitImageProcessor',
      'size': {'shortest_edge': round(size * data.MARGIN)},
      'do_center_crop': True,
      'crop_size': {'height': size, 'width': size},
    }
  else:
    config |= {
      'image_processor_type': 'ViTImageProcessor',
      'size': {'height': size, 'width': size},
    }
  _write(folder / 'preprocessor_config.json', config)


def _write(file: pathlib.Path, values: Mapping[str, Any]) -> None:
  write(file, json.dumps(values, indent=2) + '\n')
