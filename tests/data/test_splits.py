"""The slicing syntax of splits."""

import pytest

from jpeft.data import splits

SIZES = {'train': range(100, 110), 'test': range(200, 203)}


@pytest.mark.parametrize(
  'split, rows',
  [
    ('train', range(100, 110)),
    ('train[:3]', [100, 101, 102]),
    ('train[8:]', [108, 109]),
    ('train[2:4]', [102, 103]),
    ('train[-2:]', [108, 109]),
    ('train[:50%]', range(100, 105)),
    ('train[50%:]', range(105, 110)),
    ('train[-20%:]', [108, 109]),
    ('train[:14%]', [100]),
    ('train[:15%]', [100, 101]),
    ('train[:99]', range(100, 110)),
    ('test[:50%]', [200, 201]),
    ('train[:2]+test[2:]', [100, 101, 202]),
    ('train + test', [*range(100, 110), 200, 201, 202]),
  ],
)
def test_slices(split, rows):
  assert list(splits.rows(split, SIZES, 'digits')) == list(rows)


@pytest.mark.parametrize('percent', range(0, 101, 7))
def test_percents_cut_without_gap_or_overlap(percent):
  splits_ = {'train': range(37)}
  found = [
    i for part in (f'train[:{percent}%]', f'train[{percent}%:]') for i in _rows(part, splits_)
  ]
  assert found == list(range(37))


def _rows(split, sizes):
  return [] if split in ('train[:0%]', 'train[100%:]') else splits.rows(split, sizes, 'digits')


@pytest.mark.parametrize(
  'split, text',
  [
    ('trian', "digits has no split 'trian'; did you mean 'train'?"),
    ('x', "digits has no split 'x'; there is 'train', 'test'"),
    ('train[5]', r"'train\[5\]' is no split; write"),
    ('train[:a]', 'is no split'),
    ('', 'is no split'),
    ('train+', 'is no split'),
    ('train[:101%]', 'more than 100%'),
    (
      'train[5:5]',
      r"split 'train\[5:5\]' of digits has no examples; it has train \(10\), test \(3\)",
    ),
  ],
)
def test_what_is_wrong_is_said(split, text):
  with pytest.raises(ValueError, match=text):
    splits.rows(split, SIZES, 'digits')
