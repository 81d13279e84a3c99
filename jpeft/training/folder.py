"""A run and its folder: claiming it, building the tuned model that config.json describes, stopping.

config.json      the whole configuration; the same command goes on with the run
run.json         labels, SHA-256 of the backbone and of the files it came from
checkpoints/     the training state, by step
metrics.jsonl    one line a log interval and an evaluation
best.safetensors, theta.safetensors     theta of the best evaluation, and of the end
report.json, report.md, curves.png      written when the run is complete
"""

import contextlib
import fcntl
import json
import pathlib
from typing import Any

from jpeft import config as config_lib

from .build import build
from .checkpoints import fingerprint, load_theta, write


@contextlib.contextmanager
def claimed(folder: pathlib.Path, config):
  """Checks that `folder` may be, or is, the folder of this run, and keeps other processes out of
  it.

  Raises:
    ValueError: it holds something else, the run of another config, or another process writes it.
  """
  kept = folder / 'config.json'
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir {folder} is a file, not a folder')
  if (
    folder.is_dir()
    and not kept.exists()
    and any(not p.name.startswith('.') for p in folder.iterdir())
  ):
    raise ValueError(
      f'{folder} holds files but no config.json, so it is not the folder of a run: '
      'choose another --workdir'
    )
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'another process is training in {folder}') from None
    if kept.exists():
      differing = config_lib.differences(config, config_lib.from_json(kept))
      if differing:
        raise ValueError(
          f'{folder} holds a run with another config: {"; ".join(differing)}. Choose another '
          '--workdir, or give the same values to go on with that run'
        )
    yield


def reopen(folder: pathlib.Path, best: bool = False) -> tuple[Any, Any, Any]:
  """(pretrained, tuned, theta) of a run folder.

  Args:
    folder: of a run.
    best: theta of the best evaluation rather than of the end.

  Raises:
    ValueError, FileNotFoundError: not a run folder, not far enough, or the backbone has changed.
  """
  config, about = describe(folder)
  file = folder / ('best.safetensors' if best else 'theta.safetensors')
  if not file.exists():
    raise FileNotFoundError(
      f'{folder} has no {file.name}: the run is not complete; start its training '
      'command again, it goes on where it stopped'
    )
  pretrained, tuned = build(config, len(about['labels']))
  theta, _ = load_theta(file, tuned.shapes)
  if fingerprint(pretrained.variables) != about['backbone_sha256']:
    raise ValueError(
      f'the backbone {config.model.source} is not the one that {folder} was trained on: '
      'its SHA-256 has changed'
    )
  return pretrained, tuned, theta


def begin(folder: pathlib.Path, config, **facts) -> None:
  """Writes config.json and run.json, or checks that the run is still of the same backbone and
  labels.

  Called when all that can be wrong with a config has been tried: a command put right may use the
    folder.

  Raises:
    ValueError: it is not.
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


def describe(folder: pathlib.Path) -> tuple[Any, dict]:
  """(config, run.json) of a run folder.

  Raises:
    FileNotFoundError, ValueError: it is not one.
  """
  if not folder.is_dir():
    raise FileNotFoundError(f'there is no run folder {folder}')
  for name in ('config.json', 'run.json'):
    if not (folder / name).exists():
      raise FileNotFoundError(f'{folder} is not the folder of a run: it has no {name}')
  return config_lib.from_json(folder / 'config.json'), json.loads((folder / 'run.json').read_text())
