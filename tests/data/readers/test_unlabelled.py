"""Rows without a label: the same rule in every reader."""

import json
import math

import pytest
from PIL import Image

from jpeft import data
from jpeft.data.readers.unlabelled import Unlabelled

MISSING = (None, '', ' ', math.nan, 'nan', 'NaN', -1, '-1')


def test_what_is_no_label():
  rule = Unlabelled(None, 'label')
  assert all(rule.missing(label) for label in MISSING)
  assert not any(rule.missing(label) for label in (0, '0', -2, 'no', 'nano', 'None', False))
  as_class = Unlabelled('class', 'label')
  assert [label for label in MISSING if not as_class.missing(label)] == ['nan', 'NaN', -1, '-1']
  with pytest.raises(ValueError, match='unlabelled=skp must be one of refuse, skip, class'):
    Unlabelled('skp', 'label')


def jsonl(folder, labels):
  lines = [json.dumps({'text': f't{i}', 'label': label}) for i, label in enumerate(labels)]
  (folder / 'train.jsonl').write_text('\n'.join(lines))


def csv(folder, labels):
  lines = [f't{i},{label}' for i, label in enumerate(labels)]
  (folder / 'train.csv').write_text('\n'.join(['text,label', *lines]))


def lists(folder, labels):
  Image.new('RGB', (4, 3)).save(folder / 'a.png')
  (folder / 'train.txt').write_text('\n'.join(f'a.png {label}' for label in labels))


@pytest.mark.parametrize(
  ('write', 'labels', 'line'),
  [
    (jsonl, [1, 0, -1], 3),
    (jsonl, [1, None, 0], 2),
    (jsonl, [1, math.nan, 0], 2),
    (jsonl, ['a', '', 'b'], 2),
    (csv, [1, 0, -1], 4),
    (csv, [1, '', 0], 3),
    (csv, [1, 'nan', 0], 3),
    (lists, [1, 0, -1], 3),
    (lists, [1, 'nan', 0], 2),
  ],
)
def test_a_row_without_a_label_is_refused_or_left_out_with_a_word(tmp_path, write, labels, line):
  write(tmp_path, labels)
  name = f'{write.__name__}:{tmp_path}'
  with pytest.raises(ValueError, match=f'line {line} of .*train.* say unlabelled=skip'):
    data.load(name, 'train')
  kept = data.load(f'{name}?unlabelled=skip', 'train')
  assert len(kept) == 2 and len(kept.classes) == 2
  (note,) = kept.notes
  assert f'1 rows without a label are left out, the first is line {line} of ' in note


@pytest.mark.parametrize('write', [jsonl, csv, lists])
def test_a_split_without_labels_is_left_out(tmp_path, write):
  write(tmp_path, [-1, -1])
  train = next(tmp_path.glob('train.*'))
  train.rename(train.with_stem('test'))
  write(tmp_path, [1, 0])
  assert len(data.load(f'{write.__name__}:{tmp_path}', 'train')) == 2
  with pytest.raises(ValueError, match="no split 'test': .*test.* has no labels: all its 'label'"):
    data.load(f'{write.__name__}:{tmp_path}', 'test')


def test_minus_one_may_be_a_class(tmp_path):
  jsonl(tmp_path, [-1, 1, 0, -1])
  source = data.load(f'jsonl:{tmp_path}?unlabelled=class', 'train')
  assert source.classes == ['-1', '0', '1'] and len(source) == 4
  (tmp_path / 'train.jsonl').write_text('{"text": "a", "label": -1}')
  with pytest.raises(ValueError, match=r'nothing to learn: .*train\.jsonl has no labels'):
    data.load(f'jsonl:{tmp_path}', 'train')


def test_notes_reach_who_trains(tmp_path):
  from jpeft.tasks.classification import Numbered

  csv(tmp_path, [1, '', 0])
  source = data.load(f'csv:{tmp_path}?unlabelled=skip', 'train')
  assert Numbered(source).about == source.notes[0]
