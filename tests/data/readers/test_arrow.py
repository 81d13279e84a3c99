"""Parquet and Arrow files: columns, splits, and how little is read."""

import decimal
import importlib
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from jpeft import data
from tests.data.resuming import check_goes_on

pa = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def png(value):
  file = io.BytesIO()
  Image.new('RGB', (5, 3), (value, 0, 0)).save(file, 'png')
  return file.getvalue()


def write(file, table, rows=2):
  """A table as a file of the kind of its suffix, `rows` rows a group."""
  file.parent.mkdir(parents=True, exist_ok=True)
  if file.suffix == '.parquet':
    parquet.write_table(table, file, row_group_size=rows)
    return
  make = pa.ipc.new_stream if file.stem.endswith('stream') else pa.ipc.new_file
  with pa.OSFile(str(file), 'wb') as sink, make(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=rows)


def texts(first, last):
  numbers = range(first, last)
  return pa.table(
    {
      'sentence': [f't{i}' for i in numbers],
      'id': list(numbers),
      'label': [i % 3 for i in numbers],
    }
  )


KINDS = pytest.mark.parametrize('kind', ['parquet', 'arrow'])


@KINDS
def test_texts_of_an_undivided_file(tmp_path, kind):
  file = tmp_path / f'a.{kind}'
  write(file, texts(0, 50))
  train, test = (data.load(f'{kind}:{file}', split) for split in ('train', 'test'))
  assert 32 < len(train) < 48 and train.classes == ['0', '1', '2']
  assert {e['text']: e['label'] for e in [*train, *test]} == {f't{i}': i % 3 for i in range(50)}
  # Texts are divided as those of a CSV file are.
  csv = tmp_path / 'a.csv'
  csv.write_text('\n'.join(['text,label', *(f't{i},{i % 3}' for i in range(50))]))
  assert list(data.load(f'csv:{csv}', 'train')) == list(train)


@KINDS
def test_splits_in_several_files(tmp_path, kind):
  write(tmp_path / f'train-00000-of-00002.{kind}', texts(0, 5))
  write(tmp_path / f'train-00001-of-00002.{kind}', texts(5, 12))
  write(tmp_path / f'test.{kind}', texts(12, 15))
  name = f'{kind}:{tmp_path}'
  assert sorted(int(e['text'][1:]) for e in data.load(name, 'train')) == list(range(12))
  assert {e['text']: e['label'] for e in data.load(name, 'test')} == {'t12': 0, 't13': 1, 't14': 2}
  assert [e['text'] for e in data.load(name, 'train')] != [f't{i}' for i in range(12)]  # mixed
  pattern = f'{kind}:{tmp_path}/train-{{00000..00001}}-of-00002.{kind}'
  assert len(data.load(pattern, 'train+test')) == 12
  (tmp_path / f'train-00001-of-00002.{kind}').unlink()
  with pytest.raises(FileNotFoundError, match="has 1 of the 2 files of 'train'"):
    data.load(name, 'train')
  with pytest.raises(FileNotFoundError, match=f'there is no file .*train-00001-of-00002.{kind}'):
    data.load(pattern, 'train')


def test_splits_in_folders_and_streams(tmp_path):
  write(tmp_path / 'a' / 'train' / 'data-00000-of-00001.arrow', texts(0, 3))
  write(tmp_path / 'a' / 'dev' / 'stream.arrow', texts(3, 5))
  found = {split: data.load(f'arrow:{tmp_path}', split) for split in ('train', 'dev')}
  assert sorted(e['text'] for e in found['train']) == ['t0', 't1', 't2']
  assert sorted(e['text'] for e in found['dev']) == ['t3', 't4']


@KINDS
def test_images_with_the_classes_that_datasets_notes(tmp_path, kind):
  features = {'picture': {'_type': 'Image'}, 'y': {'_type': 'ClassLabel', 'names': ['owl', 'cat']}}
  stored = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
  schema = pa.schema(
    [('picture', stored), ('y', pa.int64()), ('file_name', pa.string())],
    {'huggingface': json.dumps({'info': {'features': features}})},
  )
  rows = [{'picture': {'bytes': png(i)}, 'y': i % 2, 'file_name': 'f'} for i in range(10)]
  write(tmp_path / f'train.{kind}', pa.Table.from_pylist(rows, schema))
  source = data.load(f'{kind}:{tmp_path}', 'train')
  assert source.classes == ['owl', 'cat']
  assert sorted((int(e['image'][0, 0, 0]), e['label']) for e in source) == [
    (i, i % 2) for i in range(10)
  ]
  assert source[0]['image'].shape == (3, 5, 3) and source[0]['image'].dtype == np.uint8


@KINDS
def test_plain_bytes_are_images_if_they_are_named(tmp_path, kind):
  table = pa.table({'file': [png(7), b'no image'], 'label': ['a', 'b']})
  write(tmp_path / f'a.{kind}', table)
  source = data.load(f'{kind}:{tmp_path / "a"}.{kind}?image=file', 'train+test')
  assert source.classes == ['a', 'b']
  with pytest.raises(ValueError, match=rf'the image of row 1 of .*a\.{kind} is no readable image'):
    list(source)


@KINDS
def test_chats_and_completions(tmp_path, kind):
  call = {'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}
  calls = {'role': 'assistant', 'content': None, 'tool_calls': [call]}
  chats = [
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}],
    [{'role': 'user', 'content': 'c'}, calls],
  ]
  write(tmp_path / 'chats' / f'train.{kind}', pa.table({'messages': chats, 'source': ['x', 'y']}))
  found = list(data.load(f'{kind}:{tmp_path}/chats', 'train'))
  # What a message lacks is no entry of it, as in JSON lines.
  assert {'messages': chats[0]} in found
  assert {'messages': [chats[1][0], calls | {'content': ''}]} in found
  pairs = pa.table({'question': ['2 + 2'], 'answer': ['4'], 'prompt_id': ['x']})
  write(tmp_path / 'pairs' / f'train.{kind}', pairs)
  name = f'{kind}:{tmp_path}/pairs?prompt=question&completion=answer'
  assert list(data.load(name, 'train')) == [{'prompt': '2 + 2', 'completion': '4'}]
  assert data.load(name, 'train').classes == []


@KINDS
def test_rows_without_a_label(tmp_path, kind):
  write(tmp_path / f'train.{kind}', pa.table({'text': list('abcd'), 'label': [1, -1, None, 0]}))
  write(tmp_path / f'test.{kind}', pa.table({'text': ['a'], 'label': [-1]}))
  write(tmp_path / f'more.{kind}', pa.table({'text': ['a']}))
  name = f'{kind}:{tmp_path}'
  with pytest.raises(ValueError, match=rf'row 1 of .*train\.{kind} has .-1. as its .label'):
    data.load(name, 'train')
  kept = data.load(f'{name}?unlabelled=skip', 'train')
  assert {e['text']: e['label'] for e in kept} == {'a': 1, 'd': 0} and '2 rows' in kept.notes[0]
  with pytest.raises(ValueError, match="no split 'test': .*has no labels"):
    data.load(f'{name}?unlabelled=skip', 'test')
  with pytest.raises(ValueError, match=rf"no split 'more': .*more\.{kind} has no column 'label'"):
    data.load(f'{name}?unlabelled=skip', 'more')
  # NumPy and pandas make floats of integers with gaps.
  write(tmp_path / f'train.{kind}', pa.table({'text': list('abc'), 'label': [2.0, np.nan, 10.0]}))
  assert data.load(f'{name}?unlabelled=skip', 'train').classes == ['2', '10']


@pytest.mark.parametrize(
  ('columns', 'options', 'said'),
  [
    (
      {'a': ['x'], 'b': ['y'], 'label': [0]},
      '',
      r"which column is the text of texts\? .*there is 'a' \(string\), 'b' \(string\), 'label'",
    ),
    ({'text': ['x'], 'y': [0]}, '', 'which column is the label of texts'),
    ({'text': ['x'], 'y': [0]}, '?label=z', "has no column 'z'; there is 'text', 'y'"),
    ({'text': ['x'], 'y': [[0]]}, '?label=y', "'y' is a column of list.*, and cannot be the label"),
    ({'text': ['x'], 'label': [0]}, '?text=text&prompt=text', 'are not of one kind of examples'),
    ({'text': ['x'], 'label': [0]}, '?txt=text', "unknown option 'txt'; did you mean 'text'"),
    ({'text': ['x'], 'label': [0.5]}, '', 'row 0 of .* the label 0.5; .*to learn numbers, set'),
    ({'text': ['x', None], 'label': [0, 1]}, '', "row 1 of .* has None as its 'text'"),
    (
      {'text': ['x'], 'label': [0], 'prompt': ['a'], 'completion': ['b']},
      '',
      'its columns may be read as texts or as completions',
    ),
    ({'messages': [[{'role': 'user', 'content': 'a'}]]}, '', "row 0 .*: no message of 'assistant'"),
  ],
)
@KINDS
def test_what_is_wrong_is_said(tmp_path, kind, columns, options, said):
  write(tmp_path / f'a.{kind}', pa.table(columns))
  with pytest.raises(ValueError, match=said):
    data.load(f'{kind}:{tmp_path / "a"}.{kind}{options}', 'train')


@KINDS
def test_files_that_are_not_what_they_are_called(tmp_path, kind):
  (tmp_path / f'a.{kind}').write_bytes(b'text,label\n')
  with pytest.raises(ValueError, match=rf'a\.{kind} is no {kind.title()} file'):
    data.load(f'{kind}:{tmp_path}', 'train')
  with pytest.raises(FileNotFoundError, match=rf'there is no file .*b\.{kind}; did you mean'):
    data.load(f'{kind}:{tmp_path}/b.{kind}', 'train')
  (tmp_path / f'a.{kind}').unlink()
  with pytest.raises(ValueError, match=rf'no \.{kind} files found in'):
    data.load(f'{kind}:{tmp_path}', 'train')


@KINDS
def test_other_classes_in_another_file_and_the_index_of_pandas(tmp_path, kind):
  def noted(*names):
    features = {'y': {'_type': 'ClassLabel', 'names': names}}
    table = pa.table({'t': ['a'], 'y': [0], '__index_level_0__': ['x']})
    return table.replace_schema_metadata(
      {'huggingface': json.dumps({'info': {'features': features}})}
    )

  write(tmp_path / f'train.{kind}', noted('no', 'yes'))
  write(tmp_path / f'test.{kind}', noted('no', 'yes'))
  source = data.load(f'{kind}:{tmp_path}', 'test')
  assert list(source) == [{'text': 'a', 'label': 0}] and source.classes == ['no', 'yes']
  write(tmp_path / f'test.{kind}', noted('yes', 'no'))
  with pytest.raises(ValueError, match="the classes of 'y' are .* in other files"):
    data.load(f'{kind}:{tmp_path}', 'train')
  for split in ('train', 'test'):
    write(tmp_path / f'{split}.{kind}', noted())
  assert data.load(f'{kind}:{tmp_path}?label=y', 'train').classes == ['0']


@KINDS
def test_texts_that_are_no_utf8_are_named(tmp_path, kind):
  text = pa.array([b'a', b'b', b'c\xff']).view(pa.string())
  write(tmp_path / f'train.{kind}', pa.table({'text': text, 'label': [0, 1, 1]}))
  source = data.load(f'{kind}:{tmp_path}', 'train')
  said = rf'row 2 of .*train\.{kind} is not UTF-8 text \(unexpected end of data|invalid start byte'
  with pytest.raises(ValueError, match=said):
    list(source)
  with pytest.raises(ValueError, match=said):  # divided by what the texts say
    data.load(f'{kind}:{tmp_path}/train.{kind}', 'train')


# ---- Labels of other kinds.


def noted(table, **features):
  """A table with what `datasets` notes of some of its columns."""
  text = json.dumps({'info': {'features': features}})
  return table.replace_schema_metadata({'huggingface': text})


def class_label(*names):
  return {'_type': 'ClassLabel', 'names': names}


def everything(name, labels):
  return data.load(name, 'train+test', labels=labels)


def by_text(name, labels):
  """(classes, {text: its label}) of an undivided source, whose labels are known by row as well."""
  source = everything(name, labels)
  for label, example in zip(data.labels_of(source), source, strict=True):
    np.testing.assert_array_equal(label, example['label'])
    assert example['label'].dtype == np.float32
  return source.classes, {example['text']: example['label'].tolist() for example in source}


@KINDS
def test_numbers(tmp_path, kind):
  columns = {
    'text': ['x', 'y'],
    'score': [1.5, -2.0],
    'price, USD': pa.array([decimal.Decimal('2.25'), decimal.Decimal('-3')], pa.decimal128(5, 2)),
    'age': [-1, None],
    'half': pa.array(np.array([0.5, np.nan], np.float16)),
    'written': ['7', '1e2'],
    'stars': [0, -1],
  }
  table = noted(pa.table(columns), stars=class_label('10', '2.5'))
  write(tmp_path / f'a.{kind}', table)
  name = f'{kind}:{tmp_path}/a.{kind}?text=text&label='
  assert by_text(f'{name}score', 'numbers') == (['score'], {'x': [1.5], 'y': [-2.0]})
  assert by_text(f'{name}price, USD', 'numbers')[1] == {'x': [2.25], 'y': [-3.0]}
  assert by_text(f'{name}written', 'numbers')[1] == {'x': [7.0], 'y': [100.0]}
  names, found = by_text(f'{name}score,age,half,stars', 'numbers')
  assert names == ['score', 'age', 'half', 'stars'] and found['x'] == [1.5, -1.0, 0.5, 10.0]
  np.testing.assert_array_equal(found['y'], [-2.0, np.nan, np.nan, np.nan])


@pytest.mark.parametrize(
  ('column', 'found'),
  [
    ({'labels': [3, 4], 'weight': [0.5, 0.5]}, [3.0, 4.0]),
    ({'score': [0.5, 0.25], 'id': [1, 2]}, [0.5, 0.25]),
  ],
)
def test_the_column_of_numbers_is_found(tmp_path, column, found):
  write(tmp_path / 'a.arrow', pa.table({'text': ['x', 'y'], **column}))
  _, labels = by_text(f'arrow:{tmp_path}/a.arrow', 'numbers')
  assert labels == {'x': [found[0]], 'y': [found[1]]}


@KINDS
def test_splits_without_numbers_are_left_out(tmp_path, kind):
  write(tmp_path / f'train.{kind}', pa.table({'text': ['a', 'b'], 'label': [-1.0, 5.0]}))
  write(tmp_path / f'test.{kind}', pa.table({'text': ['a', 'b'], 'label': [-1.0, -1.0]}))
  write(tmp_path / f'gone.{kind}', pa.table({'text': ['a'], 'label': [np.nan]}))
  write(tmp_path / f'more.{kind}', pa.table({'text': ['a']}))
  name = f'{kind}:{tmp_path}'
  source = data.load(name, 'train', labels='numbers')
  assert {e['text']: e['label'][0] for e in source} == {'a': -1.0, 'b': 5.0}
  for split in ('test', 'gone'):
    with pytest.raises(
      ValueError, match=f"no split '{split}': .* has no labels: all its label are"
    ):
      data.load(name, split, labels='numbers')
  with pytest.raises(ValueError, match=f"no split 'more': .*more.{kind} has no column 'label'"):
    data.load(name, 'more', labels='numbers')


LISTS = {
  'names': (pa.array([['b', 'a'], []]), None),
  'integers': (pa.array([[10, 9], []]), None),
  'classes': (pa.array([[1, 0], []]), {'_type': 'List', 'feature': class_label('b', 'a', 'none')}),
  'older': (pa.array([[1, 0], []]), {'_type': 'Sequence', 'feature': class_label('b', 'a')}),
  'oldest': (pa.array([[1, 0], []]), [class_label('b', 'a')]),
}


@pytest.mark.parametrize(
  ('column', 'classes'),
  [
    ('names', ['a', 'b']),
    ('integers', ['9', '10']),
    ('classes', ['b', 'a', 'none']),
    ('older', ['b', 'a']),
    ('oldest', ['b', 'a']),
  ],
)
@KINDS
def test_sets_in_a_list(tmp_path, kind, column, classes):
  array, feature = LISTS[column]
  table = noted(pa.table({'text': ['x', 'y'], 'topics': array}), topics=feature)
  write(tmp_path / f'a.{kind}', table)
  names, found = by_text(f'{kind}:{tmp_path}/a.{kind}?label=topics', 'sets')
  absent = [0.0] * len(classes)
  assert names == classes and found == {'x': [1.0, 1.0, *absent[2:]], 'y': absent}


@KINDS
def test_sets_in_several_columns(tmp_path, kind):
  columns = {
    'text': ['x', 'y', 'z'],
    'rude': [True, False, None],
    'long': [1, -1, 0],
    'late': [0.0, 1.0, np.nan],
    'seen': [1, 0, -1],
  }
  write(tmp_path / f'a.{kind}', noted(pa.table(columns), seen=class_label('false', 'true')))
  names, found = by_text(f'{kind}:{tmp_path}/a.{kind}?label=rude,long,late,seen', 'sets')
  assert names == ['rude', 'long', 'late', 'seen'] and found['x'] == [1.0, 1.0, 0.0, 1.0]
  np.testing.assert_array_equal(found['y'], [0.0, np.nan, 1.0, 0.0])
  np.testing.assert_array_equal(found['z'], [np.nan, 0.0, np.nan, np.nan])


@KINDS
def test_images_with_numbers_and_sets(tmp_path, kind):
  table = pa.table(
    {
      'file': [png(i) for i in range(6)],
      'x': [i / 2 for i in range(6)],
      'tags': [['odd', 'all'] if i % 2 else ['all'] for i in range(6)],
    }
  )
  write(tmp_path / f'a.{kind}', table)
  name = f'{kind}:{tmp_path}/a.{kind}?image=file&label='
  numbers = everything(f'{name}x', 'numbers')
  assert {int(e['image'][0, 0, 0]): e['label'].tolist() for e in numbers} == {
    i: [i / 2] for i in range(6)
  }
  sets = everything(f'{name}tags', 'sets')
  assert sets.classes == ['all', 'odd']
  assert all(e['label'].tolist() == [1, int(e['image'][0, 0, 0]) % 2] for e in sets)


NER = {'_type': 'List', 'feature': class_label('O', 'B-PER', 'B-ORG')}


@pytest.mark.parametrize(
  ('tags', 'feature', 'option', 'classes'),
  [
    ([[1, 0], [0]], NER, '', ['O', 'B-PER', 'B-ORG']),
    ([[1, 0], [0]], None, '?tags=ner_tags&names=O,B-PER', ['O', 'B-PER']),
    ([[1, 0], [0]], None, '', ['0', '1']),
    ([['B-PER', 'O'], ['O']], None, '', ['O', 'B-PER']),
  ],
)
@KINDS
def test_tags(tmp_path, kind, tags, feature, option, classes):
  table = pa.table({'tokens': [['Jane', 'runs'], ['x']], 'ner_tags': tags, 'id': ['0', '1']})
  write(tmp_path / f'train.{kind}', noted(table, ner_tags=feature))
  source = data.load(f'{kind}:{tmp_path}{option}', 'train', labels='tags')
  found = sorted(source, key=lambda example: example['words'])
  assert found == [
    {'words': ['Jane', 'runs'], 'label': [1, 0]},
    {'words': ['x'], 'label': [0]},
  ]
  assert source.classes == classes
  # Undivided sentences are divided as those of other files are.
  lines = [json.dumps({'tokens': [f'w{i}'], 'tags': ['O']}) for i in range(30)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  write(
    tmp_path / f'b.{kind}',
    pa.table({'words': [[f'w{i}'] for i in range(30)], 'tags': [['O']] * 30}),
  )
  for split in ('train', 'test'):
    other = data.load(f'jsonl:{tmp_path}/a.jsonl', split, labels='tags')
    assert list(data.load(f'{kind}:{tmp_path}/b.{kind}', split, labels='tags')) == list(other)


CONTEXT = 'Jane runs to Rome.'
STRUCT_OF_LISTS = [
  {'text': ['Jane', 'Jane runs'], 'answer_start': [0, 0]},
  {'text': [], 'answer_start': []},
]
LIST_OF_STRUCTS = [
  [{'text': 'Jane', 'answer_start': 0}, {'text': 'Jane runs', 'answer_start': 0}],
  [],
]


@pytest.mark.parametrize('answers', [STRUCT_OF_LISTS, LIST_OF_STRUCTS])
@KINDS
def test_answers(tmp_path, kind, answers):
  columns = {
    'id': ['a', 'b'],
    'title': ['t', 't'],
    'question': ['Who?', 'Why?'],
    'context': [CONTEXT] * 2,
    'answers': answers,
  }
  write(tmp_path / f'a.{kind}', pa.table(columns))
  found = list(everything(f'{kind}:{tmp_path}/a.{kind}', 'answers'))
  assert found == [
    {'question': 'Who?', 'context': CONTEXT, 'answers': [('Jane', 0), ('Jane runs', 0)]},
    {'question': 'Why?', 'context': CONTEXT, 'answers': []},
  ]
  table = pa.table(columns).rename_columns(['id', 'title', 'q', 'c', 'replies'])
  write(tmp_path / f'a.{kind}', table)
  name = f'{kind}:{tmp_path}/a.{kind}?question=q&context=c'
  assert list(everything(name, 'answers')) == found
  # Undivided questions are divided by their context, as those of JSON lines are.
  rows = [
    {'question': f'q{i}', 'context': f'c{i % 12}', 'answers': {'text': ['c'], 'answer_start': [0]}}
    for i in range(36)
  ]
  (tmp_path / 'b.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  write(tmp_path / f'b.{kind}', pa.Table.from_pylist(rows))
  for split in ('train', 'test'):
    other = data.load(f'jsonl:{tmp_path}/b.jsonl', split, labels='answers')
    assert list(data.load(f'{kind}:{tmp_path}/b.{kind}', split, labels='answers')) == list(other)


@KINDS
def test_texts_alone(tmp_path, kind):
  write(tmp_path / f'a.{kind}', pa.table({'body': ['x', 'y'], 'score': [1, 2]}))
  source = everything(f'{kind}:{tmp_path}/a.{kind}', 'nothing')
  assert sorted(source, key=lambda example: example['text']) == [{'text': 'x'}, {'text': 'y'}]
  assert source.classes == []


TEXT = {'text': ['x', 'y']}


@pytest.mark.parametrize(
  ('labels', 'columns', 'options', 'said'),
  [
    ('numbers', {'label': [1, None]}, '', 'row 1 of .* has no label: label are empty'),
    ('numbers', {'label': [1, np.inf]}, '', "row 1 of .* has inf as its 'label'; it must be a num"),
    ('numbers', {'label': [1, 1e39]}, '', 'has 1e.39 as its .label.; it must be a number'),
    (
      'numbers',
      {'label': ['1', 'a']},
      '',
      "row 1 of .* has 'a' as its 'label'; it must be a number",
    ),
    (
      'numbers',
      {'label': [True, False]},
      '?label=label',
      "'label' is a column of bool, .* which is",
    ),
    ('numbers', {'a': [1, 2]}, '?label=a,b', "has no column 'b'; there is 'text', 'a'"),
    (
      'numbers',
      {'label': [[1], [2]]},
      '',
      "which column is the label .*'label' .list<int64>.; .* con",
    ),
    (
      'numbers',
      {'label': [1, 2]},
      '?unlabelled=skip',
      'unlabelled=skip is of rows without a class',
    ),
    (
      'numbers',
      {'label': [1, 2]},
      '?names=a',
      'names= gives names to tags, which config.task=.tok',
    ),
    ('sets', {'label': [[1], None]}, '', "row 1 of .* has no label: its 'label' is null"),
    (
      'sets',
      {'label': [[0, 1, 0], [0, 0, 1]]},
      '',
      'row 0 .* of classes, and not a 1 or 0 for each',
    ),
    ('sets', {'label': [['a'], ['b', None]]}, '', 'it must be a list of texts or integers'),
    (
      'sets',
      {'label': ['a', 'b']},
      '?label=label',
      'cannot be the label, which is a list of classes; or .*these are texts of config.task=.cl',
    ),
    (
      'sets',
      {'a': [1, 2], 'b': [0, 0]},
      '?label=a,b',
      'row 1 of .* has 2 as its .a.; it must be 1 or',
    ),
    ('sets', {'a': [1, None], 'b': [0, None]}, '?label=a,b', 'row 1 of .* has no label: a, b are'),
    ('sets', {'a': [[1], [1]], 'b': [0, 0]}, '?label=a,b', 'which is 1 or 0 in a column of each'),
    (
      'classes',
      {'label': [[1], [2]]},
      '?label=label',
      "these are texts of config.task='multilabel'",
    ),
    (
      'tags',
      {'tokens': [['a'], ['b']], 'ner_tags': [['O'], ['O']], 'pos_tags': [['X'], ['Y']]},
      '',
      r'which column is the tags of sentences\? .*arrow\?tags=COLUMN; .*ner_tags.*pos_tags',
    ),
    (
      'tags',
      {'tokens': [['a'], ['b']], 'tags': [[0], [5]]},
      '?names=O,X',
      'row 1 .* the tag 5 among',
    ),
    (
      'tags',
      {'tokens': [['a'], ['b']], 'tags': [[0], []]},
      '',
      'row 1 .* as its .tags.; it must be a l',
    ),
    ('tags', {'tokens': [['a'], ['b', 'c']], 'tags': [[0], [0]]}, '', 'has 2 words, and 1 tags'),
    (
      'tags',
      {'tokens': [['a'], [None]], 'tags': [[0], [0]]},
      '',
      "row 1 .* 'tokens' is a list of text",
    ),
    (
      'tags',
      {'tokens': [['a']] * 2, 'tags': [[0.5]] * 2},
      '?tags=tags',
      'cannot be the tags; there is',
    ),
    ('tags', {'label': [0, 1]}, '', "these are texts of config.task='classification'"),
    (
      'classes',
      {'tokens': [['a']] * 2, 'tags': [[0]] * 2},
      '',
      "these are sentences of config.task='to",
    ),
    ('answers', {'label': [0, 1]}, '', r'which column is the question of questions\?'),
    ('nothing', {'other': ['a', 'b']}, '?label=text', 'the options label are not of one kind'),
    ('nothing', {'text': ['a', None]}, '', "row 1 of .* has None as its 'text'"),
  ],
)
def test_labels_that_are_wrong(tmp_path, labels, columns, options, said):
  write(tmp_path / 'a.arrow', pa.table(TEXT | columns))
  with pytest.raises(ValueError, match=said):
    list(everything(f'arrow:{tmp_path}/a.arrow{options}', labels))


@pytest.mark.parametrize(
  ('labels', 'column', 'classes'),
  [
    ('classes', [1, 0], ['0', '1']),
    ('numbers', [1.5, 0.5], ['label']),
    ('sets', [['a'], ['b', 'c']], ['a', 'b', 'c']),
  ],
)
@KINDS
def test_splits_whose_column_has_nothing(tmp_path, kind, labels, column, classes):
  """A column of nulls has no type of its own, nor has one of empty lists."""
  write(tmp_path / f'dev.{kind}', pa.table(TEXT | {'label': column}))
  write(tmp_path / f'test.{kind}', pa.table(TEXT | {'label': [None, None]}))
  source = data.load(f'{kind}:{tmp_path}', 'dev', labels=labels)
  assert len(source) == 2 and source.classes == classes
  with pytest.raises(ValueError, match="no split 'test': .* has no labels"):
    data.load(f'{kind}:{tmp_path}', 'test', labels=labels)
  write(tmp_path / f'test.{kind}', pa.table(TEXT | {'label': [[], []]}))
  if labels == 'sets':
    found = data.load(f'{kind}:{tmp_path}', 'test', labels=labels)
    assert [e['label'].tolist() for e in found] == [[0, 0, 0]] * 2


def test_classes_that_are_no_numbers_and_tags_with_names(tmp_path):
  table = noted(pa.table(TEXT | {'label': [0, 1]}), label=class_label('no', 'yes'))
  write(tmp_path / 'a.arrow', table)
  with pytest.raises(
    ValueError, match="has the class 'no', which is no number: to predict classes"
  ):
    everything(f'arrow:{tmp_path}/a.arrow', 'numbers')
  for number in (2, -1):
    table = noted(
      pa.table(TEXT | {'label': [[0], [number]]}), label=NER | {'feature': class_label('a', 'b')}
    )
    write(tmp_path / 'b.arrow', table)
    with pytest.raises(
      ValueError, match=f'row 1 of .* has the label {number}; there are 2 classes'
    ):
      everything(f'arrow:{tmp_path}/b.arrow', 'sets')
  table = noted(pa.table({'tokens': [['a']], 'ner_tags': [[0]]}), ner_tags=NER)
  write(tmp_path / 'c.arrow', table)
  with pytest.raises(ValueError, match="the tags of 'ner_tags' have names: leave out names="):
    everything(f'arrow:{tmp_path}/c.arrow?names=O,X', 'tags')


def test_answers_that_do_not_stand_there_and_columns_of_other_types(tmp_path):
  columns = {'question': ['Who?'], 'context': [CONTEXT]}
  wrong = columns | {'answers': [[{'text': 'Rome', 'answer_start': 12}]]}
  write(tmp_path / 'train.arrow', pa.table(wrong))
  source = data.load(f'arrow:{tmp_path}', 'train', labels='answers')
  said = r"row 0 of .*train\.arrow: the answer 'Rome' does not stand at answer_start=12"
  with pytest.raises(ValueError, match=said):
    list(source)
  with pytest.raises(ValueError, match="these are questions of config.task='questions'"):
    data.load(f'arrow:{tmp_path}', 'train')
  write(tmp_path / 'test.arrow', pa.table(columns | {'answers': ['Rome']}))
  with pytest.raises(ValueError, match=r"'answers' is a column of .*, and cannot be the answers"):
    data.load(f'arrow:{tmp_path}', 'train', labels='answers')
  write(tmp_path / 'test.arrow', pa.table(columns))
  with pytest.raises(ValueError, match="no split 'test': .* has no column 'answers'"):
    data.load(f'arrow:{tmp_path}', 'test', labels='answers')


# ---- How much is read.


def read_so_far():
  """Bytes that this process has asked the system to read; mapped ones are not among them."""
  lines = pathlib.Path('/proc/self/io').read_text().splitlines()
  return int(dict(line.split(': ') for line in lines)['rchar'])


def test_opening_reads_labels_and_a_row_reads_its_group(tmp_path):
  file = tmp_path / 'train.parquet'
  rng = np.random.default_rng(0)
  table = pa.table(
    {'image': [rng.bytes(20_000) for _ in range(500)], 'label': [i % 2 for i in range(500)]}
  )
  write(file, table, rows=10)
  size = file.stat().st_size
  assert size > 9_900_000
  before = read_so_far()
  source = data.load(f'parquet:{tmp_path}?image=image', 'train')
  assert read_so_far() - before < size // 50
  before = read_so_far()
  with pytest.raises(ValueError, match='is no readable image'):
    source[250]
  assert read_so_far() - before < size // 40  # a group of 50
  mapped = tmp_path / 'mapped' / 'train.arrow'
  write(mapped, table, rows=10)
  before = read_so_far()
  kept = pa.total_allocated_bytes()
  source = data.load(f'arrow:{mapped.parent}?image=image', 'train')
  with pytest.raises(ValueError, match='is no readable image'):
    source[250]
  assert read_so_far() - before < size // 50 and pa.total_allocated_bytes() - kept < size // 50


def test_groups_are_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
  reader = importlib.import_module('jpeft.data.readers.arrow')
  reads = []

  def read(i):
    reads.append(i)
    return np.zeros(4, np.uint8)

  cache = reader._Cache(10)  # two of four bytes
  for i in (0, 1, 0, 2, 0, 1):
    assert cache.get(i, lambda: read(i)).nbytes == 4
  assert reads == [0, 1, 2, 1]
  cache.get('large', lambda: np.zeros(50, np.uint8))
  assert list(cache._kept) == ['large']

  write(tmp_path / 'train.parquet', texts(0, 40), rows=7)
  assert not data.load(f'parquet:{tmp_path}', 'train').notes
  monkeypatch.setattr(reader, 'CACHED', 100)
  source = data.load(f'parquet:{tmp_path}', 'train')
  assert 'of its groups of rows are kept' in source.notes[0]
  assert sorted(int(e['text'][1:]) for e in source) == list(range(40))


def test_batches_go_on_from_any_place(tmp_path):
  write(tmp_path / 'train.parquet', texts(0, 40), rows=7)

  def batches():
    source = data.load(f'parquet:{tmp_path}', 'train')
    only_labels = lambda example, rng: {'label': example['label'], 'text': int(example['text'][1:])}
    return data.Batches(source, 4, only_labels, seed=3)

  check_goes_on(batches, 13)
