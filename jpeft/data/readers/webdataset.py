"""Images and texts of one's own in the tar files of WebDataset, read by their place.

    wds:FOLDER, webdataset:FOLDER    files for each split, see `shards`: train-000.tar, ...
    wds:PATH/train-{000..009}.tar    numbered files, which are divided: 80 % 'train', 20 % 'test'
    wds:FOLDER?label=json.class      which members are what, and which field of a JSON

Members whose names agree up to the first dot of the file's name are a sample: 0001.jpg and
0001.cls, or 0001.txt and 0001.json. Options name what comes after the dot:

    image    a member of an image; if left out, the only one with the suffix of an image
    text     'txt', or a field of a JSON as 'json.text'; if left out, one of these two
    pair     a second text
    label    'cls', or a field of a JSON as 'json.label'; if left out, one of these two

Where numbers are learned, a label may be several members or fields, as in label=json.x,json.y;
where sets of classes are, it is a list in a JSON, or several fields of 1 and 0, one for each class.

Tars are read at random, where WebDataset reads them in order: their headers once, then the bytes of
a sample when it is asked for, in place and without unpacking. So a run goes on from any batch. That
needs files that are not compressed. Labels are read at once. Samples of a split are mixed by a hash
of their names.
"""

import functools
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft import textfiles

from ..decode import decode
from ..labels import CLASSES, NUMBERS, SETS
from ..source import Dataset, Example, split_rows, suggestion
from .columns import Column
from .files import json_object, options_of
from .folder import SUFFIXES
from .row_labels import row_labels
from .shards import shards_of
from .unlabelled import OPTION

PARTS = ('image', 'text', 'pair', 'label')
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
BLOCK = 512  # bytes; everything in a tar begins at a multiple
MEMBER = Column('text', (), 'member')  # as all labels are read
COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
ENDINGS = ('.gz', '.tgz', '.bz2', '.xz', '.zst')  # which these have


class Place(NamedTuple):
  """Where a member lies in its tar, in bytes."""

  start: int
  size: int


class Sample(NamedTuple):
  """Members of one name.

  Attributes:
    tar: their file.
    key: their name up to the first dot.
    members: {what comes after it: its place}.
  """

  tar: Path
  key: str
  members: Mapping[str, Place]

  def __str__(self) -> str:
    return f'sample {self.key!r} of {self.tar}'

  def bytes_of(self, member: str) -> bytes:
    """The content of a member.

    Raises:
      ValueError: the tar has become shorter.
    """
    start, size = self.members[member]
    # A file of its own, for threads; without a buffer, which would read what is behind the member.
    with self.tar.open('rb', buffering=0) as tar:
      tar.seek(start)
      content = tar.read(size)
    if len(content) < size:
      raise ValueError(f'{self.tar} has become shorter than it was: {self} ends beyond it')
    return content


def webdataset(spec: str, labels: str = CLASSES) -> Dataset:
  """The samples of tar files, with labels of a kind (see `..labels`).

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: a tar that is compressed or broken, a sample without its image or text, or samples
      without a label, see `row_labels`.
  """
  path, options = options_of(spec, 'webdataset', (*PARTS, OPTION), {})
  choice = options.pop(OPTION, None)
  found = {split: _Samples(_samples(files)) for split, files in _tars(path).items()}
  splits = [split.samples for split in found.values()]
  names, label = _members(spec, splits, options, several=labels in (NUMBERS, SETS))
  learned = row_labels(f'webdataset:{spec}', labels, dict.fromkeys(label, MEMBER), choice)
  used: list[Sample] = []
  keys = {}
  for split, here in found.items():
    kept = learned.read(split, here)
    if split in learned.left_out:
      continue
    chosen = [here.samples[i] for i in kept]
    keys[split] = [f'{sample.tar.name}/{sample.key}' for sample in chosen]
    used += chosen
  if not used:
    why = '; '.join(learned.left_out.values())
    raise ValueError(f'webdataset:{spec} has nothing to learn from: {why}')
  _check_members(used, names)
  classes = learned.classes()

  def read(row: int) -> Example:
    sample = used[row]
    example: Example = {'label': learned.of(row)}
    if 'image' in names:
      example['image'] = _pixels(sample, names['image'])
    for part in ('text', 'pair'):
      if part in names:
        example[part] = _text(sample, names[part])
    return example

  return Dataset(
    read,
    split_rows(keys),
    classes,
    left_out=learned.left_out,
    labels=labels,
    label_of=learned.of,
    notes=learned.notes,
  )


class _Samples:
  """The samples of a split as a `Table`, whose columns are members and fields of a JSON.

  Attributes:
    name: the folder of the first of them.
    samples: all of them.
  """

  def __init__(self, samples: Sequence[Sample]):
    self.name = str(samples[0].tar.parent)
    self.samples = samples

  def __len__(self) -> int:
    return len(self.samples)

  def where(self, row: int) -> str:
    return str(self.samples[row])

  def values(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for sample in self.samples:
      yield {name: _value(sample, name) for name in columns}


# ---- Tars.


def _tars(path: Path) -> dict[str, list[Path]]:
  """{split: its tars}.

  Raises:
    ValueError: there are none, or they are compressed.
  """
  if path.is_dir():
    packed = [file for file in sorted(path.iterdir()) if file.name.endswith(ENDINGS)]
    if packed:
      raise ValueError(_compressed(packed[0], packed[0].suffix[1:]))
  return shards_of(path, ('.tar',))


def _compressed(file: Path, kind: str) -> str:
  return (
    f'{file} is compressed ({kind}), and a sample in it has no place of its own to be read from: '
    'unpack it to a .tar; images are compressed already'
  )


def _samples(files: Iterable[Path]) -> list[Sample]:
  """The samples of some tars.

  Raises:
    ValueError: a tar without any.
  """
  found = []
  for file in files:
    textfiles.check_regular(file)
    status = file.stat()
    inside = _indexed(file, status.st_size, status.st_mtime_ns)
    if not inside:
      raise ValueError(f'{file} has no samples: files with a name, a dot and a suffix')
    found += inside
  return found


@functools.lru_cache(1024)
def _indexed(file: Path, size: int, changed: int) -> tuple[Sample, ...]:
  """The samples of a tar, by its headers alone.

  Args:
    file: its path.
    size: of the file in bytes.
    changed: when it was; with the size, the sign that an index is of another file.

  Raises:
    ValueError: it is no tar, compressed, or cut off, or a sample has two members of one suffix.
  """
  with file.open('rb', buffering=0) as opened:
    start = opened.read(8)
    for mark, kind in COMPRESSED.items():
      if start.startswith(mark):
        raise ValueError(_compressed(file, kind))
    opened.seek(0)
    try:
      found, end = _read_headers(file, _Bounded(opened, size))
    except tarfile.TarError as error:
      raise ValueError(f'{file} is no tar file, or is broken ({error})') from error
    opened.seek(end)
    if opened.read(BLOCK) != bytes(BLOCK):
      raise ValueError(
        f'{file} is cut off: it ends after {size:,} bytes without the mark of an end'
      )
  return tuple(found)


class _Bounded:
  """A file that is not read beyond its size; memory for it would be taken first."""

  def __init__(self, opened, size: int):
    self._opened = opened
    self._size = size
    self.seek = opened.seek
    self.tell = opened.tell

  def read(self, count: int) -> bytes:
    if not 0 <= count <= self._size:
      raise tarfile.ReadError(f'a header of {count:,} bytes')
    return self._opened.read(count)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
  """The next header of a tar.

  Raises:
    TarError: it is broken, or leads back, which would be read for ever.
  """
  before = tar.offset
  try:
    member = tar.next()
  except tarfile.TarError:
    raise
  except (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError) as error:
    raise tarfile.ReadError(f'a header at byte {before:,} ({error})') from error
  if member is not None and (member.size < 0 or tar.offset < member.offset_data):
    raise tarfile.ReadError(f'{member.name!r} has {member.size:,} bytes')
  return member


def _read_headers(file: Path, opened) -> tuple[list[Sample], int]:
  """(the samples of a tar, where its last member ends)."""
  found: list[Sample] = []
  members: dict[str, Place] = {}  # of the last sample
  end = 0
  with tarfile.open(fileobj=opened, mode='r:') as tar:
    while (member := _next(tar)) is not None:
      tar.members = []  # which would else have every header
      size = 0 if not member.isreg() else member.size
      end = member.offset_data + -(-size // BLOCK) * BLOCK
      if member.issym() or member.islnk() or member.issparse():
        raise ValueError(f'{member.name!r} of {file} is a link or sparse: store the file itself')
      key, suffix = _key_of(member.name)
      if not member.isreg() or not key or not suffix:
        continue
      if not found or found[-1].key != key:
        members = {}
        found.append(Sample(file, key, members))
      if suffix in members:
        raise ValueError(f'{found[-1]} has two members .{suffix}')
      members[suffix] = Place(member.offset_data, member.size)
  return found, end


def _key_of(name: str) -> tuple[str, str]:
  """(the name of a sample, the suffix in small letters) of a member; '' for a hidden file."""
  folder, slash, file = name.rpartition('/')
  stem, _, suffix = file.partition('.')
  if not stem:
    return '', ''
  return f'{folder}{slash}{stem}', suffix.lower()


# ---- Members.


def _members(
  spec: str, splits: Iterable[Sequence[Sample]], options: Mapping[str, str], several: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
  """({part of an example: its member, or a field of one as 'json.text'}, those of the label).

  Args:
    spec: for messages.
    splits: the samples of each; the fields of a JSON are those of the first one in any split.
    options: {part: what was named}.
    several: whether a label may be several of them, with commas.

  Raises:
    ValueError: no such member in any sample, or several that may be meant.
  """
  members: dict[str, None] = {}
  fields: dict[str, None] = {}
  for samples in splits:
    members |= dict.fromkeys(name for sample in samples for name in sample.members)
    first = next((sample for sample in samples if 'json' in sample.members), None)
    if first is not None:
      fields |= dict.fromkeys(f'json.{name}' for name in _json(first))
  there = [*members, *fields]
  names = dict(options)
  if 'image' not in names and 'text' not in names:
    images = [name for name in there if name in IMAGES]
    if len(images) == 1:
      names['image'] = images[0]
    elif not images:
      _choose(names, 'text', ('txt', 'json.text'), there)
  _choose(names, 'label', ('cls', 'json.label'), there)
  for parts in (('image', 'text'), ('label',)):
    if not set(parts) & set(names):
      raise ValueError(
        f'webdataset:{spec}: which member is the {" or ".join(parts)}? Say it, as in '
        f'{parts[0]}=NAME; samples have {", ".join(there)}'
      )
  if {'image', 'text'} <= set(names) or ('pair' in names and 'text' not in names):
    raise ValueError(f'webdataset:{spec}: an example is an image, or a text that may have a pair')
  said = names.pop('label')
  label: tuple[str, ...] = (said,)
  if several and said not in there:
    label = tuple(said.split(','))
  for name in (*names.values(), *label):
    if name not in there:
      raise ValueError(f'webdataset:{spec}: no sample has {name!r}; {suggestion(name, there)}')
  return names, label


def _choose(names: dict[str, str], part: str, usual: Iterable[str], there: Sequence[str]) -> None:
  """Gives a part that is not named the first of the usual members that is there."""
  for name in usual:
    if name in there:
      names.setdefault(part, name)


def _check_members(samples: Iterable[Sample], names: Mapping[str, str]) -> None:
  """Raises a ValueError if a sample has no member for its image or a text."""
  for sample in samples:
    for part, name in names.items():
      member = name.partition('.')[0] if name.startswith('json.') else name
      if member not in sample.members:
        there = ', '.join(f'.{other}' for other in sample.members)
        raise ValueError(f'{sample} has no .{member} for its {part}; it has {there}')


def _value(sample: Sample, name: str) -> Any:
  """What a member says, or a field of its JSON; None where there is none."""
  if name.startswith('json.') and name not in sample.members:
    if 'json' not in sample.members:
      return None
    return _json(sample).get(name.removeprefix('json.'))
  if name not in sample.members:
    return None
  try:
    return sample.bytes_of(name).decode().strip()
  except UnicodeDecodeError as error:
    raise ValueError(f'{sample}: its .{name} is not UTF-8 text ({error.reason})') from error


def _json(sample: Sample) -> dict[str, Any]:
  return json_object(sample.bytes_of('json'), f'{sample}: its .json')


def _text(sample: Sample, name: str) -> str:
  value = _value(sample, name)
  if not isinstance(value, str):
    raise ValueError(f'{sample} has {value!r} as its {name!r}; it must be a text')
  return value


def _pixels(sample: Sample, name: str) -> np.ndarray:
  return decode(sample.bytes_of(name), f'.{name} of {sample}')
