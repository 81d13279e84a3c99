"""Parquet and Arrow files: columns, splits, and how little is read."""

import importlib
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from jpeft import data

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
    ({'text': ['x'], 'label': [0.5]}, '', 'row 0 of .* has the label 0.5; it must be a text or'),
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

  first = batches()
  for _ in range(13):
    next(first)
  again = batches()
  again.restore(first.state())
  one, other = next(first), next(again)
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name])
