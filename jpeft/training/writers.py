"""Trackers: where the lines of metrics.jsonl go besides, as `log.to` names them.

tensorboard   event files in RUN/tensorboard
csv           RUN/metrics.csv
wandb         Weights & Biases; RUN/wandb where there is no login, or by WANDB_MODE
mlflow        the server or store of MLFLOW_TRACKING_URI; RUN/mlflow if it is not set
"""

import csv
import io
import json
import netrc
import os
import pathlib
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jpeft import jsonfiles
from jpeft.config import TRACKERS, allow
from jpeft.lazy import extra
from jpeft.registering import module_of
from jpeft.writing import append, write

from . import event_file

KEPT = 'trackers.json'  # in the folder of a run: what its trackers need to go on with it
PROJECT = 'jpeft'  # of wandb, and the experiment of mlflow, where the user names none


class Opened(NamedTuple):
  """What a tracker is opened with.

  Attributes:
    folder: of the run.
    step: the update from which the run goes on; 0 at its start.
    rows: the lines of metrics.jsonl up to this update.
    kept: JSON values that the tracker finds again when the run goes on, such as an id; to be
      changed in place.
  """

  folder: pathlib.Path
  step: int
  rows: list[dict]
  kept: dict[str, Any]


class Writer:
  """A tracker of one run; one of your own overrides `scalars`, and what else it needs.

  An error in a method ends the tracker and not the run.

  Attributes:
    told: where it writes, for the user; '' for nothing.
    lasting: whether what it has written stays when the run goes back to a checkpoint. Then no line
      is written twice; else, lines after `Opened.step` come again.
  """

  told = ''
  lasting = False

  def config(self, values: dict[str, Any]) -> None:
    """Writes the configuration, {dotted key: value}, at the start of a run."""

  def scalars(self, step: int, split: str, values: dict[str, float]) -> None:
    """Writes a line of metrics.jsonl: what was measured after `step` updates."""
    raise NotImplementedError

  def close(self) -> None:
    """Ends it; the run may go on later."""


# ---- Those of jpeft.


class TensorBoard(Writer):
  """Event files."""

  def __init__(self, opened: Opened):
    # Events of updates that come again are taken for gone.
    self._events = event_file.EventFile(opened.folder / 'tensorboard', opened.step + 1)

  def config(self, values):
    lines = [f'    {name}: {value}' for name, value in values.items()]  # Markdown, as it stands
    self._events.text('config', '\n'.join(lines))

  def scalars(self, step, split, values):
    self._events.scalars(step, {f'{split}/{name}': value for name, value in values.items()})

  def close(self):
    self._events.close()


class Csv(Writer):
  """metrics.csv: the lines of metrics.jsonl as a table, without their times.

  Columns: step, split, and a metric each. What a line does not have is empty.
  """

  def __init__(self, opened: Opened):
    self._path = opened.folder / 'metrics.csv'
    self._columns: list[str] = ['step', 'split']
    self._rows: list[dict] = []
    for row in opened.rows:
      self._take({name: value for name, value in row.items() if name != 'time'})
    self._write_all()

  def scalars(self, step, split, values):
    row = {'step': step, 'split': split, **values}
    if self._take(row):
      self._write_all()
      return
    line = io.StringIO()
    self._table(line).writerow(row)
    append(self._path, line.getvalue())

  def _take(self, row: dict) -> bool:
    """Adds a row; returns whether it has new columns."""
    new = [name for name in row if name not in self._columns]
    self._columns += new
    self._rows.append(row)
    return bool(new)

  def _write_all(self) -> None:
    text = io.StringIO()
    table = self._table(text)
    table.writeheader()
    table.writerows(self._rows)
    write(self._path, text.getvalue())

  def _table(self, file) -> csv.DictWriter:
    return csv.DictWriter(file, self._columns, lineterminator='\n')


class Wandb(Writer):
  """A run of Weights & Biases, on its server or in files that `wandb sync` sends there."""

  lasting = True

  def __init__(self, opened: Opened):
    wandb = _wandb()
    mode = None  # as WANDB_MODE or wandb's own settings say
    if 'WANDB_MODE' not in os.environ and not _logged_in():
      mode = 'offline'
    kept = opened.kept
    kept.setdefault('id', os.urandom(4).hex())
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      name=opened.folder.absolute().name,
      id=kept['id'],
      resume='allow',
      dir=str(opened.folder.absolute()),
      mode=mode,
      # The terminal is for the line of progress.
      settings=wandb.Settings(silent=True, console='off'),
    )
    if self._run.url:
      self.told = f'wandb: {self._run.url}'
    elif not self._run.disabled:
      files = pathlib.Path(self._run.dir).parent
      self.told = f'wandb: offline, in {files}; `wandb sync {files}` sends it'

  def config(self, values):
    self._run.config.update(values, allow_val_change=True)

  def scalars(self, step, split, values):
    self._run.log({f'{split}/{name}': value for name, value in values.items()}, step=step)

  def close(self):
    self._run.finish()


class Mlflow(Writer):
  """A run of MLflow, on a server, in a database or in files."""

  lasting = True

  def __init__(self, opened: Opened):
    self._mlflow = _mlflow()
    uri = None  # as MLFLOW_TRACKING_URI or mlflow.set_tracking_uri say
    if self._mlflow.is_tracking_uri_set():
      self.told = f'mlflow: {self._mlflow.get_tracking_uri()}'
    else:
      # A database needs more than mlflow-skinny has; mlflow 3 takes files if it is told so.
      os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')
      uri = (opened.folder / 'mlflow').absolute().as_uri()
      self.told = f'mlflow: in files; `mlflow ui --backend-store-uri {uri}` shows them'
    self._client = self._mlflow.MlflowClient(uri)
    kept = opened.kept
    if 'id' in kept:
      self._client.update_run(kept['id'], status='RUNNING')
    else:
      name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
      experiment = self._client.get_experiment_by_name(name)
      number = experiment.experiment_id if experiment else self._client.create_experiment(name)
      run = self._client.create_run(number, run_name=opened.folder.absolute().name)
      kept['id'] = run.info.run_id
    self._id = kept['id']

  def config(self, values):
    params = [self._mlflow.entities.Param(name, str(value)) for name, value in values.items()]
    for start in range(0, len(params), 100):  # the most that a server takes at once
      self._client.log_batch(self._id, params=params[start : start + 100])

  def scalars(self, step, split, values):
    now = int(1000 * time.time())
    metrics = [
      self._mlflow.entities.Metric(f'{split}/{name}', value, now, step)
      for name, value in values.items()
    ]
    self._client.log_batch(self._id, metrics=metrics)

  def close(self):
    self._client.set_terminated(self._id)


def _wandb():
  with extra('wandb'):
    import wandb
  return wandb


def _mlflow():
  with extra('mlflow'):
    import mlflow
    import mlflow.entities
  return mlflow


def _logged_in() -> bool:
  """Whether wandb would find a key without asking for one."""
  if os.environ.get('WANDB_API_KEY') or os.environ.get('WANDB_IDENTITY_TOKEN_FILE'):
    return True
  host = urllib.parse.urlparse(os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')).hostname
  try:
    return netrc.netrc(os.environ.get('NETRC')).authenticators(host) is not None
  except (OSError, netrc.NetrcParseError):
    return False


# ---- The table of them.


class Known(NamedTuple):
  """A tracker.

  Attributes:
    make: Opened -> Writer.
    needs: imports its packages.
    module: where it was registered; None for one of jpeft.
  """

  make: Callable[[Opened], Writer]
  needs: Callable[[], Any] = lambda: None
  module: str | None = None


_KNOWN = {
  'tensorboard': Known(TensorBoard, event_file.parts),
  'csv': Known(Csv),
  'wandb': Known(Wandb, _wandb),
  'mlflow': Known(Mlflow, _mlflow),
}


def register_writer(name: str, make: Callable[[Opened], Writer]) -> None:
  """Adds a tracker that `log.to` may name.

  Args:
    name: in configurations.
    make: called before the first update of a run, and again where it goes on; see `Writer`.

  Raises:
    ValueError: jpeft has a tracker of that name.
  """
  if name in TRACKERS:
    raise ValueError(f'{name!r} is a tracker of jpeft: choose another name')
  _KNOWN[name] = Known(make, module=module_of(make))
  allow('log.to', name)


def writer_modules(config) -> list[str | None]:
  """The modules that registered the trackers of a configuration; None for those of jpeft."""
  return [_KNOWN[name].module for name in config.log.to]


def trackers_of(config) -> tuple[str, ...]:
  """The trackers that a configuration names, each once."""
  names = [*config.log.to]
  if config.log.tensorboard:
    names.append('tensorboard')
  return tuple(dict.fromkeys(names))


def check_trackers(names: Sequence[str]) -> None:
  """Raises an ImportError, which names the extra, if the package of a tracker is missing."""
  for name in names:
    _KNOWN[name].needs()


class Writers:
  """The trackers of a run. One that fails is told of once, and left out from then on."""

  def __init__(
    self,
    names: Sequence[str],
    folder: pathlib.Path,
    step: int,
    rows: list[dict],
    tell: Callable[[str], None],
  ):
    """Opens them, for a run that goes on from `step`.

    Args:
      names: from `trackers_of`.
      folder: of the run.
      step: how many updates are made.
      rows: the lines of metrics.jsonl up to there.
      tell: called with a line for the user: where a tracker writes, or that it failed.

    Raises:
      ValueError: one cannot be opened, at the start of the run.
    """
    self._file = folder / KEPT
    self._kept: dict[str, dict] = {}
    if self._file.exists():
      self._kept = jsonfiles.read(self._file, {str: dict})
    self._lines = len(rows)  # which have a number each: a run that goes on makes the same again
    self._open: dict[str, Writer] = {}
    self._tell = tell
    for name in names:
      kept = self._kept.setdefault(name, {})  # a tracker may change it
      try:
        writer = _KNOWN[name].make(Opened(folder, step, rows, kept))
      except Exception as error:
        if not step:
          raise ValueError(f'the tracker {name!r} cannot be opened: {_sentence(error)}') from error
        tell(_left_out(name, error))
        continue
      self._open[name] = writer
      if writer.told:
        tell(writer.told)
    if any(self._kept.values()):
      self._keep()

  def config(self, values: dict[str, Any]) -> None:
    """Gives all of them the configuration, {dotted key: value}."""
    for name in list(self._open):
      self._try(name, 'config', values)

  def scalars(self, step: int, split: str, values: dict[str, float]) -> None:
    """Gives all of them the next line of metrics.jsonl."""
    self._lines += 1
    for name, writer in list(self._open.items()):
      kept = self._kept[name]
      if writer.lasting and self._lines <= kept.get('lines', 0):
        continue
      self._try(name, 'scalars', step, split, values)
      if writer.lasting:
        kept['lines'] = self._lines
        self._keep()

  def close(self) -> None:
    """Ends all of them."""
    for name in list(self._open):
      self._try(name, 'close')
    self._open = {}

  def _try(self, name: str, method: str, *args: Any) -> None:
    try:
      getattr(self._open[name], method)(*args)
    except Exception as error:
      del self._open[name]
      self._tell(_left_out(name, error))

  def _keep(self) -> None:
    """Writes what the trackers need to go on."""
    write(self._file, json.dumps(self._kept) + '\n')


def _left_out(name: str, error: Exception) -> str:
  return (
    f'warning: the tracker {name!r} failed and is left out from now on ({_sentence(error)}); '
    'metrics.jsonl has everything'
  )


def _sentence(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text}' if text else type(error).__name__
