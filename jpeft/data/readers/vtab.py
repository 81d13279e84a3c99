"""VTAB-1k as folders of images with lists, one folder a task, and what its 19 tasks are.

    vtab:PATH/cifar     PATH/cifar/train800.txt, val200.txt, train800val200.txt, test.txt

Zhai et al., 2019 (arXiv 1910.04867), with the 1,000 training images that VPT (arXiv 2203.12119)
fixed. The name of the folder is that of a task of TASKS, and a line of a list is the path of an
image, relative to the folder, a blank and the number of its class. Lists that are not those of the
task are refused: published rows are of exactly these images.
"""

from pathlib import Path
from typing import NamedTuple

from ..source import Dataset, suggestion
from .lists import Labelled, check_folder, dataset_of, labelled, numbers_of

NATURAL = 'natural'
SPECIALISED = 'specialised'
STRUCTURED = 'structured'


class Task(NamedTuple):
  """A task of VTAB-1k.

  Attributes:
    group: NATURAL, SPECIALISED or STRUCTURED.
    classes: their number.
    test: images to test on.
  """

  group: str
  classes: int
  test: int


# {folder: its task}, in the order of published tables.
TASKS = {
  'cifar': Task(NATURAL, 100, 10_000),
  'caltech101': Task(NATURAL, 102, 6_084),
  'dtd': Task(NATURAL, 47, 1_880),
  'oxford_flowers102': Task(NATURAL, 102, 6_149),
  'oxford_iiit_pet': Task(NATURAL, 37, 3_669),
  'svhn': Task(NATURAL, 10, 26_032),
  'sun397': Task(NATURAL, 397, 21_750),
  'patch_camelyon': Task(SPECIALISED, 2, 32_768),
  'eurosat': Task(SPECIALISED, 10, 5_400),
  'resisc45': Task(SPECIALISED, 45, 6_300),
  'diabetic_retinopathy': Task(SPECIALISED, 5, 42_670),
  'clevr_count': Task(STRUCTURED, 8, 15_000),
  'clevr_dist': Task(STRUCTURED, 6, 15_000),
  'dmlab': Task(STRUCTURED, 6, 22_735),
  'kitti': Task(STRUCTURED, 4, 711),
  'dsprites_loc': Task(STRUCTURED, 16, 73_728),
  'dsprites_ori': Task(STRUCTURED, 16, 73_728),
  'smallnorb_azi': Task(STRUCTURED, 18, 12_150),
  'smallnorb_ele': Task(STRUCTURED, 9, 12_150),
}
# {split: its images}; the number of those to test on is the task's.
TRAINING = {'train800': 800, 'val200': 200, 'train800val200': 1000}


def vtab(spec: str) -> Dataset:
  """A task of VTAB-1k in a folder.

  Raises:
    FileNotFoundError: no such folder, list or image.
    ValueError: no task is called as the folder is, or its lists are not those of the task.
  """
  root = Path(spec).expanduser()
  task = TASKS.get(root.name)
  if task is None:
    raise ValueError(
      f'vtab:{spec} is not the folder of a task of VTAB-1k: none is called {root.name!r}; '
      f'{suggestion(root.name, TASKS)} (lists:{spec} reads any lists)'
    )
  check_folder(root)
  splits = {name: labelled(root, _list(root, name)) for name in (*TRAINING, 'test')}
  for name, images in splits.items():
    _check_labels(root.name, name, images, task.classes)
  _check_training(root, splits)
  classes = [str(number) for number in range(task.classes)]
  said = [found.label for images in splits.values() for found in images]
  found = dataset_of(splits, numbers_of(said, classes), classes)
  if len(splits['test']) != task.test:
    note = (
      f'{root / "test.txt"} has {len(splits["test"]):,} images, and published rows are of '
      f'{task.test:,}'
    )
    found = found._replace(notes=(note,))
  return found


def _list(root: Path, split: str) -> Path:
  file = root / f'{split}.txt'
  if not file.is_file():
    needed = ', '.join(f'{name}.txt' for name in (*TRAINING, 'test'))
    raise FileNotFoundError(f'there is no list {file}; a task of VTAB-1k has {needed}')
  return file


def _check_labels(task: str, split: str, images: list[Labelled], classes: int) -> None:
  """Raises a ValueError if a label is no number of a class of the task."""
  for found in images:
    if not found.label.isdecimal() or int(found.label) >= classes:
      raise ValueError(
        f'line {found.line} of {split}.txt has the label {found.label!r}, and {task} has the '
        f'classes 0 to {classes - 1}'
      )


def _check_training(root: Path, splits: dict[str, list[Labelled]]) -> None:
  """Raises a ValueError if the lists to train on are not two parts and their sum."""
  for name, count in TRAINING.items():
    if len(splits[name]) != count:
      raise ValueError(
        f'{root / name}.txt has {len(splits[name]):,} images, and VTAB-1k has {count:,} in it'
      )
  parts = {name: {(found.image, found.label) for found in splits[name]} for name in TRAINING}
  common = {image for image, _ in parts['train800']} & {image for image, _ in parts['val200']}
  if common:
    raise ValueError(
      f'{min(common)} is in train800.txt and in val200.txt of {root}: rates would be chosen on '
      'images that were learned'
    )
  if parts['train800'] | parts['val200'] != parts['train800val200']:
    raise ValueError(f'{root / "train800val200.txt"} is not train800.txt and val200.txt together')
