"""Fine-grained image sets with the splits that VPT fixed: a JSON file for each split.

    fgvc:PATH       PATH/train.json, PATH/val.json, PATH/test.json

Jia et al., 2022 (arXiv 2203.12119). A file is {path of an image: its class}. Paths are relative to
PATH/images, to PATH/Images or to PATH, whichever of them has the images. Classes are those of all
files, in order. 'train+val' is what papers train on in the end.
"""

from pathlib import Path

from jpeft import jsonfiles

from ..labels import in_order
from ..source import Dataset, suggestion
from .lists import Labelled, check_folder, dataset_of, numbers_of

# {part of the name of a folder: (the set, its classes)}, of those that papers compare.
SETS = {
  'cub': ('CUB-200-2011', 200),
  'nabirds': ('NABirds', 555),
  'flower': ('Oxford Flowers', 102),
  'dog': ('Stanford Dogs', 120),
  'car': ('Stanford Cars', 196),
}
FOLDERS = ('images', 'Images', '')  # of the images


def fgvc(spec: str) -> Dataset:
  """The images of the JSON files in a folder.

  Raises:
    FileNotFoundError: no such folder, or no such image.
    ValueError: no JSON files, or one that is no object of classes; a file that is no image.
  """
  root = Path(spec).expanduser()
  check_folder(root)
  files = sorted(root.glob('*.json'))
  if not files:
    raise ValueError(
      f'no .json files found in {root}: it needs one for each split, such as test.json'
    )
  splits = {file.stem: _labelled(root, file) for file in files}
  said = [found.label for images in splits.values() for found in images]
  classes = in_order(set(said))
  found = dataset_of(splits, numbers_of(said, classes), classes)
  return found._replace(notes=_notes(root, len(classes)))


def _labelled(root: Path, file: Path) -> list[Labelled]:
  """The images of one split, in the order of its file."""
  table = jsonfiles.read(file, {str: (int, str)})
  if not table:
    raise ValueError(f'{file} has no image in it')
  names = list(table)
  folder = _folder(root, file, names[0])
  found = []
  for entry, name in enumerate(names, 1):
    image = folder / name
    if not image.is_file():
      beside = [other.name for other in image.parent.glob('*')][:1000]
      raise FileNotFoundError(
        f'entry {entry} of {file}: there is no file {image}; {suggestion(image.name, beside)}'
      )
    found.append(Labelled(entry, image, str(table[name])))
  return found


def _folder(root: Path, file: Path, name: str) -> Path:
  """What the paths of a file are relative to, by the first of them."""
  for folder in FOLDERS:
    if (root / folder / name).is_file():
      return root / folder
  raise FileNotFoundError(
    f'entry 1 of {file}: there is no file {name!r} in {root}, nor in images or Images there'
  )


def _notes(root: Path, classes: int) -> tuple[str, ...]:
  """A sentence on classes that are not those of the set that the folder is named for."""
  for part, (name, count) in SETS.items():
    if part in root.name.lower() and classes != count:
      return (f'{root} has {classes} classes, and published rows of {name} are of {count}',)
  return ()
