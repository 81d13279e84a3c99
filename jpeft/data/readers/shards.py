"""Splits that are stored in several files.

train.parquet                         a split in a file
train-00000-of-00002.parquet          a split in numbered files, with their count or without
train/0.parquet, train/1.parquet      a split in a folder
PATH/train-{000..009}.tar             numbered files by their pattern, as one undivided source
"""

import collections
import re
from collections.abc import Sequence
from pathlib import Path

from ..source import suggestion

_NUMBERED = re.compile(r'(?P<split>.+?)-(?P<number>\d+)(?:-of-(?P<count>\d+))?')
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')


def shards_of(path: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
  """{split: its files, in order}; {'': files} of a file or a pattern, which are to be divided.

  Args:
    path: a file, a pattern of files, or a folder.
    suffixes: of the files that are read, such as ('.parquet',).

  Raises:
    FileNotFoundError: no such file or folder, or a file of a count is missing.
    ValueError: a folder without such files.
  """
  if _RANGE.search(path.name):
    return {'': [_there(path.with_name(name)) for name in _expanded(path.name)]}
  if not path.is_dir():
    return {'': [_there(path)]}
  found = _in_folder(path, suffixes)
  if found:
    return found
  folders = sorted(inner for inner in path.iterdir() if inner.is_dir() and inner.name[0] != '.')
  if len(folders) == 1:
    return shards_of(folders[0], suffixes)
  for folder in folders:
    files = [file for files in _in_folder(folder, suffixes).values() for file in files]
    if files:
      found[folder.name] = files
  if not found:
    raise ValueError(
      f'no {suffixes[0]} files found in {path}: it needs one for each split, such as '
      f'train{suffixes[0]}, several as train-00000-of-00002{suffixes[0]}, or a folder a split'
    )
  return found


def _there(file: Path) -> Path:
  if file.is_file():
    return file
  beside = []
  if file.parent.is_dir():
    beside = [other.name for other in file.parent.iterdir()]
  raise FileNotFoundError(f'there is no file {file}; {suggestion(file.name, beside)}')


def _expanded(name: str) -> list[str]:
  """The names of a pattern such as 'a-{08..10}.tar', with leading zeros as its first number has."""
  match = _RANGE.search(name)
  if match is None:
    return [name]
  first, last = match.groups()
  numbers = range(int(first), int(last) + 1)
  if not numbers:
    raise ValueError(f'the pattern {match[0]} of {name} has no number in it')
  before = name[: match.start()]
  names = [f'{before}{number:0{len(first)}d}{name[match.end() :]}' for number in numbers]
  return [whole for one in names for whole in _expanded(one)]


def _in_folder(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
  """{split: its files} of the files right in a folder."""
  found = collections.defaultdict(list)
  counts = {}
  for file in sorted(folder.iterdir()):
    suffix = next((suffix for suffix in suffixes if file.name.endswith(suffix)), None)
    if suffix is None or file.name[0] == '.' or not file.is_file():
      continue
    split = file.name.removesuffix(suffix)
    match = _NUMBERED.fullmatch(split)
    if match:
      split = match['split']
      if match['count']:
        counts[split] = int(match['count'])
    found[split].append(file)
  for split, count in counts.items():
    if len(found[split]) != count:
      raise FileNotFoundError(
        f'{folder} has {len(found[split])} of the {count} files of {split!r}, such as '
        f'{found[split][0].name}: fetch the others'
      )
  return dict(found)
