"""Tables of one's own in Parquet and Arrow files, read by row.

    parquet:PATH, arrow:PATH                     a file, which is divided: 80 % 'train', 20 % 'test'
    parquet:FOLDER, arrow:FOLDER                 files for each split, see `shards`
    parquet:PATH?text=sentence&label=y           which columns are what, see `columns`
    parquet:PATH?tags=ner_tags&names=O,B-PER     names of tags that are numbers
    arrow:PATH?unlabelled=skip                   what becomes of rows without a label

Arrow files are IPC files or streams, such as those that `datasets` saves. They are mapped into
memory, and a row is read where it lies, unless the file is compressed. Parquet has rows in groups:
that of a row is read as a whole, the columns that are used alone, and the groups that were used
last are kept, up to CACHED bytes in all.
"""

import bisect
import collections
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jpeft import textfiles
from jpeft.lazy import extra

from ..labels import CLASSES
from ..source import Dataset
from .by_row import dataset_of
from .columns import OPTIONS
from .files import options_of
from .rows import Rows
from .shards import shards_of

CACHED = 256 * 2**20  # bytes


def parquet(spec: str, labels: str = CLASSES) -> Dataset:
  """The rows of Parquet files, with labels of a kind (see `..labels`).

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no Parquet, or columns that are missing or may be several, see `dataset_of`.
  """
  found = _tables(spec, 'parquet', ('.parquet', '.pq'), _Parquet)
  tables = [table for tables in found[1].values() for table in tables]
  dataset = dataset_of(*found, labels)
  size = sum(table.size() for table in tables)
  if size > CACHED:
    note = (
      f'{found[0].partition("?")[0]} has {size / 2**30:.1f} GiB, and {CACHED / 2**20:.0f} MiB of '
      'its groups of rows are kept: in a mixed order most rows read a whole group; written as '
      'Arrow, a row is read by itself'
    )
    dataset = dataset._replace(notes=(*dataset.notes, note))
  return dataset


def arrow(spec: str, labels: str = CLASSES) -> Dataset:
  """The rows of Arrow files, IPC files or streams, with labels of a kind (see `..labels`).

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: no Arrow, or columns that are missing or may be several, see `dataset_of`.
  """
  return dataset_of(*_tables(spec, 'arrow', ('.arrow', '.feather'), _Arrow), labels)


def _tables(
  spec: str, kind: str, suffixes: tuple[str, ...], opened: Callable[[Path, '_Cache'], Rows]
) -> tuple[str, dict[str, list[Any]], dict[str, str]]:
  """(name of the source, {split: its tables}, options) of a spec."""
  with extra('datasets'):
    import pyarrow  # noqa: F401
  path, options = options_of(spec, kind, OPTIONS, {})
  cache = _Cache(CACHED)
  tables = {}
  for split, files in shards_of(path, suffixes).items():
    tables[split] = [opened(file, cache) for file in files]
  return f'{kind}:{spec}', tables, options


class _Cache:
  """What was read last, up to a number of bytes; one item more than fits is kept in any case."""

  def __init__(self, bytes_kept: int):
    self._most = bytes_kept
    self._size = 0
    self._kept: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: Any, read: Callable[[], Any]) -> Any:
    """The item of a key: with `nbytes`, as read() returns it."""
    with self._lock:  # two threads would else read the same
      if key in self._kept:
        self._kept.move_to_end(key)
        return self._kept[key]
      item = read()
      self._kept[key] = item
      self._size += item.nbytes
      while self._size > self._most and len(self._kept) > 1:
        _, oldest = self._kept.popitem(last=False)
        self._size -= oldest.nbytes
      return item


class _Parquet:
  """A Parquet file as `Rows`."""

  def __init__(self, file: Path, cache: _Cache):
    from pyarrow import ArrowException, parquet

    self.name = str(file)
    self._cache = cache
    textfiles.check_regular(file)
    try:
      self._file = parquet.ParquetFile(file)
      self.schema = self._file.schema_arrow
      _check_names(self.schema)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
      raise ValueError(f'{file} is no Parquet file ({_first_line(error)})') from error
    self._meta = self._file.metadata
    self._groups = range(self._meta.num_row_groups)
    sizes = (self._meta.row_group(group).num_rows for group in self._groups)
    self._starts = [0, *itertools.accumulate(sizes)]

  def __len__(self) -> int:
    return self._starts[-1]

  def row(self, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    group = bisect.bisect_right(self._starts, number) - 1

    def read():
      return self._group(group, columns)

    rows = self._cache.get((self.name, group, columns), read)
    return rows.slice(number - self._starts[group], 1).to_pylist()[0]

  def chunks(self, columns: tuple[str, ...]) -> Iterator[Any]:
    for group in self._groups:
      yield self._group(group, columns)

  def _group(self, group: int, columns: tuple[str, ...]):
    from pyarrow import ArrowException

    first, end = self._starts[group : group + 2]
    try:
      rows = self._file.read_row_group(group, columns=list(columns))
    except (ArrowException, OSError) as error:
      raise ValueError(
        f'{self.name} cannot be read from row {first} on ({_first_line(error)})'
      ) from error
    if columns and len(rows) != end - first:
      raise ValueError(
        f'{self.name} has {len(rows)} rows from row {first} on, and says that it has {end - first}'
      )
    return rows

  def may_have_nulls(self, column: str) -> bool:
    # By the column itself: where statistics are damaged, pyarrow ends the process to say so.
    if not self.schema.field(column).nullable:
      return False
    return any(chunk[column].null_count for chunk in self.chunks((column,)))

  def size(self) -> int:
    """Bytes of all rows, uncompressed."""
    return sum(self._meta.row_group(group).total_byte_size for group in self._groups)


class _Arrow:
  """An Arrow file as `Rows`."""

  def __init__(self, file: Path, cache: _Cache):
    import pyarrow

    self.name = str(file)
    self._cache = cache
    textfiles.check_regular(file)
    try:
      self._open(pyarrow.memory_map(str(file)))
      _check_names(self.schema)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      raise ValueError(
        f'{file} is no Arrow file, neither an IPC file nor a stream ({_first_line(error)})'
      ) from error

  def _open(self, mapped) -> None:
    from pyarrow import ArrowInvalid, ipc

    try:
      reader = ipc.open_file(mapped)
    except ArrowInvalid:
      mapped.seek(0)
      reader = ipc.open_stream(mapped)
      batches = list(reader)  # their buffers stay in the file
      self._batch = batches.__getitem__
      self._batches = range(len(batches))
    else:
      self._batch = reader.get_batch
      self._batches = range(reader.num_record_batches)
    self.schema = reader.schema
    sizes = (self._batch(number).num_rows for number in self._batches)
    self._starts = [0, *itertools.accumulate(sizes)]

  def __len__(self) -> int:
    return self._starts[-1]

  def row(self, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    batch = bisect.bisect_right(self._starts, number) - 1

    def read():
      return self._checked(batch, columns)

    rows = self._cache.get((self.name, batch, columns), read)
    return rows.slice(number - self._starts[batch], 1).to_pylist()[0]

  def chunks(self, columns: tuple[str, ...]) -> Iterator[Any]:
    for number in self._batches:
      yield self._checked(number, columns)

  def _checked(self, number: int, columns: tuple[str, ...]):
    """Some columns of a batch, whose offsets and numbers were seen to stay within it.

    Its buffers are those of the file, and pyarrow itself reads wherever they point to.
    """
    from pyarrow import ArrowException

    try:
      batch = self._batch(number).select(list(columns))
      for column in batch.columns:
        _check_column(column)
    except (ArrowException, OSError, IndexError) as error:
      first = self._starts[number]
      raise ValueError(
        f'{self.name} cannot be read from row {first} on ({_first_line(error)})'
      ) from error
    return batch

  def may_have_nulls(self, column: str) -> bool:
    return any(batch[column].null_count for batch in self.chunks((column,)))


def _check_names(schema) -> None:
  """Raises a UnicodeDecodeError if the name of a column is no text, which pyarrow reads late."""
  tuple(schema.names)


def _check_column(column) -> None:
  """Raises an ArrowException if what a column says of itself is not so."""
  from pyarrow import ArrowInvalid

  try:
    column.validate(full=True)
  except ArrowInvalid as error:
    if 'UTF8' not in str(error):  # which is told with its row, by whom reads it
      raise


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0] or type(error).__name__
