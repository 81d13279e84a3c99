"""The folder of a run: entering it, and opening the run that it describes.

config.json      the whole configuration; the same command goes on with the run
run.json         labels, what was found out about them (`Task.facts`), modules to import; SHA-256
                 of the data (see `examples`), of the backbone, of the files it came from and of
                 the theta file that the run started from, and of what was found before training;
                 what was changed since by `--allow`, and after which update
checkpoints/     the training state, by step
labels.json      scores of each label, of tasks that have them
prepared.safetensors     what the method found in a pass before training, if it needs one
metrics.jsonl    one line a log interval and an evaluation
trackers.json    ids by which the trackers of `log.to` go on with the run, if there are such
best.safetensors, theta.safetensors     theta of the best evaluation, and of the end
report.md, curves.png, report.json      written when the run is complete, report.json last
damaged/         checkpoints that could not be read, if there are such
"""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft import config as config_lib
from jpeft import jsonfiles, tasks
from jpeft.writing import told, write

from . import elastic, hosts
from .build import build
from .checkpoints import fingerprint, load_theta, steps_of
from .examples import check_same
from .found import Prepared, kept_in
from .imports import check_imported

# Of run.json.
_RUN = {
  'labels': [str],
  'backbone_sha256': str,
  'facts?': (dict, None),
  'imports?': [str],
  'changes?': [elastic.CHANGE],
}
_PROCESSES = {'processes?': int}


@contextlib.contextmanager
def claimed(folder: pathlib.Path, config, allow: Sequence[str] = ()) -> Iterator[dict[str, list]]:
  """Checks that `folder` may be the folder of this run, and locks it against other processes.

  Args:
    folder: of the run.
    config: complete.
    allow: what may differ from the run in it, see `elastic.MAY_CHANGE`.

  Yields:
    {dotted key: [before, now]} of what differs.

  Raises:
    ValueError: it has other files, the run of another config, or another process writes it.
  """
  elastic.check_allowed(allow)
  kept = folder / 'config.json'
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir {folder} is a file, not a folder')
  if folder.is_dir() and not kept.exists() and _visible(folder):
    raise ValueError(
      f'{folder} holds files but no config.json, so it is not the folder of a run: '
      'choose another --workdir'
    )
  with told(folder, permissions=True):
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / '.lock').open('w')
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'another process is training in {folder}') from None
    except OSError as error:  # some network file systems have no locks
      raise ValueError(
        f'{folder} cannot be locked against other processes ({error.strerror}): choose a '
        '--workdir on another file system'
      ) from error
    changes: dict[str, list] = {}
    if kept.exists():
      changes = elastic.changed(config, config_lib.from_json(kept), allow, folder)
      changes = _with_processes(changes, allow, folder)
    yield changes


def _with_processes(
  changes: dict[str, list], allow: Sequence[str], folder: pathlib.Path
) -> dict[str, list]:
  """The changes, with that of the number of processes."""
  file = folder / 'run.json'
  if not file.exists():
    return changes
  before = jsonfiles.read(file, _PROCESSES).get('processes', 1)
  return elastic.with_hosts(changes, before, hosts.count(), allow, folder)


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in folder.iterdir() if not path.name.startswith('.')]


def begin(
  folder: pathlib.Path,
  config,
  changes: Mapping[str, list],
  prepared: Prepared | None = None,
  **facts,
) -> list[dict]:
  """Writes config.json and run.json, or checks that backbone and data of the run are the same.

  To be called when everything that can be wrong with a config has been tried: then a corrected
  command may use the folder.

  Args:
    folder: of the run.
    config: complete.
    changes: from `claimed`.
    prepared: what its method found before training; None if it needs nothing.
    **facts: what run.json gets.

  Returns:
    All changes since the run was begun, see `elastic.recorded`.

  Raises:
    ValueError: backbone or labels have changed.
  """
  file = folder / 'run.json'
  if not file.exists():
    write(folder / 'config.json', config_lib.to_json(config))
    if prepared is not None:
      prepared.save(folder)
      facts['prepared_sha256'] = prepared.sha256
    write(file, json.dumps(facts, indent=2) + '\n')
    return []
  kept = jsonfiles.read(file, _RUN)
  for name in ('labels', 'backbone_sha256'):
    if kept[name] != facts[name]:
      raise ValueError(
        f'{folder} was begun with other {name}: {kept[name]} there, {facts[name]} now'
      )
  if kept.get('facts', {}) != facts.get('facts', {}):
    raise ValueError(
      f'{folder} was begun with other labels to train on: their means or counts have changed; '
      'choose another --workdir'
    )
  check_same(folder, facts.get('data', {}))
  if changes:
    made = max(steps_of(folder / 'checkpoints'), default=0)
    kept['changes'] = elastic.recorded(kept, changes, made)
    kept['processes'] = facts['processes']
    write(file, json.dumps(kept, indent=2) + '\n')
    # Of the shorter run: without it this one is not complete.
    (folder / 'report.json').unlink(missing_ok=True)
  write(folder / 'config.json', config_lib.to_json(config))
  return kept.get('changes', [])


def describe(folder: pathlib.Path) -> tuple[Any, dict]:
  """(config, run.json) of a run folder.

  Raises:
    FileNotFoundError, ValueError: it is not one, or a module has to be imported first.
  """
  if not folder.is_dir():
    raise FileNotFoundError(f'there is no run folder {folder}')
  for name in ('config.json', 'run.json'):
    if not (folder / name).exists():
      raise FileNotFoundError(f'{folder} is not the folder of a run: it has no {name}')
  info = jsonfiles.read(folder / 'run.json', _RUN)
  # Before the config is read, whose values may be known only after the import.
  check_imported(folder, info.get('imports', ()))
  return config_lib.from_json(folder / 'config.json'), info


class Opened(NamedTuple):
  """The model of a run.

  Attributes:
    pretrained, tuned, theta: the backbone, the method attached to it, and what was trained.
    about: what its file says of theta, such as the 'step' that it is of.
  """

  pretrained: Any
  tuned: Any
  theta: Any
  about: dict[str, Any]


def reopen(folder: pathlib.Path, best: bool = False) -> tuple[Any, Any, Any]:
  """(pretrained, tuned, theta) of a run folder, see `opened`."""
  return opened(folder, best)[:3]


def opened(folder: pathlib.Path, best: bool = False) -> Opened:
  """The model of a run folder.

  Args:
    folder: of a run.
    best: theta of the best evaluation rather than of the end.

  Raises:
    ValueError, FileNotFoundError: not a run folder, not far enough, a module that has to be
      imported first, or the backbone has changed.
  """
  config, info = describe(folder)
  file = folder / ('best.safetensors' if best else 'theta.safetensors')
  if not file.exists():
    raise FileNotFoundError(
      f'{folder} has no {file.name}: the run is not complete; start its training '
      'command again, it goes on where it stopped'
    )
  outputs = tasks.of(config).outputs(info['labels'])
  pretrained, tuned = build(config, outputs, parts=False, found=kept_in(folder))
  theta, about = load_theta(file, tuned.shapes)
  if fingerprint(pretrained.variables) != info['backbone_sha256']:
    raise ValueError(
      f'the backbone {config.model.source} is not the one that {folder} was trained on: '
      'its SHA-256 has changed'
    )
  return Opened(pretrained, tuned, theta, about)
