"""Data sets that TFDS has prepared on disk, read without TensorFlow and without their builders.

    tfds:cifar100                      the newest version in the folder of TFDS
    tfds:glue/sst2:2.0.0               a config and a version
    tfds:NAME?text=sentence&label=y    other features than those that the data set names itself

Image and label are what TFDS calls its supervised keys, else the only features that can be. They
must be stored as array_record, which `download_and_prepare` writes with file_format='array_record'.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..decode import decode
from ..source import Dataset, Example, suggestion
from ..stored import folder_of_tfds, rows_of
from .files import options_of

PARTS = ('image', 'text', 'pair', 'label')


def prepared(spec: str, data_dir: str | Path | None) -> Dataset:
  """A data set that TFDS has prepared.

  Args:
    spec: NAME[/CONFIG][:VERSION][?part=feature&...].
    data_dir: the folder of TFDS; if left out, $TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Raises:
    FileNotFoundError: there is none of that name.
    ValueError: several configs, files that only TensorFlow reads, or no such features.
  """
  import tensorflow_datasets as tfds

  path, options = options_of(spec, 'tfds', PARTS, {})
  name = path.as_posix()
  builder = tfds.builder_from_directory(str(_folder(name, folder_of_tfds(data_dir))))
  kind = builder.info.file_format
  if kind is None or kind.value != 'array_record':
    raise ValueError(
      f'tfds:{name} is stored as {kind and kind.value}, which only TensorFlow reads: prepare it '
      "again with file_format='array_record'"
    )
  columns = _columns(name, builder.info, options)
  label = builder.info.features[columns['label']]
  if not isinstance(label, tfds.features.ClassLabel):
    raise ValueError(
      f'tfds:{name}: {columns["label"]!r} is a {type(label).__name__}, and a label is a ClassLabel'
    )
  stored, splits = rows_of(builder, columns.get('image'))

  def read(row: int) -> Example:
    return _example(stored(row), columns, f'image {row} of {name}')

  classes = [label.int2str(number) for number in range(label.num_classes)]
  return Dataset(read, splits, classes)


def _example(stored: dict[str, Any], columns: dict[str, str], image_name: str) -> Example:
  """An example as `Source` has it, of what TFDS read: texts are bytes, images are files."""
  example: Example = {'label': int(stored[columns['label']])}
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
  for feature in options.values():
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
