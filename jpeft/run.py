"""A run and its folder: claiming it, building the tuned model that config.json describes, stopping.

    config.json      the whole configuration; the same command goes on with the run
    run.json         labels, SHA-256 of the backbone and of the files it came from
    checkpoints/     the training state, by step
    metrics.jsonl    one line a log interval and an evaluation
    best.safetensors, theta.safetensors     theta of the best evaluation, and of the end
    report.json, report.md, curves.png      written when the run is complete
"""

import argparse
import contextlib
import fcntl
import json
import math
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import optax

from jpeft import config as config_lib
from jpeft import methods, models, quant, tasks, training
from jpeft.core import Tuned, attach
from jpeft.training import fingerprint, load_theta, write


class Mistake(Exception):
  """What the user can put right: told in one sentence, exit code 2."""


class Stopped(Exception):
  """A signal ended the run after a checkpoint: exit code 128 + its number, as a shell counts."""

  def __init__(self, number: int, where: str):
    super().__init__(f'stopped by {signal.Signals(number).name}; {where}')
    self.code = 128 + number


class Diverged(Exception):
  """A loss or gradient is not finite: exit code 1."""


@contextlib.contextmanager
def inputs_checked():
  """Within it, what is raised about files, values and missing packages is a Mistake."""
  try:
    yield
  except (ValueError, OSError, RuntimeError, ImportError) as error:
    raise Mistake(' '.join(str(error).split())) from error


def command(name: str, main: Callable[[list[str]], int]) -> int:
  """Runs a command line: mistakes are one sentence on stderr; --traceback shows where they arose."""
  argv = [a for a in sys.argv[1:] if a != '--traceback']
  try:
    return main(argv)
  except (Mistake, Stopped, Diverged) as error:
    if '--traceback' in sys.argv:
      raise
    print(f'{name}: {"" if isinstance(error, Stopped) else "error: "}{error}', file=sys.stderr)
    return error.code if isinstance(error, Stopped) else 2 if isinstance(error, Mistake) else 1


class Watch:
  """Sees that losses and gradients are finite, one update late: the device need not be waited for.

  Attributes:
    loss: the last one that is known.
  """

  def __init__(self, split: str, checkpoints):
    self.loss, self._split, self._checkpoints, self._pending = float('nan'), split, checkpoints, None

  def see(self, number: int, indices, out: dict) -> None:
    """Takes note of an update, after a look at the one before."""
    self.catch_up()
    self._pending = number, indices, out

  def catch_up(self) -> None:
    """Looks at the last update.

    Raises:
      Diverged: its loss or gradient is not finite.
    """
    if self._pending is None:
      return
    (number, indices, out), self._pending = self._pending, None
    self.loss, norm = float(out['loss']), float(out['grad_norm'])
    if math.isfinite(self.loss) and math.isfinite(norm):
      return
    self._checkpoints.wait()
    last = self._checkpoints.latest
    raise Diverged(f'loss {self.loss}, gradient norm {norm} at update {number}, on the examples '
                   f'{", ".join(map(str, indices))} of {self._split!r}; '
                   + (f'the checkpoint of update {last} is intact' if last else 'there is no checkpoint yet')
                   + '; a lower optimizer.lr or an optimizer.clip_norm may help')


class Signals:
  """While open, SIGTERM and SIGINT ask for a clean end; a second one ends at once."""

  def __enter__(self):
    self.caught = None
    self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _ask(self, number, frame):
    self.caught = number
    signal.signal(number, self._before[number])

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def claimed(folder: pathlib.Path, config):
  """Checks that `folder` may be, or is, the folder of this run, and keeps other processes out of it.

  Raises:
    ValueError: it holds something else, the run of another config, or another process writes it.
  """
  kept = folder / 'config.json'
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'--workdir {folder} is a file, not a folder')
  if folder.is_dir() and not kept.exists() and any(not p.name.startswith('.') for p in folder.iterdir()):
    raise ValueError(f'{folder} holds files but no config.json, so it is not the folder of a run: '
                     'choose another --workdir')
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise ValueError(f'another process is training in {folder}') from None
    if kept.exists():
      differing = config_lib.differences(config, config_lib.from_json(kept))
      if differing:
        raise ValueError(f'{folder} holds a run with another config: {"; ".join(differing)}. Choose another '
                         '--workdir, or give the same values to go on with that run')
    yield


def method_of(config):
  """The method that the config names, from the registry.

  Raises:
    ValueError: no such method or hyperparameter, or a value that it does not take.
  """
  values = config.method.to_dict()
  name, head = values.pop('name'), values.pop('head')
  try:
    return methods.make(name, head=head, **values)
  except TypeError as error:
    raise ValueError(f'config.method: {name} does not take {values}: {error}') from error


def optimizer_of(config, tuned: Tuned, steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """(the learning rate of each of `steps` updates, the update rule) that the config names."""
  rate = training.schedule(lr=config.optimizer.lr, steps=steps, **config.schedule)
  choices = {k: v for k, v in config.optimizer.items() if k not in ('lr', 'accumulate', 'offload')}
  return rate, training.optimizer(tuned, tuned.shapes, rate, **choices)


def storage_of(config) -> str | None:
  """The name of the format of the backbone's kernels: what the config says, else the method's own; None for none."""
  return config.model.quantize or methods.REGISTRY[config.method.name].storage


def build(config, num_classes: int, load: Callable = models.load) -> tuple[Any, Any]:
  """(pretrained, tuned): the backbone, and the method attached to it.

  Args:
    config: of the run.
    num_classes: outputs of a fresh head; 0 for a model that writes text with its own.
    load: `models.load`, or `models.describe` where shapes will do.

  Raises:
    ValueError, OSError, RuntimeError: whatever is wrong with weights, method or patterns.
  """
  method = method_of(config)
  storage = storage_of(config)
  fields = config.model.to_dict() | {'num_classes': num_classes or None, 'seed': config.seed,
                                     'quantize': storage and quant.named(storage)}
  pretrained = load(fields.pop('source'), **fields)
  args, kwargs = tasks.inputs(tasks.of(config).blank(config, pretrained))
  return pretrained, attach(pretrained.model, method, pretrained.variables, *args, **kwargs,
                            deterministic=True)


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
    raise FileNotFoundError(f'{folder} has no {file.name}: the run is not complete; start its training '
                            'command again, it goes on where it stopped')
  pretrained, tuned = build(config, len(about['labels']))
  theta, _ = load_theta(file, tuned.shapes)
  if fingerprint(pretrained.variables) != about['backbone_sha256']:
    raise ValueError(f'the backbone {config.model.source} is not the one that {folder} was trained on: '
                     'its SHA-256 has changed')
  return pretrained, tuned, theta


def parser(name: str, doc: str, out: bool = False) -> argparse.ArgumentParser:
  """The flags of a command that opens a run: --run, --best and, where it writes a folder, --out."""
  found = argparse.ArgumentParser(name, description=doc.splitlines()[0])
  found.add_argument('--run', type=pathlib.Path, required=True, help='folder of a complete run')
  if out:
    found.add_argument('--out', type=pathlib.Path, required=True, help='folder to write, new or empty')
  found.add_argument('--best', action='store_true', help='theta of the best evaluation, not of the end')
  return found


def check_new(folder: pathlib.Path) -> None:
  """Raises ValueError where a command would write into a folder that holds something."""
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'--out {folder} is there already; give a new or empty folder')


def begin(folder: pathlib.Path, config, **facts) -> None:
  """Writes config.json and run.json, or checks that the run is still of the same backbone and labels.

  Called when all that can be wrong with a config has been tried: a command put right may use the folder.

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
      raise ValueError(f'{folder} was begun with other {name}: {kept[name]} there, {facts[name]} now')


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
