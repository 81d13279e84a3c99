"""Data sets that ordinary packages carry, prepared by TFDS on first use."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ..decode import decode
from ..source import Dataset, Example

# {name of a data set and of the module here: its builder}. Modules are imported when their set is
# loaded, because TFDS takes a second to import.
PACKAGED = {
  'mnist5k': 'Mnist5k',
  'movie_sentiment': 'MovieSentiment',
  'emoji_groups': 'EmojiGroups',
  'phonemes': 'Phonemes',
}


def packaged(name: str, data_dir: str | Path | None) -> Dataset:
  """A data set of PACKAGED, prepared if it is not yet in `data_dir`.

  Raises:
    RuntimeError: its archive could not be downloaded.
    ValueError: the archive in the cache is another one.
  """
  import tensorflow_datasets as tfds

  module = importlib.import_module(f'.{name}', __package__)
  where = data_dir or os.environ.get('TFDS_DATA_DIR') or Path.home() / 'tensorflow_datasets'
  builder = getattr(module, PACKAGED[name])(data_dir=str(where), file_format='array_record')
  with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program
    builder.download_and_prepare()
  features = builder.info.features
  decoders = None
  if 'image' in features:
    # Decoded as one's own files are, whether TFDS would take OpenCV or Pillow.
    decoders = {'image': tfds.decode.SkipDecoding()}
  parts = builder.as_data_source(decoders=decoders)
  splits = {}
  start = 0
  for split, part in parts.items():
    splits[split] = range(start, start + len(part))
    start += len(part)

  def read(row: int) -> Example:
    for split, rows in splits.items():
      if row in rows:
        return _example(parts[split][row - rows.start], f'image {row} of {name}')
    raise IndexError(f'{name} has no row {row}')

  classes = []
  if 'label' in features:
    classes = features['label'].names
  return Dataset(read, splits, classes, builder.unit)


def _example(stored: dict[str, Any], image_name: str) -> Example:
  """An example as `Source` has it, of what TFDS read: texts are bytes, images are files."""
  if 'prompt' in stored:
    return {part: stored[part].decode() for part in ('prompt', 'completion')}
  label = int(stored['label'])
  if 'image' in stored:
    return {'image': decode(stored['image'], image_name), 'label': label}
  return {'text': stored['text'].decode(), 'label': label}
