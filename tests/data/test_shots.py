"""A few examples of each class."""

import collections

import numpy as np
import pytest

from jpeft import data

LABELS = np.random.default_rng(0).integers(0, 3, 200)


def source(labels=LABELS, rows=None):
  """A split of `rows` of examples, each its own number."""

  def read(row):
    return {'text': str(row), 'label': int(labels[row])}

  return data.Source(read, range(len(labels)) if rows is None else rows, ['a', 'b', 'c'])


@pytest.mark.parametrize('shots', [1, 4, 16])
def test_a_few_shot_split_has_as_many_of_each_class(shots):
  found = data.few_shots(source(), shots, 0)
  assert len(found) == 3 * shots
  counts = collections.Counter(data.labels_of(found))
  assert counts == {0: shots, 1: shots, 2: shots}
  texts = [found[i]['text'] for i in range(len(found))]
  assert len(set(texts)) == len(texts)
  assert found.notes == (f'{shots} of each class, drawn by seed 0',)


def test_it_is_drawn_by_its_seed_alone():
  rows = [tuple(data.few_shots(source(), 4, seed).rows) for seed in range(5)]
  assert len(set(rows)) == 5
  assert tuple(data.few_shots(source(), 4, 3).rows) == rows[3]
  # Of a part of a split they are examples of that part.
  part = range(50, 150)
  assert set(data.few_shots(source(rows=part), 4, 0).rows) <= set(part)


def test_a_class_with_too_few_examples_is_named():
  labels = np.array([0, 0, 0, 1, 2, 2, 2])
  with pytest.raises(ValueError, match="3 examples of each class .* the split has 1 of 'b'"):
    data.few_shots(source(labels), 3, 0)
