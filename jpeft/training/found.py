"""What the passes before training found, in the folder of a run."""

import dataclasses
import hashlib
import pathlib

import numpy as np
from safetensors.numpy import save

from jpeft import jsonfiles
from jpeft.core import Found
from jpeft.writing import write

from .checkpoints import read_theta

FILE = 'prepared.safetensors'
_KEPT = {'prepared_sha256?': (str, None)}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What the passes of a run found.

  Attributes:
    content: of its file.
    sha256: of that.
  """

  content: bytes
  sha256: str

  @classmethod
  def of(cls, found: Found) -> 'Prepared':
    """What is to be stored of arrays by name."""
    content = save({name: np.asarray(x, order='C') for name, x in found.items()})
    return cls(content, hashlib.sha256(content).hexdigest())

  def save(self, folder: pathlib.Path) -> None:
    """Writes the file into a run folder."""
    write(folder / FILE, self.content)


def kept_in(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
  """What the passes of a run found; None where it has not begun, or needs none.

  Raises:
    ValueError, FileNotFoundError: the file is not the one that the run was begun with.
  """
  run = folder / 'run.json'
  if not run.exists():
    return None
  wanted = jsonfiles.read(run, _KEPT).get('prepared_sha256')
  if wanted is None:
    return None
  file = folder / FILE
  if not file.is_file():
    raise FileNotFoundError(
      f'{folder} has no {FILE}, what its method found before training: put it back'
    )
  with file.open('rb') as opened:
    sha256 = hashlib.file_digest(opened, 'sha256').hexdigest()
  if sha256 != wanted:
    raise ValueError(
      f'{file} is not what the run was begun with: its SHA-256 was {wanted}, and is {sha256} now'
    )
  return read_theta(file)[0]
