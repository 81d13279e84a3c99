"""Images of one's own: a folder for each class.

    PATH/<class>/*.png                 split by a hash of the relative path: 80 % 'train', 20 % 'test'
    PATH/<split>/<class>/*.png         where there is PATH/train; the folders beside it are splits as well

Classes are the folder names in alphabetical order. Images are mixed by a hash of their path, so
that 'train[:1000]' holds all classes. Hidden files, and files whose suffix is none of an image, are
left out.
"""

from pathlib import Path

from ..decode import decode
from ..source import Dataset, divided, nearest, shuffled

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')


def folder(path: str) -> Dataset:
  """The images under a folder.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no images in it, or a class that 'train' has not; on reading, a file that is no
      image.
  """
  root = Path(path).expanduser()
  if not root.is_dir():
    beside = [p.name for p in _folders(root.parent)] if root.parent.is_dir() else []
    raise FileNotFoundError(f'there is no folder {root}; {nearest(root.name, beside)}')
  train = root / 'train' if (root / 'train').is_dir() else root
  images, splits = [], {}  # (file, class)
  for part in [root] if train == root else _folders(root):
    found = [(file, label.name) for label in _folders(part) for file in _images(label)]
    if found or part == train:
      keys = [file.relative_to(part).as_posix() for file, _ in found]
      rows = divided(keys) if part == root else {part.name: shuffled(keys)}
      splits |= {name: [len(images) + i for i in order] for name, order in rows.items()}
      images += found
  classes = sorted({label for file, label in images if file.is_relative_to(train)})
  if not classes:
    raise ValueError(
      f'no images found in {train}: it needs a folder for each class, with files that end in '
      f'{", ".join(SUFFIXES)}'
    )
  for file, label in images:
    if label not in classes:
      raise ValueError(
        f'{file} is of class {label!r}, which {train} has not; {nearest(label, classes)}'
      )
  labels = {label: i for i, label in enumerate(classes)}

  def read(row: int) -> dict:
    file, label = images[row]
    return {'image': decode(file, str(file)), 'label': labels[label]}

  return Dataset(read, splits, classes)


def _folders(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _images(path: Path) -> list[Path]:
  return sorted(
    p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES and not p.name.startswith('.')
  )
