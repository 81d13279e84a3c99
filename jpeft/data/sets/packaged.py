"""Data sets that ordinary packages carry, prepared by TFDS on first use."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

from jpeft.lazy import extra

from ..decode import decode
from ..source import Dataset, Example
from ..stored import folder_of_tfds, rows_of

# {name of a data set and of the module here: its builder}. Modules are imported when their set is
# loaded, because TFDS takes a second to import.
PACKAGED = {
  'mnist5k': 'Mnist5k',
  'movie_sentiment': 'MovieSentiment',
  'emoji_groups': 'EmojiGroups',
  'emoji_3d': 'Emoji3D',
  'animal_shapes': 'AnimalShapes',
  'phonemes': 'Phonemes',
}


def packaged(name: str, data_dir: str | Path | None) -> Dataset:
  """A data set of PACKAGED, prepared if it is not yet in `data_dir`.

  Raises:
    ImportError: TFDS is not installed.
    RuntimeError: its archive could not be downloaded.
    ValueError: the archive in the cache is another one.
  """
  with extra('quickstart'):
    module = importlib.import_module(f'.{name}', __package__)
  where = str(folder_of_tfds(data_dir))
  builder = getattr(module, PACKAGED[name])(data_dir=where, file_format='array_record')
  with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program
    builder.download_and_prepare()
  features = builder.info.features
  stored, splits = rows_of(builder, 'image' if 'image' in features else None)

  def read(row: int) -> Example:
    return _example(stored(row), f'image {row} of {name}')

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
