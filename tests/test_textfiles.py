"""Lines of text files, from a file or stdin."""

import sys

import pytest

from jpeft import cli


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_lines_end_where_lines_end(tmp_path, encoding):
  file = tmp_path / 'lines.txt'
  file.write_bytes('a\u2028b\x0c\r\n\r\n \nc\0d'.encode(encoding))
  assert cli.lines(str(file)) == ['a\u2028b\x0c', 'c\0d']


def test_what_is_no_text_is_named(tmp_path, monkeypatch):
  file = tmp_path / 'lines.txt'
  file.write_bytes(b'a\n' * 5000 + b'\xe9\n')
  with pytest.raises(ValueError, match=r'lines.txt is not UTF-8 text in line 5001 \('):
    cli.lines(str(file))
  monkeypatch.setattr(sys, 'stdin', ['a\n', 'b\udce9\n'])
  with pytest.raises(ValueError, match=r'line 2 of - has half a character \(U\+DCE9'):
    cli.lines('-')
