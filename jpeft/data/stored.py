"""What TFDS has stored, row by row."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Stored = dict[str, Any]  # {feature: what TFDS reads of it}


def folder_of_tfds(data_dir: str | Path | None) -> Path:
  """The folder of what TFDS prepares: this one, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  where = data_dir or os.environ.get('TFDS_DATA_DIR') or Path.home() / 'tensorflow_datasets'
  return Path(where).expanduser()


def rows_of(builder, image: str | None) -> tuple[Callable[[int], Stored], dict[str, range]]:
  """(row -> what is stored of it, {split: its rows}) of a builder that is prepared.

  Args:
    builder: of TFDS.
    image: the feature whose files stay as they are, to be decoded as one's own files are, whether
      TFDS would take OpenCV or Pillow; None for none.
  """
  import tensorflow_datasets as tfds

  decoders = None
  if image is not None:
    decoders = {image: tfds.decode.SkipDecoding()}
  parts = builder.as_data_source(decoders=decoders)
  splits = {}
  start = 0
  for split, part in parts.items():
    splits[split] = range(start, start + len(part))
    start += len(part)

  def read(row: int) -> Stored:
    for split, rows in splits.items():
      if row in rows:
        return parts[split][row - rows.start]
    raise IndexError(f'{builder.name} has no row {row}')

  return read, splits
