"""Images of one's own, in lists: a text file for each split, with an image and its label a line.

    lists:PATH          PATH/train800.txt, PATH/val200.txt, PATH/test.txt, ...

The name of a split is that of its file, such as 'train800val200' of the lists of VTAB-1k. A line is
the path of an image, relative to PATH, a blank, and a label; a path may have blanks. If all labels
are integers, a class is its number; else classes are the labels in alphabetical order. Splits are
in the order of their lists, and may share images, as those of VTAB-1k do.
"""

from pathlib import Path

from jpeft import textfiles

from ..decode import check_files, decode
from ..source import Dataset, Example, suggestion

Labelled = tuple[Path, str]  # an image file, its label


def lists(path: str) -> Dataset:
  """The images of the lists in a folder.

  Raises:
    FileNotFoundError: no such folder, or no such image.
    ValueError: no lists, a line without a label, or negative labels; a file that is no image, on
      reading if not before.
  """
  root = Path(path).expanduser()
  if not root.is_dir():
    raise FileNotFoundError(f'there is no folder {root}')
  files = sorted(root.glob('*.txt'))
  if not files:
    raise ValueError(
      f'no .txt files found in {root}: it needs one for each split, such as test.txt'
    )
  images: list[Labelled] = []
  splits = {}
  for file in files:
    found = _labelled(root, file)
    splits[file.stem] = range(len(images), len(images) + len(found))
    images += found
  classes = _classes({label for _, label in images}, root)
  labels = {name: number for number, name in enumerate(classes)}
  check_files(list(dict.fromkeys(file for file, _ in images)))

  def read(row: int) -> Example:
    file, label = images[row]
    return {'image': decode(file, str(file)), 'label': labels[label]}

  return Dataset(read, splits, classes)


def _labelled(root: Path, file: Path) -> list[Labelled]:
  """The images of one list."""
  found = []
  with textfiles.opened(file) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      words = line.strip().rsplit(maxsplit=1)
      if len(words) != 2:
        raise ValueError(f'line {number} of {file} is no path of an image with a label: {line!r}')
      image = root / words[0]
      if not image.is_file():
        beside = [other.name for other in image.parent.glob('*')][:1000]
        raise FileNotFoundError(
          f'line {number} of {file}: there is no file {image}; {suggestion(image.name, beside)}'
        )
      label = words[1]
      if label.isdecimal():
        label = str(int(label))
      found.append((image, label))
  return found


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
