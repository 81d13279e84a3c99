"""Data sets and their splits, read by number."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jpeft import messages


class Dataset(NamedTuple):
  """All splits of a data set.

  Attributes:
    read: row -> example.
    splits: {name: its rows}; no row is in two splits.
    classes: name of each label; none where examples are texts to write.
    unit: what the parts of a completion between blanks are.
  """

  read: Callable[[int], dict[str, Any]]
  splits: dict[str, Sequence[int]]
  classes: list[str]
  unit: str = 'word'


@dataclasses.dataclass(frozen=True)
class Source:
  """Examples by number; whatever has len, [i] and `classes` can take its place.

  Attributes:
    read: row -> example, a dict with 'label' (int) and 'image' (uint8 [H, W, C]) or 'text' (str);
      or, where there are no labels, with 'prompt' and 'completion' (str) or with 'messages'.
    rows: the rows that are examples of this source, in order.
    classes: name of each label; none where examples are texts to write.
    unit: what the parts of a completion between blanks are.
  """

  read: Callable[[int], dict[str, Any]]
  rows: Sequence[int]
  classes: list[str]
  unit: str = 'word'

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.read(self.rows[i])


def in_memory(source: Source) -> Source:
  """The source with every example read once, now, and kept: for small sets whose decoding costs
  time.
  """
  examples = [source[i] for i in range(len(source))]
  return dataclasses.replace(source, read=examples.__getitem__, rows=range(len(examples)))


def digest(key: str | bytes) -> int:
  """The MD5 of a key as a number: what order and splits hang on, alike on every machine."""
  key = key.encode() if isinstance(key, str) else key
  return int(hashlib.md5(key, usedforsecurity=False).hexdigest(), 16)


def shuffled(keys: Sequence[str]) -> list[int]:
  """The numbers of the keys in the order of their digests, so that files sorted by class are
  mixed.
  """
  return sorted(range(len(keys)), key=lambda i: (digest(keys[i]), i))


def divided(keys: Sequence[str]) -> dict[str, list[int]]:
  """'train' and 'test' of data that come undivided: 80 % train, by digest, so equal keys stay
  together.
  """
  order = shuffled(keys)
  return {
    'train': [i for i in order if digest(keys[i]) % 10 < 8],
    'test': [i for i in order if digest(keys[i]) % 10 >= 8],
  }


def nearest(word: str, known: Iterable[str]) -> str:
  """'did you mean ...' or, where nothing is near, what there is; for error messages."""
  known = list(known)
  near = messages.nearest(word, known)
  if near is not None:
    return f'did you mean {near!r}?'
  return f'there is {", ".join(map(repr, known)) or "nothing"}'
