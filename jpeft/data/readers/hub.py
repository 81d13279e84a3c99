"""Data sets that the package `datasets` reads: of the Hugging Face hub, or of a local folder.

    hf:imdb, hf:stanfordnlp/imdb          of the hub, or what was fetched of it before
    hf:glue/sst2, hf:nyu-mll/glue/sst2    one of several configurations; also hf:glue?config=sst2
    hf:NAME?revision=abc                  a branch, tag or commit
    hf:FOLDER                             what `save_to_disk` wrote or `load_dataset` reads
    hf:NAME?text=sentence&label=y         which columns are what, see `columns`
    hf:NAME?tags=ner_tags&names=O,B-PER   names of tags that are numbers

Splits and classes are those of the data set. Rows lie in Arrow files that are mapped into memory.
Code that comes with a data set is never run: `datasets` from version 4 on does not.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jpeft.lazy import extra

from ..labels import CLASSES
from ..source import Dataset, suggestion
from .by_row import dataset_of
from .columns import OPTIONS
from .files import options_of

SAVED = ('dataset_dict.json', 'state.json')  # what `save_to_disk` writes into a folder


def hub(spec: str, data_dir: str | Path | None = None, labels: str = CLASSES) -> Dataset:
  """A data set that `datasets` reads.

  Args:
    spec: NAME[/CONFIG] or FOLDER, with options.
    data_dir: the cache of `datasets`; if left out, its own.
    labels: the kind that is wanted, see `..labels`.

  Raises:
    FileNotFoundError: no such folder, or no such data set here or on the hub.
    ValueError: what `datasets` refuses, or columns that are missing or may be several.
  """
  with extra('datasets'):
    import datasets

  path, options = options_of(spec, 'hf', (*OPTIONS, 'config', 'revision'), {})
  config = options.pop('config', None)
  revision = options.pop('revision', None)
  cache = None if data_dir is None else str(data_dir)
  name = path.as_posix()
  if path.is_file():
    raise ValueError(
      f'hf:{spec} is a file: give its folder, or {path.suffix[1:] or "csv"}:{path} where that is a '
      'source'
    )
  if path.is_dir():
    found = _local(path, config, cache)
  elif path.is_absolute() or name.startswith('.') or name.count('/') > 2:
    beside = []
    if path.parent.is_dir():
      beside = [other.name for other in path.parent.iterdir() if other.is_dir()]
    raise FileNotFoundError(f'there is no folder {path}; {suggestion(path.name, beside)}')
  else:
    found = _of_hub(name, config, revision, cache)
  if isinstance(found, datasets.Dataset):
    splits = {'': found}
  else:
    splits = {str(split): part for split, part in found.items()}
  tables = {split: [_Table(f"hf:{name}, '{split}'", part)] for split, part in splits.items()}
  return dataset_of(f'hf:{spec}', tables, options, labels)


def _local(path: Path, config: str | None, cache: str | None):
  """What a folder has."""
  import datasets

  try:
    if any((path / name).exists() for name in SAVED):
      return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), config, cache_dir=cache)
  except Exception as error:  # `datasets` raises what its readers of files do
    raise ValueError(f'hf:{path} is nothing that datasets reads ({_said(error)})') from error


def _of_hub(name: str, config: str | None, revision: str | None, cache: str | None):
  """A data set by its name. 'a/b' is b of the owner a, or the configuration b of a."""
  import datasets

  *owner_or_name, last = name.split('/')
  tries = []
  if len(owner_or_name) < 2:
    tries.append((name, config))
  if owner_or_name and config is None:
    tries.append(('/'.join(owner_or_name), last))
  if not tries:
    raise ValueError(f'hf:{name} names a configuration, {last!r}, and config={config} another')
  errors = []
  for repository, of in tries:
    try:
      return datasets.load_dataset(repository, of, revision=revision, cache_dir=cache)
    except Exception as error:  # of the hub, of the network, or of what was found
      errors.append(error)
  # What was found and refused says more than what was not found.
  told = next((error for error in errors if not isinstance(error, FileNotFoundError)), errors[0])
  if isinstance(told, (FileNotFoundError, ConnectionError)) or _is_network(told):
    raise FileNotFoundError(
      f'hf:{name} is not in the cache of datasets, and the hub does not give it ({_said(told)}): '
      'see to its name and the network, or fetch it elsewhere and name its folder, hf:FOLDER'
    ) from told
  raise ValueError(f'hf:{name} cannot be read ({_said(told)})') from told


def _is_network(error: Exception) -> bool:
  """Whether an error is one of the connection, as the packages below `datasets` raise them."""
  modules = ('requests', 'urllib3', 'httpx', 'huggingface_hub')
  return type(error).__module__.split('.')[0] in modules


def _said(error: Exception) -> str:
  """The first line of what an error says."""
  text = str(error).strip().partition('\n')[0]
  return f'{type(error).__name__}: {text}'


class _Table:
  """A split of `datasets` as `Rows`."""

  def __init__(self, name: str, dataset):
    self.name = name
    self._dataset = dataset.with_format('arrow')
    self.schema = dataset.features.arrow_schema
    # Choosing columns takes longer than reading a row.
    self._of = functools.lru_cache(8)(self._chosen)

  def _chosen(self, columns: tuple[str, ...]):
    return self._dataset.select_columns(list(columns))

  def __len__(self) -> int:
    return len(self._dataset)

  def row(self, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    return self._of(columns)[number].to_pylist()[0]

  def chunks(self, columns: tuple[str, ...]) -> Iterator[Any]:
    yield from self._of(columns).iter(batch_size=1000)

  def may_have_nulls(self, column: str) -> bool:
    return any(chunk[column].null_count for chunk in self.chunks((column,)))
