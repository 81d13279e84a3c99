"""The folder of a run: entering it, and opening the run that it describes.

config.json      the whole configuration; the same command goes on with the run
run.json         labels, what was found out about them (`Task.facts`), modules to import; SHA-256
                 of the data (see `examples`), of the backbone, of the files it came from and of
                 the theta file that the run started from
checkpoints/     the training state, by step
labels.json      scores of each label, of tasks that have them
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
from typing import Any

from jpeft import config as config_lib
from jpeft import tasks
from jpeft.writing import told, write

from .build import build
from .checkpoints import fingerprint, load_theta
from .examples import check_same
from .imports import check_imported


@contextlib.contextmanager
def claimed(folder: pathlib.Path, config):
  """Checks that `folder` may be the folder of this run, and locks it against other processes.

  Raises:
    ValueError: it has other files, the run of another config, or another process writes it.
  """
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
    if kept.exists():
      differing = config_lib.differences(config, config_lib.from_json(kept))
      # What is to be done with broken examples may be chosen when the first has been met.
      differing = [one for one in differing if not one.startswith('data.on_error ')]
      if differing:
        raise ValueError(
          f'{folder} holds a run with another config: {"; ".join(differing)}. Choose another '
          '--workdir, or give the same values to go on with that run'
        )
    yield


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in folder.iterdir() if not path.name.startswith('.')]


def begin(folder: pathlib.Path, config, **facts) -> None:
  """Writes config.json and run.json, or checks that backbone and data of the run are the same.

  To be called when everything that can be wrong with a config has been tried: then a corrected
  command may use the folder.

  Raises:
    ValueError: they have changed.
  """
  write(folder / 'config.json', config_lib.to_json(config))
  file = folder / 'run.json'
  if not file.exists():
    write(file, json.dumps(facts, indent=2) + '\n')
    return
  kept = json.loads(file.read_text())
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
  info = json.loads((folder / 'run.json').read_text())
  # Before the config is read, whose values may be known only after the import.
  check_imported(folder, info.get('imports', ()))
  return config_lib.from_json(folder / 'config.json'), info


def reopen(folder: pathlib.Path, best: bool = False) -> tuple[Any, Any, Any]:
  """(pretrained, tuned, theta) of a run folder.

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
  pretrained, tuned = build(config, tasks.of(config).outputs(info['labels']))
  theta, _ = load_theta(file, tuned.shapes)
  if fingerprint(pretrained.variables) != info['backbone_sha256']:
    raise ValueError(
      f'the backbone {config.model.source} is not the one that {folder} was trained on: '
      'its SHA-256 has changed'
    )
  return pretrained, tuned, theta
