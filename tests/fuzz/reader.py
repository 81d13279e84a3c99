"""A reader, valid files for it, and what is made of them."""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

from tests.fuzz import mutations

Files = Mapping[str, bytes]
Folder = pathlib.Path
_CHANGES = {
  '.json': mutations.damaged_json,
  '.jsonl': mutations.damaged_lines,
  '.jinja': mutations.damaged_template,
  '.tar': mutations.damaged_tar,
  '.png': mutations.damaged_image,
}


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader, and valid files for it.

  Attributes:
    name: in tables and for the random numbers of a case.
    read: reads the folder, deep enough that everything in it is looked at.
    kinds: the files of each seed: {file name: content}.
    says: what every message must contain, such as the name of the file.
    fixed: files that are not damaged.
    share: of the cases that others have; less for readers that are slow.
  """

  name: str
  read: Callable[[Folder], Any]
  kinds: Callable[[], list[Files]]
  says: str = ''
  fixed: tuple[str, ...] = ()
  share: float = 1.0

  def files(self) -> Files:
    """The first valid files."""
    return _kinds(self)[0]

  def count(self, cases: int) -> int:
    return max(1, int(cases * self.share))

  def damaged(self, chance: random.Random) -> Files:
    """The files of a seed, one of them damaged."""
    files = dict(chance.choice(_kinds(self)))
    name = chance.choice([name for name in files if name not in self.fixed])
    change = _CHANGES.get(pathlib.Path(name).suffix, mutations.damaged)
    files[name] = change(files[name], chance)
    return files


@functools.cache
def _kinds(reader: Reader) -> list[Files]:
  return reader.kinds()
