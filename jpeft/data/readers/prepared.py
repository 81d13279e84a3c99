"""Data sets that TFDS has prepared on disk, read without TensorFlow and without their builders.

    tfds:cifar100                      the newest version in the folder of TFDS
    tfds:glue/sst2:2.0.0               a config and a version
    tfds:NAME?text=sentence&label=y    other features than those that the data set names itself
    tfds:NAME?unlabelled=skip          rows without a class are left out, see `unlabelled`

Image and label are what TFDS calls its supervised keys, else the only features that can be. Where
numbers are learned, a label is a feature of numbers that is named, or several, as in
label=width,height; where sets of classes are, it is a Sequence of ClassLabel that is named. The
data must be stored as array_record, which `download_and_prepare` writes with
file_format='array_record'.

A label is a part of its row here: of each split one row is read to see whether it has a class, and
all of them are if rows are to be skipped. Else a row without one is refused when it is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..decode import decode
from ..labels import CLASSES, NUMBERS, SETS
from ..source import Dataset, Example, suggestion
from ..stored import folder_of_tfds, rows_of
from .files import options_of
from .unlabelled import OPTION, Unlabelled, rule

PARTS = ('image', 'text', 'pair', 'label')


def prepared(spec: str, data_dir: str | Path | None, labels: str = CLASSES) -> Dataset:
  """A data set that TFDS has prepared.

  Args:
    spec: NAME[/CONFIG][:VERSION][?part=feature&...].
    data_dir: the folder of TFDS; if left out, $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    labels: the kind that is wanted, see `..labels`.

  Raises:
    FileNotFoundError: there is none of that name.
    ValueError: several configs, files that only TensorFlow reads, or no such features.
  """
  import tensorflow_datasets as tfds

  path, options = options_of(spec, 'tfds', (*PARTS, OPTION), {})
  choice = options.pop(OPTION, None)
  name = path.as_posix()
  builder = tfds.builder_from_directory(str(_folder(name, folder_of_tfds(data_dir))))
  kind = builder.info.file_format
  if kind is None or kind.value != 'array_record':
    raise ValueError(
      f'tfds:{name} is stored as {kind and kind.value}, which only TensorFlow reads: prepare it '
      "again with file_format='array_record'"
    )
  columns = _columns(name, builder.info, options)
  said = columns.pop('label').split(',')
  found = [builder.info.features[feature] for feature in said]
  kind = CLASSES
  if labels == NUMBERS and all(map(_is_number, found)):
    kind = NUMBERS
    classes = said
  else:
    feature = found[0]
    if labels == SETS and isinstance(feature, tfds.features.Sequence):
      kind = SETS
      feature = feature.feature
    if len(found) > 1 or not isinstance(feature, tfds.features.ClassLabel):
      wanted = {NUMBERS: 'of numbers', SETS: 'a Sequence of ClassLabel'}.get(labels, 'a ClassLabel')
      raise ValueError(
        f'tfds:{name}: {",".join(said)!r} is a {type(found[0]).__name__}, and a label is {wanted}'
      )
    classes = [feature.int2str(number) for number in range(feature.num_classes)]
  stored, splits = rows_of(builder, columns.get('image'))

  def label_of(values: dict[str, Any]) -> Any:
    if kind == NUMBERS:
      return np.array([values[feature] for feature in said], np.float32)
    if kind == SETS:
      return np.isin(np.arange(len(classes)), values[said[0]]).astype(np.float32)
    return int(values[said[0]])

  def read(row: int) -> Example:
    values = stored(row)
    return _example(values, columns, f'image {row} of {name}') | {'label': label_of(values)}

  found = Dataset(read, splits, classes, labels=kind)
  unlabelled = rule(choice, said[0], kind, named=True)
  if unlabelled is None:
    return found

  def class_of(row: int) -> int:
    return label_of(stored(row))

  return _with_class(found, f'tfds:{name}', class_of, unlabelled, skip=choice == 'skip')


def _with_class(
  dataset: Dataset,
  name: str,
  label_of: Callable[[int], int],
  unlabelled: Unlabelled,
  skip: bool,
) -> Dataset:
  """The data set without the rows that have no class, as far as they are looked for."""
  kept = {}
  for split, rows in dataset.splits.items():
    seen = rows if skip else rows[:1]

    def where(i: int, split: str = split) -> str:
      return f"row {i} of {name}, '{split}'"

    labels = [label_of(row) for row in seen]
    found = unlabelled.labelled(split, f"{name}, '{split}'", labels, where)
    if split not in unlabelled.left_out:
      kept[split] = [rows[i] for i in found] if skip else rows
  return dataset._replace(splits=kept, left_out=unlabelled.left_out, notes=tuple(unlabelled.notes))


def _is_number(feature: Any) -> bool:
  """Whether a feature of TFDS is one number, and no class."""
  import tensorflow_datasets as tfds

  is_class = isinstance(feature, tfds.features.ClassLabel)
  return not is_class and feature.shape == () and feature.np_dtype.kind in 'fiu'


def _example(stored: dict[str, Any], columns: dict[str, str], image_name: str) -> Example:
  """The inputs of an example, of what TFDS read: texts are bytes, images are files."""
  example: Example = {}
  if 'image' in columns:
    example['image'] = decode(stored[columns['image']], image_name)
  for part in ('text', 'pair'):
    if part in columns:
      example[part] = stored[columns[part]].decode()
  return example


class _Version(NamedTuple):
  """A folder of prepared files: NAME[/CONFIG]/VERSION."""

  number: tuple[int, ...]
  folder: Path


def _folder(name: str, root: Path) -> Path:
  """The folder of a name: of its newest version, if none is named."""
  name, _, version = name.partition(':')
  found = [info.parent for info in (root / name).rglob('dataset_info.json')]
  if version:
    found = [folder for folder in found if folder.name == version]
  if not found:
    there = sorted({info.parent.parent for info in root.glob('*/**/dataset_info.json')})
    names = [folder.relative_to(root).as_posix() for folder in there]
    wanted = f'{name}:{version}' if version else name
    raise FileNotFoundError(
      f'{root} has no data set {wanted!r} that TFDS has prepared; {suggestion(name, names)}'
    )
  configs = sorted({folder.parent.relative_to(root).as_posix() for folder in found})
  if len(configs) > 1:
    raise ValueError(f'tfds:{name} has several configs, name one: {", ".join(configs)}')
  versions = [
    _Version(tuple(int(part) for part in folder.name.split('.')), folder) for folder in found
  ]
  return max(versions).folder


def _columns(name: str, info, options: dict[str, str]) -> dict[str, str]:
  """{part of an example: its feature}.

  Args:
    name: of the data set, for messages.
    info: the DatasetInfo.
    options: parts whose features are named.

  Raises:
    ValueError: no such feature, or several that may be meant.
  """
  import tensorflow_datasets as tfds

  kinds = {'image': tfds.features.Image, 'text': tfds.features.Text}
  features = info.features
  asked = [*options.values()]
  if 'label' in options:
    asked.remove(options['label'])
    asked += options['label'].split(',')
  for feature in asked:
    if feature not in features:
      raise ValueError(f'tfds:{name} has no feature {feature!r}; {suggestion(feature, features)}')
  columns = dict(options)
  named = info.supervised_keys or ()
  if not {'image', 'text'} & set(columns):
    for part, kind in kinds.items():
      fit = [feature for feature in features if isinstance(features[feature], kind)]
      chosen = [feature for feature in fit if feature in named] or fit
      if len(chosen) == 1 and not {'image', 'text'} & set(columns):
        columns[part] = chosen[0]
  if 'label' not in columns:
    fit = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
    chosen = [feature for feature in fit if feature in named] or fit
    if len(chosen) == 1:
      columns['label'] = chosen[0]
  for part in ('image or text', 'label'):
    if not set(part.split(' or ')) & set(columns):
      raise ValueError(
        f'tfds:{name}: which feature is the {part}? Say it, as in tfds:{name}?label=FEATURE; there '
        f'is {", ".join(features)}'
      )
  return columns
