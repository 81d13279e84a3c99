"""Trackers get what metrics.jsonl gets, each line once, and never end a run."""

import csv
import json
import struct

import pytest

import jpeft
from jpeft import cli, training
from jpeft.training import writers
from jpeft.training.metrics import Metrics, read_metrics, values
from tests.limits import files_of


class Killer(training.Writer):
  """Ends the run as a kill would, at its first line of an update; later runs are left alone."""

  armed: int | None = None
  seen: list = []

  def config(self, values):
    self.seen.append(values)

  def scalars(self, step, split, values):
    self.seen.append((step, split, values))
    if step == Killer.armed:
      Killer.armed = None
      raise KeyboardInterrupt


def make_killer(opened):
  return Killer()


jpeft.register_writer('killer', make_killer)


def killed_and_resumed(load, folder, tracker):
  """The lines of metrics.jsonl of a run that was killed at update 8, of 12, and went on from 6."""
  settings = load('linear', **{'log.to': f"('{tracker}', 'killer')"})
  Killer.armed = 8
  with pytest.raises(KeyboardInterrupt):
    training.train(settings, folder)
  assert read_metrics(folder / 'metrics.jsonl')[-1]['step'] == 8
  training.train(settings, folder)
  rows = read_metrics(folder / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [2, 4, 6, 6, 8, 10, 12, 12]
  return rows


def points(rows):
  """{(metric, step): value} of lines of metrics.jsonl."""
  return {(f'{r["split"]}/{n}', r['step']): v for r in rows for n, v in values(r).items()}


def test_csv_has_the_lines_of_the_log(tmp_path):
  log = Metrics(tmp_path / 'metrics.jsonl', 0)
  with_csv = writers.Writers(('csv',), tmp_path, 0, log.rows, print)
  log.copied_to(with_csv)
  log.add(2, 'train', loss=0.1, lr=1e-3)
  log.add(4, 'train', loss=1 / 3, lr=1e-3)
  log.add(4, 'test', loss=2.5, accuracy=float('nan'))
  log.add(6, 'train', loss=0.25, lr=5e-4)
  text = (
    'step,split,loss,lr,accuracy\n2,train,0.1,0.001,\n4,train,0.3333333333333333,0.001,\n'
    '4,test,2.5,,nan\n'
  )
  assert (tmp_path / 'metrics.csv').read_text() == text + '6,train,0.25,0.0005,\n'
  # A kill cuts a line short; the run goes on from update 4.
  (tmp_path / 'metrics.csv').write_text(text + '6,tra')
  log = Metrics(tmp_path / 'metrics.jsonl', 4)
  log.copied_to(writers.Writers(('csv',), tmp_path, 4, log.rows, print))
  log.add(6, 'train', loss=0.25, lr=5e-4)
  assert (tmp_path / 'metrics.csv').read_text() == text + '6,train,0.25,0.0005,\n'


def test_csv_and_a_tracker_of_ones_own_after_a_kill(load, tmp_path):
  Killer.seen.clear()
  rows = killed_and_resumed(load, tmp_path, 'csv')
  with (tmp_path / 'metrics.csv').open(newline='') as file:
    table = list(csv.DictReader(file))
  found = {
    (f'{row["split"]}/{name}', int(row['step'])): float(value)
    for row in table
    for name, value in row.items()
    if name not in ('step', 'split') and value
  }
  assert found == points(rows) and len(table) == len(rows)
  # It is given the configuration once, and a line again that it may have lost.
  assert Killer.seen[0]['method.name'] == 'linear'
  lines = [(step, split) for step, split, _ in Killer.seen[1:]]
  assert lines == [(r['step'], r['split']) for r in (*rows[:5], *rows[4:])]
  # What has to be imported for the config to be read again.
  info = json.loads((tmp_path / 'run.json').read_text())
  assert info['imports'] == [cli.reference_of(__name__)]


def test_tensorboard_by_either_name(load):
  assert writers.trackers_of(load(**{'log.tensorboard': True})) == ('tensorboard',)
  both = load(**{'log.tensorboard': True, 'log.to': "('tensorboard', 'csv')"})
  assert writers.trackers_of(both) == ('tensorboard', 'csv')
  with pytest.raises(ValueError, match='log.to must be some of tensorboard, csv, wandb, mlflow'):
    load(**{'log.to': "('comet',)"})
  with pytest.raises(ValueError, match="'csv' is a tracker of jpeft"):
    jpeft.register_writer('csv', make_killer)


def test_mlflow_goes_on_with_its_run(load, tmp_path, monkeypatch, capsys):
  mlflow = pytest.importorskip('mlflow')
  for name in ('MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_NAME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  rows = killed_and_resumed(load, tmp_path / 'run', 'mlflow')
  uri = (tmp_path / 'run/mlflow').as_uri()
  assert f'mlflow: in files; `mlflow ui --backend-store-uri {uri}`' in capsys.readouterr().err
  client = mlflow.MlflowClient(uri)
  experiment = client.get_experiment_by_name('jpeft')
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_name == 'run' and run.info.status == 'FINISHED'
  assert run.data.params['method.name'] == 'linear' and run.data.params['steps'] == '12'
  history = [
    m for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)
  ]
  assert {(m.key, m.step): m.value for m in history} == points(rows)
  assert len(history) == len(points(rows))


def test_wandb_goes_on_with_its_run_offline(load, tmp_path, monkeypatch, capsys):
  pytest.importorskip('wandb')
  monkeypatch.delenv('WANDB_MODE', raising=False)
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  monkeypatch.setenv('NETRC', str(tmp_path / 'none'))
  rows = killed_and_resumed(load, tmp_path / 'run', 'wandb')
  told = capsys.readouterr().err
  assert f'wandb: offline, in {tmp_path}/run/wandb/offline-run' in told
  number = json.loads((tmp_path / 'run/trackers.json').read_text())['wandb']['id']
  files = sorted((tmp_path / 'run/wandb').glob(f'offline-run-*-{number}/run-{number}.wandb'))
  assert len(files) == 2
  found = [point for file in files for point in wandb_points(file)]
  assert dict(found) == points(rows) and len(found) == len(points(rows))


def wandb_points(file):
  """((metric, step), value) of each number in a file of wandb."""
  from wandb.proto import wandb_internal_pb2

  for data in level_log(file.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    for item in record.history.item:
      name = item.key or '/'.join(item.nested_key)
      if not name.startswith('_'):
        yield (name, record.history.step.num), json.loads(item.value_json)


def level_log(data):
  """The records of a log of LevelDB that stands behind a head of 7 bytes.

  A block of 32 KiB has parts, each behind its checksum (4 bytes), length (2) and kind (1): 1 is a
  whole record, 2 its first part, 3 one in the middle, 4 its last.
  """
  at = 7
  record = b''
  while at + 7 <= len(data):
    if 2**15 - at % 2**15 < 7:  # too short for another part
      at += 2**15 - at % 2**15
      continue
    size, kind = struct.unpack_from('<HB', data, at + 4)
    part = data[at + 7 : at + 7 + size]
    at += 7 + size
    record = part if kind in (1, 2) else record + part
    if kind in (1, 4):
      yield record


class Failing(training.Writer):
  def scalars(self, step, split, values):
    raise ConnectionError('no route\nto host')


def make_failing(opened):
  return Failing()


def make_broken(opened):
  raise ConnectionError('no route to host')


jpeft.register_writer('failing', make_failing)
jpeft.register_writer('broken', make_broken)


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(load, tmp_path, capsys):
  told = training.train(load('linear', **{'log.to': "('failing', 'csv')"}), tmp_path)
  assert told['steps'] == 12
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('warning')]
  assert lines == [
    "warning: the tracker 'failing' failed and is left out from now on (ConnectionError: no route "
    'to host); metrics.jsonl has everything'
  ]
  assert len((tmp_path / 'metrics.csv').read_text().splitlines()) == 1 + 8


def test_one_that_cannot_be_opened_stops_a_run_at_its_start_alone(load, tmp_path, capsys):
  with pytest.raises(cli.Mistake, match="the tracker 'broken' cannot be opened: ConnectionError"):
    training.train(load('linear', **{'log.to': "('broken',)"}), tmp_path)
  told = []
  writers.Writers(('broken', 'csv'), tmp_path, 3, [], told.append)
  assert len(told) == 1 and told[0].startswith("warning: the tracker 'broken' failed")


def test_a_full_disk_ends_a_tracker_and_not_the_run(tmp_path):
  told = []
  open_writers = writers.Writers(('tensorboard', 'csv'), tmp_path, 0, [], told.append)
  with files_of(2000):
    for step in range(200):
      open_writers.scalars(step, 'train', {'loss': 1.0})
  open_writers.close()
  assert len(told) == 2 and all('failed and is left out from now on' in line for line in told)
  assert "'tensorboard'" in told[0] and 'File too large' in told[0]
  assert "'csv'" in told[1] and 'metrics.csv cannot be written: it would be longer' in told[1]
