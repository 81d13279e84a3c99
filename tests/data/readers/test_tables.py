"""CSV and JSON-lines files of texts."""

import csv
import json

import pytest

from jpeft import data

LABELS = ['bad', 'good']


@pytest.fixture
def reviews(tmp_path):
  file = tmp_path / 'reviews.csv'
  lines = [f'"film {i}, really",{LABELS[i >= 25]}' for i in range(50)]
  file.write_text('\n'.join(['text,label', *lines]) + '\n', encoding='utf-8')
  return file


def both(name):
  return list(data.load(name, 'train')), list(data.load(name, 'test'))


def test_csv(reviews):
  train, test = both(f'csv:{reviews}')
  assert len(train) + len(test) == 50 and 32 < len(train) < 48
  expect = {f'film {i}, really': int(i >= 25) for i in range(50)}
  assert {e['text']: e['label'] for e in train + test} == expect
  assert data.load(f'csv:{reviews}', 'train').classes == LABELS
  assert {e['label'] for e in train[:8]} == {0, 1}  # mixed, though the file is sorted
  assert both(f'csv:{reviews}') == (train, test)


def test_equal_texts_are_never_divided(tmp_path):
  file = tmp_path / 'a.jsonl'
  file.write_text('\n'.join(json.dumps({'text': f't{i % 30}', 'label': i}) for i in range(60)))
  train, test = both(f'jsonl:{file}')
  assert test and not {e['text'] for e in train} & {e['text'] for e in test}


def test_other_columns_pairs_and_delimiters(tmp_path):
  file = tmp_path / 'pairs.tsv'
  file.write_text('premise\thypothesis\ty\nit rains\tit is wet\t1\n', encoding='utf-8-sig')
  source = data.load(f'csv:{file}?text=premise&pair=hypothesis&label=y', 'train+test')
  assert list(source) == [
    {'text': 'it rains', 'pair': 'it is wet', 'label': 0}
  ] and source.classes == ['1']
  (tmp_path / 'a.csv').write_text('text;label\na, b;x\n')
  assert data.load(f'csv:{tmp_path}/a.csv?delimiter=;', 'train+test')[0]['text'] == 'a, b'


def test_a_file_for_each_split(tmp_path):
  for name, rows in (('train', ['a,0', 'b,1']), ('test', ['c,1'])):
    (tmp_path / f'{name}.csv').write_text('\n'.join(['text,label', *rows]))
  train, test = both(f'csv:{tmp_path}')
  assert len(train) == 2 and test == [{'text': 'c', 'label': 1}]


@pytest.mark.parametrize(
  'labels, classes',
  [
    ([10, 9, -1], ['-1', '9', '10']),
    (['10', '9', 'x'], ['10', '9', 'x']),
    (['no', 'yes', 'no'], ['no', 'yes']),
  ],
)
def test_classes_are_sorted_by_value_or_name(tmp_path, labels, classes):
  file = tmp_path / 'a.jsonl'
  file.write_text(
    '\n\n'.join(json.dumps({'text': str(i), 'label': v}) for i, v in enumerate(labels))
  )
  source = data.load(f'jsonl:{file}?unlabelled=class', 'train+test')
  assert source.classes == classes
  assert {int(e['text']): classes[e['label']] for e in source} == {
    i: str(v) for i, v in enumerate(labels)
  }


@pytest.mark.parametrize(
  'name, content, text',
  [
    (
      'a.csv',
      'texts,label\nx,1\n',
      r"line 2 of .*a\.csv has no column 'text' .*did you mean 'texts'",
    ),
    (
      'a.csv',
      'text,y\nx,1\n',
      r"no column 'label' \(.*, a\.csv\?label=COLUMN\); there is 'text', 'y'",
    ),
    ('a.csv', 'text,label\na, b,1\n', 'line 2 of .* has more fields than the header; put quotes'),
    (
      'a.csv',
      'text,label\na\n',
      "line 2 of .* has None as its 'label'; it must be a text or an integer",
    ),
    ('a.csv', 'text,label\na,\n', "has '' as its 'label'"),
    ('a.csv', 'text,label\n"a,1\n', r'a\.csv is no CSV after line 1 \(unexpected end'),
    ('a.csv', 'text,label,text\na,1,b\n', r"a\.csv has several columns 'text': give them other"),
    ('a.csv', 'text,label\n', r'a\.csv is empty: there is no row'),
    ('a.csv', '', 'is empty'),
    ('a.csv', b'text,label\n\xff,1\n', r'a\.csv is not UTF-8 text in line 2 \(invalid start byte'),
    (
      'a.csv',
      'text,label\na,1\n'.encode('utf-16-le'),
      'is UTF-16 without a byte-order mark, or no',
    ),
    ('a.csv', 'text,label\n"a" b,1\n', r'is no CSV after line .*are letters, say a\.csv\?quote='),
    ('a.jsonl', b'{"text": "a\xff"}', r'a\.jsonl is not UTF-8 text in line 1'),
    (
      'a.jsonl',
      '{"text": "a", "label": 1}\n{"text": "a\\ud83d", "label": 1}',
      r'line 2 of .*a\.jsonl has half a character \(U\+D83D',
    ),
    ('a.jsonl', '[' * 100_000, r'line 1 of .*a\.jsonl is no JSON'),
    ('a.jsonl', '', r'a\.jsonl is empty'),
    ('a.jsonl', '{"text": "a", "label": 1}\n{"text"', 'line 2 of .* is no JSON'),
    ('a.jsonl', '[1]', 'line 1 of .* is a JSON list, not an object'),
    ('a.jsonl', '{"text": 5, "label": 1}', "has 5 as its 'text'; it must be a text"),
    ('a.jsonl', '{"text": "a", "label": 0.5}', 'has 0.5 as its'),
  ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, text):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=text):
    data.load(f'{name.split(".")[1]}:{tmp_path / name}', 'train')


def test_missing_files_and_options(reviews):
  with pytest.raises(
    FileNotFoundError, match=r"there is no file .*review\.csv; did you mean 'reviews\.csv'"
  ):
    data.load(f'csv:{reviews.parent}/review.csv', 'train')
  with pytest.raises(ValueError, match=r"unknown option 'lable'; did you mean 'label'"):
    data.load(f'csv:{reviews}?lable=y', 'train')
  with pytest.raises(ValueError, match=r'no \.jsonl files found in'):
    data.load(f'jsonl:{reviews.parent}', 'train')
  with pytest.raises(ValueError, match="delimiter 'tab' is not one character"):
    data.load(f'csv:{reviews}?delimiter=tab', 'train')


@pytest.mark.parametrize(
  'name, text',
  [
    ('minst5k', "unknown data set 'minst5k'; did you mean 'mnist5k'"),
    ('movie-sentiment', "did you mean 'movie_sentiment'"),
    ('csvs:a.csv', "unknown data set 'csvs:a.csv'; did you mean 'csv:PATH'"),
    ('csv:', "unknown data set 'csv:'; did you mean 'csv:PATH'"),
    (
      'qqq',
      "there is 'mnist5k', 'movie_sentiment', 'emoji_groups', 'emoji_3d', 'animal_shapes', "
      "'phonemes', 'folder:PATH', 'lists:PATH', 'vtab:PATH', 'fgvc:PATH', 'glue:PATH', "
      "'csv:PATH', ",
    ),
  ],
)
def test_unknown_data_sets(name, text):
  with pytest.raises(ValueError, match=text):
    data.load(name, 'train')


@pytest.mark.parametrize('kind', ['csv', 'jsonl'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_texts_of_any_encoding_and_length(tmp_path, kind, encoding):
  texts = ['a\0b', 'two\nlines, "quoted"', 'x' * 140_000, '\U0001f600 \u00e9\u2028.']
  file = tmp_path / f'a.{kind}'
  if kind == 'csv':
    quoted = [text.replace('"', '""') for text in texts]
    lines = ['text,label', *(f'"{text}",{i}' for i, text in enumerate(quoted))]
  else:
    lines = [json.dumps({'text': text, 'label': i}) for i, text in enumerate(texts)]
  file.write_bytes('\r\n'.join(lines).encode(encoding))
  before = csv.field_size_limit()
  found = data.load(f'{kind}:{file}', 'train+test')
  assert {example['label']: example['text'] for example in found} == dict(enumerate(texts))
  assert csv.field_size_limit() == before


def test_the_tables_of_glue(tmp_path):
  sst = tmp_path / 'SST-2'
  sst.mkdir()
  (sst / 'train.tsv').write_text('sentence\tlabel\n"good\t1\nbad " ``\t0\n')
  (sst / 'dev.tsv').write_text('sentence\tlabel\nfine\t1\n')
  (sst / 'test.tsv').write_text('index\tsentence\n0\tpoor\n')
  name = f'csv:{sst}?text=sentence&quote='
  assert {e['text']: e['label'] for e in data.load(name, 'train')} == {'"good': 1, 'bad " ``': 0}
  assert len(data.load(name, 'dev')) == 1
  with pytest.raises(
    ValueError, match=r"no split 'test': .*test\.tsv has no column 'label'; there"
  ):
    data.load(name, 'test')
  cola = tmp_path / 'train.tsv'
  cola.write_text('gj04\t1\t\tIt "is.\nbc01\t0\t*\tIs it\n', encoding='utf-8-sig')
  name = f'csv:{cola}?header=no&text=3&label=1&quote='
  found = {e['text']: e['label'] for e in data.load(name, 'train+test')}
  assert found == {'It "is.': 1, 'Is it': 0}
  for option, said in (
    ('header=maybe', "must be 'yes' or 'no'"),
    ('quote=xy', "quote 'xy' is not"),
  ):
    with pytest.raises(ValueError, match=said):
      data.load(f'csv:{cola}?{option}', 'train')
