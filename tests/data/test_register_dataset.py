"""Data sets from outside jpeft."""

import importlib

import pytest

import jpeft
from jpeft import data


@pytest.fixture
def registered(monkeypatch):
  module = importlib.import_module('jpeft.data.load')  # the face has the function of that name
  monkeypatch.setattr(module, '_REGISTERED', {})
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
