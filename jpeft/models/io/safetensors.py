"""Folders of safetensors files, read as data: one file, or shards named by an index."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jpeft import jsonfiles, textfiles, writing
from jpeft.messages import nearest

from .layout import Part

FILE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
PICKLES = (
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
  'model.ckpt.index',
  'tf_model.h5',
  'flax_model.msgpack',
)


class Checkpoint:
  """The tensors of a folder. Headers are read and checked at once, each tensor by `read`.

  Attributes:
    folder: where the files are.
    shapes: {key: shape} of every tensor.
    files: {file name: sha256} of the weight files; computed when first read.

  Raises:
    ValueError: a file is damaged, contradicts the index, or is of a kind that is not read.
    FileNotFoundError: a file is missing.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(folder)
    index = _index(self.folder)
    files = sorted(set(index.values())) or [self.folder / FILE]
    self.shapes = {}
    self._file_of = dict(index)
    for file in files:
      with _open(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118
          # The index decides which file a key is read from, if it is in several.
          if self._file_of.setdefault(key, file) == file:
            self.shapes[key] = tuple(tensors.get_slice(key).get_shape())
    for key, file in index.items():
      if key not in self.shapes:
        raise ValueError(
          f'{self.folder / INDEX}: {key!r} is said to be in {file.name}, which does not hold it'
        )

  def read(self, key: str, part: Part | None = None) -> np.ndarray:
    """One tensor, or a part of it, in the number format of the file; nothing else is read."""
    with _open(self._file_of[key]) as tensors:
      if part is not None:
        return tensors.get_slice(key)[part.index]
      return tensors.get_tensor(key)

  @functools.cached_property
  def files(self) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(set(self._file_of.values()))}


def has_weights(folder: Path) -> bool:
  """Whether a folder has safetensors files."""
  return (folder / FILE).exists() or (folder / INDEX).exists()


def _index(folder: Path) -> dict[str, Path]:
  """{key: file} of a folder with several files; empty for a single file, which needs no index."""
  if (folder / FILE).exists():
    return {}
  if not (folder / INDEX).exists():
    other = [name for name in PICKLES if (folder / name).exists()]
    if other:
      raise ValueError(
        f'{folder} holds {other[0]} but no {FILE}: only safetensors is read, since '
        'unpickling can run code; convert it (save_pretrained of transformers '
        'writes safetensors)'
      )
    raise FileNotFoundError(f'{folder} holds neither {FILE} nor {INDEX}')
  weight_map = jsonfiles.read(folder / INDEX, {'weight_map?': {str: str}}).get('weight_map')
  if not weight_map:
    raise ValueError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
  files = {}
  for key, name in weight_map.items():
    if Path(name).name != name:  # it would lead out of the folder
      raise ValueError(f'{folder / INDEX}: {name!r} for {key!r} is no plain file name')
    files[key] = folder / name
  for name, key in {name: key for key, name in weight_map.items()}.items():
    try:
      textfiles.check_regular(folder / name)
    except FileNotFoundError:
      near = nearest(name, [path.name for path in folder.iterdir()])
      hint = '' if near is None else f'; there is {near}'
      raise FileNotFoundError(
        f'{folder / name} is missing, the index needs it for {key!r}{hint}'
      ) from None
  return files


def _open(file: Path):
  textfiles.check_regular(file)
  try:
    return safetensors.safe_open(file, 'np')
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f'{file} is no readable safetensors file ({error}); it is damaged or was not copied whole'
    ) from error


def write_checkpoint(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping) -> None:
  """Writes model.safetensors and config.json into a folder, which is made if needed."""
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder / FILE, tensors)
  writing.write(folder / 'config.json', json.dumps(config, indent=2, sort_keys=True) + '\n')


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file, which is then either whole or absent."""
  # Not np.ascontiguousarray, which makes vectors of scalars.
  tensors = {key: np.asarray(value, order='C') for key, value in tensors.items()}
  # transformers refuses files without this entry.
  with writing.appearing(file) as part:
    safetensors.numpy.save_file(tensors, part, metadata={'format': 'pt'})


def read_tensors(file: Path) -> dict[str, np.ndarray]:
  """{key: array} of a safetensors file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged.
  """
  if not file.exists():
    raise FileNotFoundError(f'there is no file {file}')
  with _open(file) as tensors:
    return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


read_json = jsonfiles.read


def sha256(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
