"""Text files from anywhere: UTF-8, with or without a byte-order mark, or UTF-16 with one."""

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# The encodings of byte-order marks; that of UTF-32 begins as that of UTF-16 does.
_MARKS = {
  codecs.BOM_UTF32_LE: 'utf-32',
  codecs.BOM_UTF32_BE: 'utf-32',
  codecs.BOM_UTF16_LE: 'utf-16',
  codecs.BOM_UTF16_BE: 'utf-16',
}


@contextlib.contextmanager
def opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
  """The file, opened to be read as text, without its byte-order mark.

  Args:
    file: its path.
    newline: as that of `open`.

  Raises:
    ValueError: bytes of another encoding, on reading; the message has file and line.
  """
  encoding = encoding_of(file)
  try:
    with file.open(encoding=encoding, newline=newline) as text:
      yield text
  except UnicodeDecodeError as error:
    line = ''
    if encoding == 'utf-8-sig':
      line = f' in line {_first_broken(file)}'
    name = encoding.removesuffix('-sig').upper()
    raise ValueError(f'{file} is not {name} text{line} ({error.reason})') from error


def encoding_of(file: Path) -> str:
  """The encoding of a text file, by its first bytes.

  Raises:
    ValueError: UTF-16 without a byte-order mark, which might be either kind.
  """
  with file.open('rb') as opened_file:
    start = opened_file.read(64)
  for mark, encoding in _MARKS.items():
    if start.startswith(mark):
      return encoding
  if start.count(0) > len(start) // 3:  # every second byte of Latin letters
    raise ValueError(f'{file} is UTF-16 without a byte-order mark, or no text: save it as UTF-8')
  return 'utf-8-sig'


def check_whole(text: str, where: str) -> None:
  """Raises a ValueError if a text has half a character: a surrogate without the other half.

  JSON can write one, no encoding can.

  Args:
    text: any.
    where: what has it, for the message.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = f'U+{ord(text[error.start]):04X}'
    raise ValueError(
      f'{where} has half a character ({half}, a surrogate without the other half): it was cut or '
      'escaped wrongly, and no tokenizer reads it'
    ) from error


def _first_broken(file: Path) -> int:
  """The number of the first line that is no UTF-8."""
  with file.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      try:
        line.decode()
      except UnicodeDecodeError:
        return number
  return number
