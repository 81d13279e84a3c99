"""Images of one's own: a folder for each class.

    PATH/<class>/*.png            images that are divided: 80 % 'train', 20 % 'test'
    PATH/<split>/<class>/*.png    where there is PATH/train; the folders beside it are splits too

Classes are the folder names in alphabetical order. Images are divided and mixed by a hash of their
relative path, so that 'train[:1000]' has all classes in it. Hidden files, and files whose suffix is
none of an image, are left out. Empty files are refused, and images in formats that Pillow does not
read. In folders of up to 20,000 images the beginning of each is read at once, so that a file that
is no image is told before training; one that is cut off is told when it is read.
"""

from pathlib import Path

from ..decode import check_files, decode
from ..source import Dataset, Example, split_rows, suggestion

Labelled = tuple[Path, str]  # an image file, its class
SUFFIXES = (
  *('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.avif', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm'),
)
# Images all the same: without a word a class would lose them.
UNREAD = ('.heic', '.heif', '.jxl', '.dng', '.cr2', '.nef', '.arw', '.svg', '.dcm')


def folder(path: str) -> Dataset:
  """The images under a folder.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no images in it, a class that 'train' has not, images that are empty or of UNREAD;
      a file that is no image, on reading if not before.
  """
  root = Path(path).expanduser()
  if not root.is_dir():
    beside = []
    if root.parent.is_dir():
      beside = [found.name for found in _folders(root.parent)]
    raise FileNotFoundError(f'there is no folder {root}; {suggestion(root.name, beside)}')
  train = root
  parts = {'': root}
  if (root / 'train').is_dir():
    train = root / 'train'
    parts = {part.name: part for part in _folders(root)}

  images: list[Labelled] = []
  keys = {}
  for split, part in parts.items():
    found = _labelled(part)
    if found or part == train:  # a folder of something else is no split
      keys[split] = [file.relative_to(part).as_posix() for file, _ in found]
      images += found

  classes = _classes(images, train)
  check_files([file for file, _ in images])
  labels = {name: label for label, name in enumerate(classes)}

  def read(row: int) -> Example:
    file, name = images[row]
    return {'image': decode(file, str(file)), 'label': labels[name]}

  def label_of(row: int) -> int:
    return labels[images[row][1]]

  return Dataset(read, split_rows(keys), classes, label_of=label_of)


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


def _labelled(part: Path) -> list[Labelled]:
  """The images below the folders of classes."""
  return [(file, label.name) for label in _folders(part) for file in images_below(label)]


def _folders(path: Path) -> list[Path]:
  return sorted(found for found in path.iterdir() if found.is_dir() and not _hidden(found))


def images_below(path: Path) -> list[Path]:
  """The images below a folder, in order.

  Raises:
    ValueError: there are some of a format that is not read.
  """
  found = []
  for file in sorted(path.rglob('*')):
    suffix = file.suffix.lower()
    if _hidden(file):
      continue
    if suffix in UNREAD:
      raise ValueError(
        f'{file} is of a format that is not read; convert the {suffix} files to .jpg'
      )
    if suffix in SUFFIXES:
      found.append(file)
  return found


def _hidden(path: Path) -> bool:
  return path.name.startswith('.')
