"""What the readers of text files share: their options, their files, their lines."""

import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jpeft import jsonfiles, textfiles

from ..source import Example, suggestion

Values = dict[str, Any]  # {column: value}
Row = tuple[int, Values]  # line in the file, values
MALFORMED = ('refuse', 'skip')  # of a line that cannot be read; the first is the default
SUFFIXES = {
  'csv': ('.csv', '.tsv'),
  'jsonl': ('.jsonl',),
  'conll': ('.txt', '.conll', '.conllu', '.bio', '.iob', '.iob2', '.tsv'),
  'squad': ('.json',),
  'text': ('.txt', '.md'),
}


def options_of(
  spec: str, kind: str, known: tuple[str, ...], default: dict[str, str]
) -> tuple[Path, dict[str, str]]:
  """(path, options) of PATH?name=value&...

  Args:
    spec: the name of the data without its kind.
    kind: the word before the colon, for messages.
    known: names of options.
    default: {option: its value where it is left out}.

  Raises:
    ValueError: an option that is not known.
  """
  path, _, query = spec.partition('?')
  options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  for name in options:
    if name not in known:
      raise ValueError(f'{kind}:{spec} has the unknown option {name!r}; {suggestion(name, known)}')
  return Path(path).expanduser(), default | options


def skips(spec: str, kind: str, malformed: str | None) -> bool:
  """Whether the option `malformed` leaves out what cannot be read; else it is refused.

  Args:
    spec, kind: see `options_of`.
    malformed: what is given.

  Raises:
    ValueError: neither of MALFORMED.
  """
  if malformed not in MALFORMED:
    raise ValueError(f"{kind}:{spec}: malformed={malformed} must be 'refuse' or 'skip'")
  return malformed == 'skip'


def files_of(path: Path, kind: str) -> dict[str, Path]:
  """{split: file} of a folder; {'': path} of a file, which is to be divided.

  Args:
    path: a file or a folder.
    kind: a key of SUFFIXES.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: a folder without such files.
  """
  if path.is_file():
    return {'': path}
  if path.is_dir():
    files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES[kind]}
    if not files:
      suffix = SUFFIXES[kind][0]
      raise ValueError(
        f'no {suffix} files found in {path}: it needs one for each split, such as train{suffix}'
      )
    return files
  beside = []
  if path.parent.is_dir():
    beside = [file.name for file in path.parent.iterdir()]
  raise FileNotFoundError(f'there is no file {path}; {suggestion(path.name, beside)}')


def examples_of(
  file: Path, rows: Iterator[Row], example: Callable[[int, Values], Example]
) -> list[Example]:
  """example(line, values) of all rows of a file.

  Raises:
    ValueError: there are none.
  """
  found = [example(line, values) for line, values in rows]
  if not found:
    raise ValueError(f'{file} is empty: there is no row of data in it')
  return found


def jsonl_rows(file: Path) -> Iterator[Row]:
  """(line number, object) of each line that is not empty.

  Raises:
    ValueError: a line that is no JSON, no object or no text.
  """
  with textfiles.opened(file) as lines:
    for line, text in enumerate(lines, 1):
      if text.strip():
        yield line, json_object(text, f'line {line} of {file}')


def json_object(text: str | bytes, where: str) -> Values:
  """The object of a line; raises a ValueError that begins with `where` if it is none."""
  values = jsonfiles.parsed(text, where)
  if not isinstance(values, dict):
    raise ValueError(f'{where} is a JSON {type(values).__name__}, not an object')
  return values
