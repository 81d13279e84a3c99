"""Images of one's own: a folder for each class.

    PATH/<class>/*.png            images that are divided: 80 % 'train', 20 % 'test'
    PATH/<split>/<class>/*.png    where there is PATH/train; the folders beside it are splits too
    PATH/test/<class>/*.png       without PATH/train, where all folders are called as SPLITS are

Classes are the folder names in alphabetical order. Images are divided and mixed by a hash of their
relative path, so that 'train[:1000]' has all classes in it. Images in folders below that of a class
are of that class. What is left out is told in notes: images beside the folders of classes, hidden
files, files whose suffix is none of an image, folders without images. Empty files are refused, and
images in formats that Pillow does not read. In folders of up to 20,000 images the beginning of each
is read at once, so that a file that is no image is told before training; one that is cut off is
told when it is read.

Where no labels are wanted, all images below PATH, or below each PATH/<split>, are read: folders are
no classes, and images may lie beside them.
"""

import collections
from collections.abc import Iterable
from pathlib import Path

from ..decode import check_files, decode
from ..labels import NOTHING
from ..source import Dataset, Example, split_rows, suggestion

Labelled = tuple[Path, str]  # an image file, its class
SUFFIXES = (
  *('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.avif', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm'),
)
SPLITS = ('test', 'val', 'valid', 'validation', 'dev')  # beside 'train'
# Images all the same: without a word a class would lose them.
UNREAD = ('.heic', '.heif', '.jxl', '.dng', '.cr2', '.nef', '.arw', '.svg', '.dcm')


def folder(path: str) -> Dataset:
  """The images under a folder.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no images in it, a class that 'train' has not, images that are empty or of UNREAD;
      a file that is no image, on reading if not before.
  """
  root = _root(path)
  parts = _parts(root, _has_train(root) or _only_tests(root))
  train = parts.get('train', root)

  images: list[Labelled] = []
  keys = {}
  left_out = {}
  notes = []
  for split, part in parts.items():
    found, others = _labelled(part)
    if found or part == train:  # a folder of something else is no split
      keys[split] = [file.relative_to(part).as_posix() for file, _ in found]
      images += found
      notes += _notes(part, found, others)
    else:
      left_out[split] = f'{part} has no images in folders of classes'

  classes = _classes(images, train)
  check_files([file for file, _ in images])
  labels = {name: label for label, name in enumerate(classes)}

  def read(row: int) -> Example:
    file, name = images[row]
    return {'image': decode(file, str(file)), 'label': labels[name]}

  def label_of(row: int) -> int:
    return labels[images[row][1]]

  return Dataset(
    read,
    split_rows(keys),
    classes,
    left_out=left_out,
    label_of=label_of,
    notes=tuple(notes),
  )


def images_alone(path: str) -> Dataset:
  """The images under a folder, without labels.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: as `folder`.
  """
  images = []
  keys = {}
  left_out = {}
  notes = []
  root = _root(path)
  for split, part in _parts(root, _has_train(root)).items():
    found, others = _files(part)
    if found or not split:
      keys[split] = [file.relative_to(part).as_posix() for file in found]
    else:
      left_out[split] = f'{part} has no images'
    images += found
    if others:
      notes.append(
        f'files in {part} are left out, being hidden or of no suffix of an image: {_some(others)}'
      )
  if not images:
    raise ValueError(f'no images found in {path}: it needs files that end in {", ".join(SUFFIXES)}')
  check_files(images)

  def read(row: int) -> Example:
    return {'image': decode(images[row], str(images[row]))}

  return Dataset(read, split_rows(keys), [], labels=NOTHING, left_out=left_out, notes=tuple(notes))


def _root(path: str) -> Path:
  """The folder of a path.

  Raises:
    FileNotFoundError: there is none.
  """
  root = Path(path).expanduser()
  if root.is_dir():
    return root
  beside = []
  if root.parent.is_dir():
    beside = [found.name for found in _folders(root.parent)]
  raise FileNotFoundError(f'there is no folder {root}; {suggestion(root.name, beside)}')


def _parts(root: Path, are_splits: bool) -> dict[str, Path]:
  """{split: its folder}; {'': root} of images that are to be divided."""
  if not are_splits:
    return {'': root}
  return {part.name: part for part in _folders(root)}


def _has_train(root: Path) -> bool:
  return (root / 'train').is_dir()


def _only_tests(root: Path) -> bool:
  """Whether all folders are called as SPLITS are, and hold folders and no images."""
  folders = _folders(root)
  return bool(folders) and all(
    part.name in SPLITS and _folders(part) and not _images_beside(part) for part in folders
  )


def _images_beside(part: Path) -> list[Path]:
  """The images beside the folders of classes."""
  return [file for file in part.iterdir() if file.suffix.lower() in SUFFIXES]


def _classes(images: list[Labelled], train: Path) -> list[str]:
  """The classes of the images in `train`, which all images must be of."""
  classes = sorted({name for file, name in images if file.is_relative_to(train)})
  if not classes:
    suffixes = ', '.join(SUFFIXES)
    raise ValueError(
      f'no images found in {train}: it needs a folder for each class, with files that end in '
      f'{suffixes}'
    )
  for file, name in images:
    if name not in classes:
      raise ValueError(
        f'{file} is of class {name!r}, which {train} has not; {suggestion(name, classes)}'
      )
  return classes


def _labelled(part: Path) -> tuple[list[Labelled], list[Path]]:
  """(the images below the folders of classes, the other files there)."""
  found = []
  others = []
  for label in _folders(part):
    images, more = _files(label)
    found += [(file, label.name) for file in images]
    others += more
  return found, others


def _notes(part: Path, found: list[Labelled], others: list[Path]) -> list[str]:
  """Sentences on what lies in a folder of classes and is not read, or not as it may be meant."""
  notes = []
  beside = _images_beside(part)
  if beside:
    notes.append(f'images beside the folders of classes in {part} are left out: {_some(beside)}')
  classes = {name for _, name in found}
  for label in _folders(part):
    if label.name not in classes:
      notes.append(f'{label} has no images and is no class')
  deep = [file for file, name in found if file.parent != part / name]
  if deep:
    name = deep[0].relative_to(part).parts[0]
    notes.append(f'images in folders below those of classes count to these: {_some(deep, name)}')
  if others:
    notes.append(
      f'files in the folders of classes of {part} are left out, being hidden or of no suffix of an '
      f'image: {_some(others)}'
    )
  return notes


def _some(files: Iterable[Path], name: str = '') -> str:
  """How many files of which suffixes, and the first of them; `name` is the class it counts to."""
  files = sorted(files)
  kinds = collections.Counter(file.suffix or 'no suffix' for file in files)
  listed = ', '.join(f'{count:,} {suffix}' for suffix, count in kinds.most_common(5))
  is_class = f', of class {name!r}' if name else ''
  return f'{listed}, such as {files[0]}{is_class}'


def _folders(path: Path) -> list[Path]:
  return sorted(found for found in path.iterdir() if found.is_dir() and not _hidden(found))


def images_below(path: Path) -> list[Path]:
  """The images below a folder, in order.

  Raises:
    ValueError: there are some of a format that is not read.
  """
  images, _ = _files(path)
  return images


def _files(path: Path) -> tuple[list[Path], list[Path]]:
  """(the images below a folder, in order; the other files there).

  Raises:
    ValueError: there are some of a format that is not read.
  """
  images = []
  others = []
  for file in sorted(path.rglob('*')):
    suffix = file.suffix.lower()
    if any(part.startswith('.') for part in file.relative_to(path).parts):
      others.append(file)
    elif suffix in UNREAD:
      raise ValueError(
        f'{file} is of a format that is not read; convert the {suffix} files to .jpg'
      )
    elif suffix in SUFFIXES:
      images.append(file)
    else:
      others.append(file)
  return images, [file for file in others if file.is_file()]


def _hidden(path: Path) -> bool:
  return path.name.startswith('.')
