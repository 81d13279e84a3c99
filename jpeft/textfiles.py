"""Text files from anywhere: UTF-8, with or without a byte-order mark, or UTF-16 with one."""

import codecs
import contextlib
import stat
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
    ValueError: no regular file; bytes of another encoding, on reading: the message has file and
      line.
  """
  encoding = encoding_of(file)
  try:
    with file.open(encoding=encoding, newline=newline) as text:
      yield text
  except UnicodeError as error:  # that of UTF-16 and UTF-32 may be one without a place
    line = ''
    if encoding == 'utf-8-sig':
      line = f' in line {_first_broken(file)}'
    name = encoding.removesuffix('-sig').upper()
    raise ValueError(f'{file} is not {name} text{line} ({_reason(error)})') from error


def text_of(file: Path, largest: int) -> str:
  """The whole text of a file.

  Args:
    file: its path.
    largest: bytes that it may have.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: no regular file, a larger one, or one of another encoding.
  """
  size = check_regular(file)
  if size > largest:
    raise ValueError(f'{file} has {size:,} bytes, and at most {largest:,} are read')
  with opened(file) as text:
    return text.read()


def check_regular(file: Path) -> int:
  """The size of a file in bytes; to be asked before it is opened, which may wait for ever.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a folder, a pipe, a socket or a device, or has a name that no file can have.
  """
  try:
    status = file.stat()
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    raise ValueError(f'{str(file):.200} cannot be read ({_reason(error)})') from error
  if stat.S_ISREG(status.st_mode):
    return status.st_size
  kind = 'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe, socket or device'
  raise ValueError(f'{file} is {kind}, not a file')


def _reason(error: Exception) -> str:
  """What went wrong, without what it went wrong with."""
  return getattr(error, 'reason', None) or getattr(error, 'strerror', None) or str(error)


def encoding_of(file: Path) -> str:
  """The encoding of a text file, by its first bytes.

  Raises:
    ValueError: no regular file, or UTF-16 without a byte-order mark, which might be either kind.
  """
  check_regular(file)
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
