"""Texts alone, whose labels, if there are any, are not read.

    text:PATH                         plain texts, one a line; divided: 80 % 'train', 20 % 'test'
    text:FOLDER                       a file for each split: train.txt, test.txt
    text:PATH?by=paragraph            a text goes on to the next blank line
    csv:PATH, jsonl:PATH              the column 'text', or that of the option text=

A file is divided by a hash of the text, so that equal ones are in one split.
"""

from collections.abc import Iterator
from pathlib import Path

from jpeft import textfiles

from ..labels import NOTHING
from ..source import Dataset, Example, split_rows
from .files import files_of, options_of
from .tables import csv_table, jsonl_table

UNITS = ('line', 'paragraph')


def plain_texts(spec: str) -> Dataset:
  """The texts of a file, or of a folder of them; UTF-8, or UTF-16 with a byte-order mark.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no text, or an unknown option.
  """
  path, options = options_of(spec, 'text', ('by',), {'by': 'line'})
  if options['by'] not in UNITS:
    raise ValueError(f"text:{spec}: by={options['by']} must be 'line' or 'paragraph'")
  read = _lines if options['by'] == 'line' else _paragraphs
  texts = []
  keys = {}
  for split, file in files_of(path, 'text').items():
    keys[split] = list(read(file))
    if not keys[split]:
      raise ValueError(f'{file} is empty: there is no text in it')
    texts += keys[split]

  def example(row: int) -> Example:
    return {'text': texts[row]}

  return Dataset(example, split_rows(keys), [], labels=NOTHING)


def csv_texts(spec: str) -> Dataset:
  """The column of texts of a CSV file, or of a folder of them; see `csv_table`."""
  return csv_table(spec, NOTHING)


def jsonl_texts(spec: str) -> Dataset:
  """The texts of a JSON-lines file, or of a folder of them; see `jsonl_table`."""
  return jsonl_table(spec, NOTHING)


def _lines(file: Path) -> Iterator[str]:
  with textfiles.opened(file) as lines:
    for line in lines:
      if line.strip():
        yield line.strip()


def _paragraphs(file: Path) -> Iterator[str]:
  """Texts between blank lines, each on one line."""
  found: list[str] = []
  with textfiles.opened(file) as lines:
    for line in lines:
      if line.strip():
        found.append(line.strip())
      elif found:
        yield ' '.join(found)
        found = []
  if found:
    yield ' '.join(found)
