"""Images of one's own, in lists: a text file for each split, with an image and its label a line.

    lists:PATH          PATH/train800.txt, PATH/val200.txt, PATH/test.txt, ...

The name of a split is that of its file, such as 'train800val200' of the lists of VTAB-1k. A line is
the path of an image, relative to PATH, a blank, and a label; a path may have blanks. If all labels
are integers, a class is its number; else classes are the labels in alphabetical order. Splits are
in the order of their lists, and may share images, as those of VTAB-1k do.

Where numbers or sets of classes are learned, a label is one or more of them, separated by commas
without blanks: cat.png 3.5,0.2 or street.png car,tree.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft import textfiles

from ..decode import check_files, decode
from ..labels import CLASSES, NUMBERS, SETS, in_order, number, sets_of
from ..source import Dataset, Example, suggestion
from .files import options_of
from .unlabelled import OPTION, Unlabelled, rule


class Labelled(NamedTuple):
  """A line of a list."""

  line: int
  image: Path
  label: str


def lists(spec: str, labels: str = CLASSES) -> Dataset:
  """The images of the lists in a folder, with labels of a kind (see `..labels`).

  Raises:
    FileNotFoundError: no such folder, or no such image.
    ValueError: no lists, a line without a label, negative numbers of classes, or what is no number
      where numbers are wanted; a file that is no image, on reading if not before.
  """
  root, options = options_of(spec, 'lists', (OPTION,), {})
  unlabelled = rule(options.get(OPTION), 'label', labels)
  check_folder(root)
  files = sorted(root.glob('*.txt'))
  if not files:
    raise ValueError(
      f'no .txt files found in {root}: it needs one for each split, such as test.txt'
    )
  splits = {}
  for file in files:
    found = labelled(root, file, labels)
    if unlabelled is not None:
      found = _with_class(file, found, unlabelled)
      if file.stem in unlabelled.left_out:
        continue
    splits[file.stem] = found
  said = [found.label for images in splits.values() for found in images]
  if labels == CLASSES:
    classes = _classes(set(said), root)
    values = numbers_of(said, classes)
  elif labels == SETS:
    members = [label.split(',') for label in said]
    classes = in_order({name for names in members for name in names})
    values = sets_of(members, classes)
  else:
    values = _numbers(root, said)
    classes = [str(i) for i in range(values.shape[1])]
    if len(classes) == 1:
      classes = ['label']
  found = dataset_of(splits, values, classes, labels)
  if unlabelled is None:
    return found
  return found._replace(left_out=unlabelled.left_out, notes=tuple(unlabelled.notes))


def check_folder(root: Path) -> None:
  """Raises a FileNotFoundError if there is no such folder."""
  if not root.is_dir():
    beside = []
    if root.parent.is_dir():
      beside = [other.name for other in root.parent.iterdir() if other.is_dir()]
    raise FileNotFoundError(f'there is no folder {root}; {suggestion(root.name, beside)}')


def numbers_of(said: Sequence[str], classes: Sequence[str]) -> list[int]:
  """The number of the class of each label."""
  numbers = {name: i for i, name in enumerate(classes)}
  return [numbers[label] for label in said]


def dataset_of(
  splits: Mapping[str, Sequence[Labelled]],
  values: Sequence[Any],
  classes: list[str],
  labels: str = CLASSES,
) -> Dataset:
  """The images of all splits as a data set.

  Args:
    splits: {name: its images in order}.
    values: the label of each image, through all splits.
    classes: their names.
    labels: their kind.

  Raises:
    ValueError: a file that is no image.
  """
  images = [found.image for part in splits.values() for found in part]
  rows = {}
  start = 0
  for name, part in splits.items():
    rows[name] = range(start, start + len(part))
    start += len(part)
  check_files(list(dict.fromkeys(images)))

  def read(row: int) -> Example:
    return {'image': decode(images[row], str(images[row])), 'label': values[row]}

  return Dataset(read, rows, classes, labels=labels, label_of=values.__getitem__)


def _with_class(file: Path, images: list[Labelled], unlabelled: Unlabelled) -> list[Labelled]:
  """The images of one list that have a class."""

  def where(i: int) -> str:
    return f'line {images[i].line} of {file}'

  kept = unlabelled.labelled(file.stem, str(file), [one.label for one in images], where)
  return [images[i] for i in kept]


def _numbers(root: Path, said: Sequence[str]) -> np.ndarray:
  """float32 [N, K] of numbers that were checked line by line."""
  rows = [[number(value) for value in label.split(',')] for label in said]
  counts = sorted({len(row) for row in rows})
  if not rows:
    raise ValueError(f'the lists in {root} are empty')
  if len(counts) > 1:
    raise ValueError(
      f'the lists in {root} have {counts[0]} numbers in one line and {counts[-1]} in another'
    )
  return np.array(rows, np.float32)


def labelled(root: Path, file: Path, labels: str = CLASSES) -> list[Labelled]:
  """The images of one list, in its order.

  Args:
    root: what its paths are relative to.
    file: the list.
    labels: their kind.

  Raises:
    FileNotFoundError: there is no such image.
    ValueError: a line without a label, or a label of another kind.
  """
  found = []
  with textfiles.opened(file) as lines:
    for number_of_line, line in enumerate(lines, 1):
      if not line.strip():
        continue
      words = line.strip().rsplit(maxsplit=1)
      if len(words) != 2:
        raise ValueError(
          f'line {number_of_line} of {file} is no path of an image with a label: {line!r}'
        )
      image = root / words[0]
      if not image.is_file():
        beside = [other.name for other in image.parent.glob('*')][:1000]
        raise FileNotFoundError(
          f'line {number_of_line} of {file}: there is no file {image}; '
          f'{suggestion(image.name, beside)}'
        )
      label = words[1]
      if labels == NUMBERS:
        _check_numbers(label, f'line {number_of_line} of {file}')
      if labels == SETS and '' in label.split(','):
        raise ValueError(
          f'line {number_of_line} of {file} has {label!r} as its label; it must be classes with '
          'commas between'
        )
      if labels == CLASSES and label.isdecimal():
        label = str(int(label))
      found.append(Labelled(number_of_line, image, label))
  return found


def _check_numbers(label: str, where: str) -> None:
  try:
    for value in label.split(','):
      number(value)
  except ValueError:
    raise ValueError(
      f'{where} has {label!r} as its label; it must be a number, or several with commas between'
    ) from None


def _classes(labels: set[str], root: Path) -> list[str]:
  """The name of each label: all numbers up to the largest, or the names in order.

  Raises:
    ValueError: there are no labels, or numbers so large that they cannot count classes.
  """
  if not all(label.isdecimal() for label in labels):
    return sorted(labels)
  count = max((int(label) for label in labels), default=-1) + 1
  if not count:
    raise ValueError(f'the lists in {root} are empty')
  if count > 10 * len(labels) + 100:
    raise ValueError(
      f'the lists in {root} have {len(labels)} labels up to {count - 1}: numbers of classes count '
      'from 0'
    )
  return [str(number) for number in range(count)]
