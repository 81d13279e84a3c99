"""JSON within bounds, and what a document should be."""

import os
import re

import pytest

from jpeft import jsonfiles, textfiles


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"a": 1,}', r'x is no JSON \(.*line 1 column 9'),
    (b'\xff', r'x is no JSON \(.*0xff'),
    ('1' * 5000, r'x is no JSON \(Exceeds the limit'),
    ('[' * 100_000, 'x is no JSON that is read: it has more than 100 levels'),
    ('[' * 101 + ']' * 101, 'more than 100 levels'),
    ('{"a": "\\ud800"}', r'x has half a character \(U\+D800'),
  ],
)
def test_what_is_no_json_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    jsonfiles.parsed(text, 'x')


def test_what_is_json_is_read():
  assert jsonfiles.parsed('[' * 100 + ']' * 100, 'x') != []
  assert jsonfiles.parsed(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}', 'x') == {'a': '\U0001f600'}
  assert jsonfiles.parsed('"' + '[' * 500 + '"', 'x') == '[' * 500


def test_a_text_that_would_fill_the_memory_is_not_parsed(monkeypatch):
  text = '[' + '[],' * 1000 + '[]]'
  assert len(jsonfiles.parsed(text, 'x')) == 1001
  monkeypatch.setattr(jsonfiles, 'MEMORY', 1e5)
  with pytest.raises(ValueError, match='x is too large to be read as JSON: its 3,004 characters'):
    jsonfiles.parsed(text, 'x')


SCHEMA = {
  'a': [{'id': int, 'name?': (str, None)}],
  'b?': {str: float},
  'c?': (bool, [[str]]),
}


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ([], 'f: must be an object, not a list of 0'),
    ({}, "f: its object has no 'a'"),
    ({'a': [{'id': 1}, {}]}, "f: a[1] has no 'id'"),
    ({'a': [{'id': True}]}, 'f: a[0].id must be an integer of 64 bits, not true'),
    ({'a': [{'id': 2**63}]}, 'f: a[0].id must be an integer of 64 bits, not 9223372036854775808'),
    ({'a': [{'id': 1, 'name': {}}]}, 'f: a[0].name must be a text or null, not an object of 0'),
    ({'a': [], 'b': {'x y': 'z'}}, 'f: b[\'x y\'] must be a finite number, not "z"'),
    ({'a': [], 'b': {'x': float('nan')}}, 'f: b.x must be a finite number, not NaN'),
    ({'a': [], 'c': [['s'], [3]]}, 'f: c[1][0] must be a text, not 3'),
    ({'a': [], 'c': 'x' * 99}, f'f: c must be true or false or a list, not "{"x" * 59}...'),
  ],
)
def test_the_place_of_what_is_wrong_is_told(value, message):
  with pytest.raises(ValueError, match=re.escape(message.replace('f: must', 'f must'))):
    jsonfiles.check(value, SCHEMA, 'f')


def test_what_is_as_said_passes():
  value = {'a': [{'id': -(2**63), 'name': None}], 'b': {'x': 1, 'y': 0.5}, 'c': [['s'], []], 'd': 1}
  jsonfiles.check(value, SCHEMA, 'f')


def test_what_is_no_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe.json')  # to open it would wait for a writer
  for path, kind in ((tmp_path / 'pipe.json', 'a pipe'), (tmp_path, 'a folder')):
    with pytest.raises(ValueError, match=f'is {kind}'):
      jsonfiles.read(path)
  with pytest.raises(FileNotFoundError):
    jsonfiles.read(tmp_path / 'none.json')
  with pytest.raises(ValueError, match='cannot be read'):
    jsonfiles.read(tmp_path / ('a' * 300))
  (tmp_path / 'long.txt').write_text('long')
  with pytest.raises(ValueError, match='has 4 bytes, and at most 3 are read'):
    textfiles.text_of(tmp_path / 'long.txt', 3)
