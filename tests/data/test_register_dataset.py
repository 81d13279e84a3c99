"""Data sets from outside jpeft."""

import importlib

import pytest

import jpeft
from jpeft import data


@pytest.fixture
def registered(monkeypatch):
  module = importlib.import_module('jpeft.data.load')  # the face has the function of that name
  monkeypatch.setattr(module, '_REGISTERED', {})
  monkeypatch.setattr(module, '_READERS', {})
  jpeft.register_dataset('numbers', numbers)


def numbers(data_dir):
  def read(row):
    return {'text': f'{data_dir} {row}', 'label': row % 2}

  return data.Dataset(read, {'train': range(10), 'test': range(10, 15)}, ['even', 'odd'])


def test_it_is_loaded_by_name_and_sliced(registered):
  source = data.load('numbers', 'train[:2]+test', 'here')
  assert len(source) == 7 and source.classes == ['even', 'odd']
  assert source[6] == {'text': 'here 14', 'label': 0}
  assert data.registered_module('numbers') == __name__
  assert data.registered_module('mnist5k') is None


def test_it_is_among_what_there_is(registered):
  with pytest.raises(ValueError, match="unknown data set 'number'; did you mean 'numbers'"):
    data.load('number', 'train')


@pytest.mark.parametrize(
  ('name', 'message'),
  (('mnist5k', 'is a data set of jpeft'), ('csv:mine', 'must not have a colon')),
)
def test_what_cannot_be_registered(name, message):
  with pytest.raises(ValueError, match=message):
    jpeft.register_dataset(name, numbers)


def lines(spec):
  """A file of lines, each of which is a text with its first letter as label."""
  path, options = data.options_of(spec, 'lines', ('end',), {'end': ''})
  texts = [line + options['end'] for line in path.read_text().splitlines()]
  classes = sorted({text[0] for text in texts})

  def read(row):
    return {'text': texts[row], 'label': classes.index(texts[row][0])}

  return data.Dataset(read, data.split_rows({'': texts}), classes)


def test_a_reader_takes_a_path_and_options(registered, tmp_path):
  jpeft.register_reader('lines', lines)
  file = tmp_path / 'a.txt'
  file.write_text('ab\nba\nac\n')
  source = data.load(f'lines:{file}?end=.', 'train+test')
  assert {example['text']: example['label'] for example in source} == {'ab.': 0, 'ba.': 1, 'ac.': 0}
  assert data.registered_module(f'lines:{file}') == __name__
  assert data.registered_module(f'csv:{file}') is None
  with pytest.raises(ValueError, match="unknown option 'edn'; did you mean 'end'"):
    data.load(f'lines:{file}?edn=.', 'train')
  with pytest.raises(ValueError, match="unknown data set 'line:a'; did you mean 'lines:PATH'"):
    data.load('line:a', 'train')


@pytest.mark.parametrize(
  ('kind', 'message'),
  (('csv', 'is a source of jpeft'), ('hf', 'is a source of jpeft'), ('a:b', 'not have a colon')),
)
def test_kinds_that_cannot_be_registered(kind, message):
  with pytest.raises(ValueError, match=message):
    jpeft.register_reader(kind, lines)
