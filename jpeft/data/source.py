"""Data sets and their splits, read by number."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.messages import nearest

from .skipped import UNREADABLE

Example = dict[str, Any]  # see `Source.read`
Rows = Sequence[int]
Transform = Callable[[Example, np.random.Generator], Example]


class Dataset(NamedTuple):
  """All splits of a data set.

  Attributes:
    read: row -> example, see `Source`.
    splits: {name: its rows}; no row is in two splits.
    classes: name of each label; none where examples are texts to write.
    unit: name of what the blanks in a completion separate, such as 'word' or 'phoneme'.
    left_out: {split that is there and cannot be used: why}; None for none.
    labels: their kind, see `labels`: 'classes', 'numbers', whose names are `classes`, 'sets',
      'tags', 'answers' or 'nothing'.
    label_of: row -> its label, where that is quicker than `read`; None where it is not.
    notes: sentences for who trains on it, such as what of the files was left out.
  """

  read: Callable[[int], Example]
  splits: dict[str, Rows]
  classes: list[str]
  unit: str = 'word'
  left_out: dict[str, str] | None = None
  labels: str = 'classes'
  label_of: Callable[[int], Any] | None = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """Examples by number. Anything with len, [i] and `classes` can take its place.

  Attributes:
    read: row -> example, a dict with 'label' (int, or float32 [C] of numbers and sets) and 'image'
      (uint8 [H, W, C]) or 'text' (str); or, where there are no labels, with 'prompt' and
      'completion' (str) or with 'messages'. With tags it has 'words' and 'label', a tag for each;
      with answers 'question', 'context' and 'answers', pairs of a text and its first character.
    rows: the rows that are examples of this source, in order.
    classes: name of each label; none where examples are texts to write.
    unit: name of what the blanks in a completion separate, such as 'word' or 'phoneme'.
    label_of: row -> its label, where that is quicker than `read`; None where it is not.
    notes: sentences for who trains on it, such as what of the files was left out.
  """

  read: Callable[[int], Example]
  rows: Rows
  classes: list[str]
  unit: str = 'word'
  label_of: Callable[[int], Any] | None = None
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Example:
    return self.read(self.rows[i])


def in_memory(source: Source, skip: bool = False) -> Source:
  """The source with every example read now and kept, for small sets that are slow to decode.

  Args:
    source: its examples.
    skip: whether one that cannot be read raises only where it is asked for, as it did before.
  """
  examples = []
  for i in range(len(source)):
    try:
      examples.append(source[i])
    except UNREADABLE as error:
      if not skip:
        raise
      examples.append(error)

  def read(row: int) -> Example:
    if isinstance(examples[row], Exception):
      raise examples[row]
    return examples[row]

  return dataclasses.replace(source, read=read, rows=range(len(examples)), label_of=None)


Key = str | bytes | int


def digest(key: Key) -> int:
  """The MD5 of a key as a number, which orders and splits the data alike on every machine.

  A number is a digest already, for keys that are too many to be kept.
  """
  if isinstance(key, int):
    return key
  if isinstance(key, str):
    key = key.encode()
  hashed = hashlib.md5(key, usedforsecurity=False)
  return int(hashed.hexdigest(), 16)


def shuffled(keys: Sequence[Key]) -> list[int]:
  """The numbers of the keys in the order of their digests, which mixes files sorted by class.

  Equal keys stay in their order.
  """
  digests = [digest(key) for key in keys]
  return sorted(range(len(keys)), key=digests.__getitem__)  # stable


def divided(keys: Sequence[Key], tenths: int = 8) -> dict[str, list[int]]:
  """'train' and 'test' of data that come undivided: the numbers of the keys, shuffled.

  The digest of a key modulo 10 decides, so that equal keys are in one split.

  Args:
    keys: one for each example.
    tenths: the part of the keys that is 'train'.
  """
  train = []
  test = []
  for i in shuffled(keys):
    if digest(keys[i]) % 10 < tenths:
      train.append(i)
    else:
      test.append(i)
  return {'train': train, 'test': test}


def split_rows(parts: Mapping[str, Sequence[Key]]) -> dict[str, list[int]]:
  """{split: its rows}, for rows that are numbered through all parts.

  Args:
    parts: {split: a key for each of its examples}. The split '' is divided into 'train' and 'test'.
  """
  splits = {}
  start = 0
  for name, keys in parts.items():
    if name:
      found = {name: shuffled(keys)}
    else:
      found = divided(keys)
    for split, order in found.items():
      splits[split] = [start + i for i in order]
    start += len(keys)
  return splits


def suggestion(word: str, known: Iterable[str]) -> str:
  """'did you mean ...' or, where nothing is near, what there is; for error messages."""
  known = list(known)
  near = nearest(word, known)
  if near is not None:
    return f'did you mean {near!r}?'
  listed = ', '.join(map(repr, known)) or 'nothing'
  return f'there is {listed}'
