"""Sentences with a tag for each word: files of columns, and JSON lines.

    conll:PATH                        a file, which is divided: 80 % 'train', 20 % 'test'
    conll:FOLDER                      a file for each split: train.txt, valid.txt, test.txt
    conll:PATH?tokens=1&tags=3        other columns than the first and the last, counted from 0
    conll:PATH?delimiter=|            another delimiter than blanks and tabs
    conll:PATH?comment=%23            lines that begin with # are no words
    jsonl:PATH                        {"tokens": ["Jane", "runs"], "tags": ["B-PER", "O"]} a line
    jsonl:PATH?tokens=words&tags=ner  other names than 'tokens' and 'tags'
    jsonl:PATH?tags=ner_tags&names=O,B-PER,I-PER
                                      tags that are numbers, from 0, with their names

A file of columns has a word a line, as that of CoNLL-2003 (Tjong Kim Sang and De Meulder): blank
lines stand between sentences, and lines that begin with -DOCSTART- are left out. All lines have as
many columns as the first. A file is divided by a hash of the words, so that equal sentences are in
one split.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft import textfiles

from ..labels import TAGS
from ..source import Dataset, Example, split_rows, suggestion
from .files import Values, examples_of, files_of, jsonl_rows, options_of

DOCUMENT = '-DOCSTART-'
COLUMNS = {'tokens': '0', 'tags': '-1'}
NAMES = {'tokens': 'tokens', 'tags': 'tags'}

Line = tuple[int, list[str]]  # number in the file, columns


def conll(spec: str) -> Dataset:
  """The sentences of a file of columns, or of a folder of them.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no sentence, an unknown option, no such column, or a line with other columns than
      the first.
  """
  known = (*COLUMNS, 'delimiter', 'comment')
  path, options = options_of(spec, 'conll', known, COLUMNS)
  delimiter = options.pop('delimiter', None)
  comment = options.pop('comment', None)
  columns = {name: _number(spec, name, text) for name, text in options.items()}
  parts = {}
  for split, file in files_of(path, 'conll').items():
    sentences = _sentences(_lines(file, delimiter, comment))
    found = [_tagged(file, columns, lines) for lines in sentences]
    if not found:
      raise ValueError(f'{file} is empty: there is no sentence in it')
    parts[split] = found
  return _dataset(parts, None)


def tagged_jsonl(spec: str) -> Dataset:
  """The lines of a JSON-lines file, or of a folder of them; UTF-8, an object a line.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no lines, an unknown option, or a line without as many tags as words.
  """
  path, names = options_of(spec, 'jsonl', (*NAMES, 'names'), NAMES)
  classes = None
  if 'names' in names:
    classes = names.pop('names').split(',')
  parts = {}
  for split, file in files_of(path, 'jsonl').items():
    example = functools.partial(_of_line, file, names, classes)
    parts[split] = examples_of(file, jsonl_rows(file), example)
  return _dataset(parts, classes)


def _dataset(parts: dict[str, list[Example]], classes: list[str] | None) -> Dataset:
  """The data set of {split: its examples}, whose tags are texts.

  Args:
    parts: the split '' is divided.
    classes: the tags in their order; that of `ordered` if left out.
  """
  examples = [example for found in parts.values() for example in found]
  if classes is None:
    classes = ordered({tag for example in examples for tag in example['tags']})
  number = {tag: i for i, tag in enumerate(classes)}

  def read(row: int) -> Example:
    example = examples[row]
    return {'words': example['words'], 'label': [number[tag] for tag in example['tags']]}

  keys = {split: [' '.join(one['words']) for one in found] for split, found in parts.items()}
  return Dataset(read, split_rows(keys), classes, labels=TAGS)


def ordered(tags: set[str]) -> list[str]:
  """Tags that are numbers by their value, others by name; O, which is no entity, comes first."""
  if all(tag.isdecimal() for tag in tags):
    return sorted(tags, key=int)
  return sorted(tags, key=_order)


def _order(tag: str) -> tuple[bool, str]:
  return tag != 'O', tag


# ---- Files of columns.


def _number(spec: str, name: str, text: str) -> int:
  """The number of a column, from 0, or from -1 for the last on."""
  try:
    return int(text)
  except ValueError:
    raise ValueError(
      f'conll:{spec}: {name}={text} must be the number of a column, from 0, or -1 for the last'
    ) from None


def _lines(file: Path, delimiter: str | None, comment: str | None) -> Iterator[Line]:
  """The lines of a file that are words, and those between sentences, which have no columns.

  Raises:
    ValueError: a line with other columns than the first.
  """
  count = None
  with textfiles.opened(file) as lines:
    for number, line in enumerate(lines, 1):
      line = line.rstrip('\n')
      if comment and line.startswith(comment):
        continue
      if not line.strip() or line.startswith(DOCUMENT):
        yield number, []
        continue
      columns = line.split(delimiter)
      if count is None:
        count = len(columns)
      if len(columns) != count:
        raise ValueError(
          f'line {number} of {file} has {len(columns)} columns, and lines before it have {count}: '
          'a line is a word with its columns, and a blank line ends a sentence'
        )
      yield number, columns


def _sentences(lines: Iterator[Line]) -> Iterator[list[Line]]:
  """The lines of each sentence."""
  sentence: list[Line] = []
  for number, columns in lines:
    if columns:
      sentence.append((number, columns))
    elif sentence:
      yield sentence
      sentence = []
  if sentence:
    yield sentence


def _tagged(file: Path, columns: dict[str, int], lines: list[Line]) -> Example:
  """{'words', 'tags'} of the lines of a sentence."""
  first, found = lines[0]
  count = len(found)
  for name, column in columns.items():
    if not -count <= column < count:
      raise ValueError(
        f'line {first} of {file} has {count} columns, numbered from 0, and none of number {column} '
        f'({name}={column})'
      )
  if columns['tokens'] % count == columns['tags'] % count:
    raise ValueError(
      f'line {first} of {file} has {count} columns, and words and tags would both be column '
      f'{columns["tokens"] % count}: say which, {file.name}?tokens=NUMBER&tags=NUMBER'
    )
  for number, values in lines:
    if not values[columns['tags']] or not values[columns['tokens']]:
      raise ValueError(f'line {number} of {file} has a column with nothing in it')
  return {
    'words': [values[columns['tokens']] for _, values in lines],
    'tags': [values[columns['tags']] for _, values in lines],
  }


# ---- Lists.


def _of_line(
  file: Path, names: dict[str, str], classes: list[str] | None, line: int, values: Values
) -> Example:
  """{'words', 'tags'} of a line."""
  return sentence_of(f'line {line} of {file}', file.name, names, classes, values)


def sentence_of(
  where: str,
  source: str,
  names: Mapping[str, str],
  classes: Sequence[str] | None,
  values: Mapping[str, Any],
) -> Example:
  """{'words', 'tags'} of values, the tags as texts.

  Args:
    where: what has them, for messages.
    source: its name, for messages.
    names: {'tokens', 'tags': the name among the values}.
    classes: the names of tags that are numbers; None where they have none.
    values: of a line or row.

  Raises:
    ValueError: no list of words, or not a tag for each.
  """
  found = {}
  for part in NAMES:
    name = names[part]
    if name not in values:
      raise ValueError(
        f'{where} has no {name!r} (or name another one, {source}?{part}=NAME); '
        f'{suggestion(name, values)}'
      )
    found[part] = _list(where, name, values[name])
  words = words_of(where, names['tokens'], found['tokens'])
  tags = found['tags']
  if len(words) != len(tags):
    raise ValueError(f'{where} has {len(words)} words, and {len(tags)} tags')
  return {'words': words, 'tags': tags_of(where, names['tags'], classes, tags)}


def words_of(where: str, name: str, words: Any) -> list[str]:
  """Words, if they are; raises a ValueError that names the row, where, and the column if not."""
  if not all(isinstance(word, str) for word in _list(where, name, words)):
    raise ValueError(f'{where}: {name!r} is a list of texts')
  return words


def tags_of(where: str, name: str, classes: Sequence[str] | None, tags: Any) -> list[str]:
  """Tags as texts.

  Args:
    where, name: what has them, for messages.
    classes: the names of tags that are numbers; None where they have none.
    tags: as they were read.

  Raises:
    ValueError: no list, or one of other things than tags.
  """
  return [_tag(where, name, classes, tag) for tag in _list(where, name, tags)]


def _list(where: str, name: str, value: Any) -> list[Any]:
  if not isinstance(value, list) or not value:
    raise ValueError(f'{where} has {value!r:.60} as its {name!r}; it must be a list')
  return value


def _tag(where: str, name: str, classes: Sequence[str] | None, tag: Any) -> str:
  """A tag as a text: its name, where the names of numbers are given."""
  if isinstance(tag, bool) or not isinstance(tag, (str, int)) or tag == '':
    raise ValueError(f'{where} has {tag!r} among its {name!r}; a tag is a text or an integer')
  if classes is None:
    return str(tag)
  if isinstance(tag, int) and 0 <= tag < len(classes):
    return classes[tag]
  if isinstance(tag, str) and tag in classes:
    return tag
  raise ValueError(
    f'{where} has the tag {tag!r} among its {name!r}; the list of names has {len(classes)} '
    'of them, numbered from 0'
  )
