"""Numbers and sets of classes as labels, in files of all kinds, and images that a table names."""

import json

import numpy as np
import pytest
from PIL import Image

from jpeft import data

BOTH = 'train+test'


def labels_by_text(name, kind):
  source = data.load(name, BOTH, labels=kind)
  told = {example['text']: example['label'].tolist() for example in source}
  for label, example in zip(data.labels_of(source), source, strict=True):
    np.testing.assert_array_equal(label, example['label'])
  return source.classes, told


def test_numbers(tmp_path):
  file = tmp_path / 'a.csv'
  file.write_text('text,score,age\nx,1.5,-3\ny,-2e1,\n')
  assert labels_by_text(f'csv:{file}?label=score', 'numbers') == (
    ['score'],
    {'x': [1.5], 'y': [-20.0]},
  )
  names, found = labels_by_text(f'csv:{file}?label=score,age', 'numbers')
  assert names == ['score', 'age'] and found['x'] == [1.5, -3.0]
  assert found['y'][0] == -20.0 and np.isnan(found['y'][1])
  lines = [{'text': 'x', 'label': 1}, {'text': 'y', 'label': 2.5}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  _, found = labels_by_text(f'jsonl:{tmp_path}/a.jsonl', 'numbers')
  assert found == {'x': [1.0], 'y': [2.5]}


def test_a_name_with_a_comma_may_be_one_column(tmp_path):
  file = tmp_path / 'a.csv'
  file.write_text('text,"price, USD"\nx,5\n')
  assert labels_by_text(f'csv:{file}?label=price, USD', 'numbers') == (['price, USD'], {'x': [5.0]})


def test_sets(tmp_path):
  file = tmp_path / 'a.csv'
  file.write_text('text,topics,red,big\nx,b; a,1,0\ny,,true,-1\nz,b,0,\n')
  names, found = labels_by_text(f'csv:{file}?label=topics&labels_by=%3B', 'sets')
  assert names == ['a', 'b'] and found == {'x': [1.0, 1.0], 'y': [0.0, 0.0], 'z': [0.0, 1.0]}
  names, found = labels_by_text(f'csv:{file}?label=red,big', 'sets')
  assert names == ['red', 'big'] and found['x'] == [1.0, 0.0] and found['z'][0] == 0.0
  assert found['y'][0] == 1.0 and np.isnan(found['y'][1]) and np.isnan(found['z'][1])
  lines = [{'text': 'x', 'label': [10, 9]}, {'text': 'y', 'label': []}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  names, found = labels_by_text(f'jsonl:{tmp_path}/a.jsonl', 'sets')
  assert names == ['9', '10'] and found == {'x': [1.0, 1.0], 'y': [0.0, 0.0]}


def pictures(folder):
  (folder / 'pics').mkdir()
  for i in range(4):
    Image.fromarray(np.full((2, 3, 3), 10 * i, np.uint8)).save(folder / f'pics/{i}.png')


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
def test_images_that_a_table_names(tmp_path, monkeypatch, kind):
  pictures(tmp_path)
  rows = [{'file': f'pics/{i}.png', 'label': i % 2} for i in range(4)]
  lines = [json.dumps(row) for row in rows]
  if kind == 'csv':
    lines = ['file,label', *(f'{row["file"]},{row["label"]}' for row in rows)]
  (tmp_path / f'a.{kind}').write_text('\n'.join(lines))
  monkeypatch.chdir('/')  # paths are relative to the file
  source = data.load(f'{kind}:{tmp_path}/a.{kind}?image=file', BOTH)
  assert source.classes == ['0', '1']
  found = {int(example['image'][0, 0, 0]): example['label'] for example in source}
  assert found == {0: 0, 10: 1, 20: 0, 30: 1}
  numbers = data.load(f'{kind}:{tmp_path}/a.{kind}?image=file', BOTH, labels='numbers')
  assert numbers.classes == ['label'] and numbers[0]['label'].dtype == np.float32


def test_lists(tmp_path):
  pictures(tmp_path)
  (tmp_path / 'train.txt').write_text('pics/0.png car,tree\npics/1.png tree\n')
  (tmp_path / 'test.txt').write_text('pics/2.png cow\n')
  source = data.load(f'lists:{tmp_path}', 'train', labels='sets')
  assert source.classes == ['car', 'cow', 'tree']
  assert [example['label'].tolist() for example in source] == [[1, 0, 1], [0, 0, 1]]
  (tmp_path / 'train.txt').write_text('pics/0.png 0.5,7\npics/1.png 1,-8\n')
  (tmp_path / 'test.txt').write_text('pics/2.png 1,2\n')
  source = data.load(f'lists:{tmp_path}', 'train', labels='numbers')
  assert source.classes == ['0', '1'] and data.labels_of(source)[1].tolist() == [1.0, -8.0]


@pytest.mark.parametrize(
  ('kind', 'label', 'message'),
  [
    ('numbers', 'red', "line 1 of .*train.txt has 'red' as its label; it must be a number, or sev"),
    ('sets', 'a,,b', "line 1 of .*train.txt has 'a,,b' as its label; it must be classes with com"),
    ('numbers', '1,2\npics/1.png 3', 'have 1 numbers in one line and 2 in another'),
  ],
)
def test_mistakes_in_lists(tmp_path, kind, label, message):
  pictures(tmp_path)
  (tmp_path / 'train.txt').write_text(f'pics/0.png {label}\n')
  with pytest.raises(ValueError, match=message):
    data.load(f'lists:{tmp_path}', 'train', labels=kind)


def test_classes_that_are_numbers(tmp_path):
  for age in ('31', '4'):
    (tmp_path / 'train' / age).mkdir(parents=True)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / 'train' / age / 'a.png')
  source = data.load(f'folder:{tmp_path}', 'train', labels='numbers')
  assert sorted(x[0] for x in data.labels_of(source)) == [4.0, 31.0]
  assert {example['label'][0] for example in source} == {4.0, 31.0}
  with pytest.raises(ValueError, match='has one class each as labels, not sets of classes: set'):
    data.load(f'folder:{tmp_path}', 'train', labels='sets')
  (tmp_path / 'train' / '4').rename(tmp_path / 'train' / 'four')
  with pytest.raises(ValueError, match="has the class 'four', which is no number: to predict cla"):
    data.load(f'folder:{tmp_path}', 'train', labels='numbers')


@pytest.mark.parametrize(
  ('kind', 'options', 'text', 'message'),
  [
    (
      'numbers',
      '',
      'text,label\nx,1\ny,abc\n',
      "line 3 of .*a.csv has 'abc' as its 'label'; it mu",
    ),
    ('numbers', '', 'text,label\nx,inf\n', "has 'inf' as its 'label'; it must be a number"),
    ('numbers', '', 'text,label\nx,1e39\n', "has '1e39' as its 'label'; it must be a number"),
    ('numbers', '', 'text,label\nx,"1,5"\n', "has '1,5' as its 'label'; it must be a number"),
    ('numbers', '', 'text,label\nx,\n', 'line 2 of .* has no label: label are empty'),
    ('numbers', '?label=a,b', 'text,a\nx,1\n', "line 2 of .* has no column 'b'"),
    ('numbers', '?labels_by=;', 'text,label\nx,1\n', r'labels_by=; separates the classes that one'),
    ('classes', '?labels_by=;', 'text,label\nx,1\n', r"config.task='multilabel'\): leave it out"),
    (
      'sets',
      '',
      'text,label\nx,a\n',
      'it must be a list; in a text say what separates its classes',
    ),
    ('sets', '?label=a,b', 'text,a,b\nx,1,2\n', "has '2' as its 'b'; it must be 1 or 0, or -1"),
    ('sets', '?label=a,b', 'text,a,b\nx,,\n', 'line 2 of .* has no label: a, b are empty'),
    ('classes', '?image=file', 'file,label\nno.png,1\n', 'line 2 of .*: there is no file .*no.png'),
    ('classes', '?image=file&text=t', 'file,t,label\nno.png,x,1\n', 'leave out image or text'),
  ],
)
def test_mistakes_are_named(tmp_path, kind, options, text, message):
  (tmp_path / 'a.csv').write_text(text)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    data.load(f'csv:{tmp_path}/a.csv{options}', BOTH, labels=kind)


def test_a_list_of_1_and_0_is_no_list_of_classes(tmp_path):
  file = tmp_path / 'a.jsonl'
  file.write_text(json.dumps({'text': 'x', 'label': [0, 1, 0]}))
  with pytest.raises(
    ValueError, match=r'line 1 of .* a list of classes, and not a 1 or 0 for each'
  ):
    data.load(f'jsonl:{file}', BOTH, labels='sets')
