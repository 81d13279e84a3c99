"""Entities that tags of words mark, and how many of them are found.

A tag is O, outside of entities, or a prefix and the entity's type, such as B-PER. The prefixes are
those of the schemes IOB1, IOB2, IOBES and BILOU: B begins an entity, I goes on with it, E or L ends
it, S or U is one of a single word. What they leave open is read as the script conlleval of
CoNLL-2000 reads it, and seqeval by default: an I- that follows O or another type begins an entity.
A tag without a prefix is an entity of one word.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_TAG = re.compile(r'([BIELSU])-(.+)')
_SAME = {'L': 'E', 'U': 'S'}
OUTSIDE = 'O'


class Scheme(NamedTuple):
  """The tags of a data set as tables; number C stands for what is before and after a sentence.

  Attributes:
    types: names of the types of entities, T.
    type_of: int [C + 1], the number of the type of each tag, -1 outside.
    begins: bool [C + 1, C + 1], whether an entity begins at a tag (column) after another (row).
    ends: the same, whether an entity ends at a tag (row) before another (column).
  """

  types: list[str]
  type_of: np.ndarray
  begins: np.ndarray
  ends: np.ndarray


def scheme(tags: Sequence[str]) -> Scheme:
  """The tables of the names of tags."""
  parts = [_parts(tag) for tag in tags] + [(OUTSIDE, '')]
  types = sorted({kind for prefix, kind in parts if prefix != OUTSIDE})
  type_of = [types.index(kind) if prefix != OUTSIDE else -1 for prefix, kind in parts]
  begins = [[_begins(before, tag) for tag in parts] for before in parts]
  ends = [[_ends(tag, after) for after in parts] for tag in parts]
  return Scheme(types, np.array(type_of), np.array(begins), np.array(ends))


def _parts(tag: str) -> tuple[str, str]:
  """(prefix, type)."""
  if tag == OUTSIDE:
    return OUTSIDE, ''
  match = _TAG.fullmatch(tag)
  if match is None:
    return 'S', tag
  return _SAME.get(match[1], match[1]), match[2]


def _begins(before: tuple[str, str], tag: tuple[str, str]) -> bool:
  if tag[0] == OUTSIDE:
    return False
  return tag[0] in 'BS' or before[0] in (OUTSIDE, 'E', 'S') or before[1] != tag[1]


def _ends(tag: tuple[str, str], after: tuple[str, str]) -> bool:
  if tag[0] == OUTSIDE:
    return False
  return tag[0] in 'ES' or after[0] in (OUTSIDE, 'B', 'S') or tag[1] != after[1]


class Entities(NamedTuple):
  """The entities of a sequence of tags, [E] each: first and last word, number of the type."""

  first: np.ndarray
  last: np.ndarray
  kind: np.ndarray


def entities(tags: np.ndarray, table: Scheme) -> Entities:
  """The entities of tags.

  Args:
    tags: [M] integers; C, or the end of the array, ends a sentence.
    table: of the tags.
  """
  outside = len(table.type_of) - 1
  around = np.concatenate([[outside], tags, [outside]])
  first = np.flatnonzero(table.begins[around[:-2], tags])
  ends = np.flatnonzero(table.ends[tags, around[2:]])
  last = ends[np.searchsorted(ends, first)]  # the first end at or after each beginning
  return Entities(first, last, table.type_of[tags[first]])


def counts(labels: np.ndarray, guesses: np.ndarray, table: Scheme) -> np.ndarray:
  """How many entities of each type there are, are guessed, and are both: [T, 3].

  Args:
    labels: [R, N] tags of sentences, negative where there is none.
    guesses: [R, N], read where there is a label.
    table: of the tags.
  """
  outside = len(table.type_of) - 1
  end = np.full((len(labels), 1), outside)  # of each sentence
  known = np.concatenate([labels >= 0, end == outside], 1)
  found = []
  for tags in (labels, guesses):
    flat = np.concatenate([tags, end], 1)[known]
    spans = entities(flat, table)
    found.append(set(zip(*(part.tolist() for part in spans), strict=True)))
  right, guessed = found
  total = np.zeros((len(table.types), 3), int)
  for column, spans in enumerate((right, guessed, right & guessed)):
    for _, _, kind in spans:
      total[kind, column] += 1
  return total


def rates(count: np.ndarray) -> dict[str, float]:
  """f1, precision and recall; what is undefined is 0.

  Args:
    count: [3], how many entities there are, are guessed, and are both: of a type, or of all types.
  """
  there, guessed, hits = map(float, count)
  return {
    'f1': _ratio(2 * hits, there + guessed),
    'precision': _ratio(hits, guessed),
    'recall': _ratio(hits, there),
  }


def _ratio(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
