"""Packaged data sets, prepared by TFDS on first use."""

import contextlib
import os
import sys
from pathlib import Path

from ..decode import decode
from ..source import Dataset

PACKAGED = ('mnist5k', 'movie_sentiment', 'emoji_groups', 'phonemes')


def packaged(name: str, data_dir: str | Path | None) -> Dataset:
  """A data set of `builders`, prepared if need be."""
  import tensorflow_datasets as tfds  # takes a second

  from .builders import BUILDERS

  where = data_dir or os.environ.get('TFDS_DATA_DIR') or Path.home() / 'tensorflow_datasets'
  builder = BUILDERS[name](data_dir=str(where), file_format='array_record')
  with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program
    builder.download_and_prepare()
  features = builder.info.features
  # Decoded as one's own files are, whether TFDS would take OpenCV or Pillow.
  decoders = {'image': tfds.decode.SkipDecoding()} if 'image' in features else None
  parts = builder.as_data_source(decoders=decoders)
  rows, start = {}, 0
  for split, part in parts.items():
    rows[split] = range(start, start + len(part))
    start += len(part)

  def read(row: int) -> dict:
    split = next(split for split in rows if row in rows[split])
    example = parts[split][row - rows[split].start]
    if 'image' in example:
      return {
        'image': decode(example['image'], f'image {row} of {name}'),
        'label': int(example['label']),
      }
    if 'prompt' in example:
      return {key: example[key].decode() for key in ('prompt', 'completion')}
    return {'text': example['text'].decode(), 'label': int(example['label'])}

  return Dataset(
    read,
    rows,
    features['label'].names if 'label' in features else [],
    getattr(builder, 'unit', 'word'),
  )
