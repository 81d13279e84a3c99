"""Runs whose files were damaged, lost or cannot be written."""

import errno
import fcntl
import json
import re
import shutil

import pytest

from jpeft import cli, training, writing
from jpeft.training.checkpoints import is_theta
from jpeft.training.endings import resumable
from jpeft.training.metrics import read_metrics


@pytest.fixture(scope='module')
def complete(config_file, tmp_path_factory):
  """(folder of a complete run of 12 updates, its report)."""
  from jpeft import config

  folder = tmp_path_factory.mktemp('complete') / 'run'
  return folder, training.train(config.load(f'{config_file}:linear', {}), folder)


@pytest.fixture
def run(complete, tmp_path):
  """A copy of that folder."""
  return shutil.copytree(complete[0], tmp_path / 'run')


@pytest.fixture
def again(run, load, capsys):
  """again() -> (the report of the run started again, what it has told)."""

  def started():
    report = training.train(load('linear'), run)
    return report, capsys.readouterr().err

  return started


def cut_short(run, step):
  for file in (run / f'checkpoints/{step}').rglob('*'):
    if file.is_file() and file.parent.name == 'd':
      file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])


def with_other_bits(run, step):
  about = run / f'checkpoints/{step}/about/metadata'
  about.write_text(re.sub(r'("sha256": ")....', r'\g<1>0000', about.read_text()))


def unfinished(run):
  """As a kill leaves it: checkpoints of 9 and 12 updates, no report."""
  for name in ('report.json', 'theta.safetensors'):
    (run / name).unlink()


# ---- Checkpoints.


def test_the_checkpoint_before_a_damaged_one(run, again, complete):
  unfinished(run)
  cut_short(run, 12)
  report, told = again()
  place = run / 'damaged' / '12'
  assert f'warning: the checkpoint {run / "checkpoints" / "12"} cannot be read' in told
  assert f'it is now {place}, and the run goes on from step 9' in told
  assert 'going on after 9' in told and (place / 'state').is_dir()
  assert report['theta_sha256'] == complete[1]['theta_sha256']
  assert report['damaged_checkpoints'] == ['12']
  assert '- checkpoints that could not be read: 12\n' in (run / 'report.md').read_text()
  assert [r['step'] for r in read_metrics(run / 'metrics.jsonl')] == [2, 4, 6, 6, 8, 10, 12, 12]


def test_no_checkpoint_but_damaged_ones(run, again, complete):
  unfinished(run)
  with_other_bits(run, 12)
  cut_short(run, 9)
  (run / 'damaged' / '9').mkdir(parents=True)  # of an earlier time
  report, told = again()
  assert 'it is not what was written' in told
  assert 'goes on from step 9' in told and 'goes on from the start' in told
  assert 'going on after' not in told
  assert report['theta_sha256'] == complete[1]['theta_sha256']
  assert report['damaged_checkpoints'] == ['12', '9', '9_again']


def test_a_start_that_only_damaged_checkpoints_had(complete, run, load, tmp_path):
  settings = load('linear', **{'method.start': str(complete[0])})
  begun = training.train(settings, tmp_path / 'b')
  unfinished(tmp_path / 'b')
  for step in (9, 12):
    cut_short(tmp_path / 'b', step)
  assert training.train(settings, tmp_path / 'b')['theta_sha256'] == begun['theta_sha256']


# ---- A complete run some files of which are gone.


def test_pages_are_made_again(run, again):
  page = (run / 'report.md').read_text()
  (run / 'report.md').unlink()
  (run / 'curves.png').unlink()
  (run / '.theta.part.safetensors').write_text('left by a kill')
  report, told = again()
  assert told == f'report.md, curves.png of {run} was missing, and is made again\n'
  assert (run / 'report.md').read_text() == page and (run / 'curves.png').stat().st_size
  assert not (run / '.theta.part.safetensors').exists()
  assert again() == (report, '')


def test_theta_is_made_again(run, again, complete):
  theta = run / 'theta.safetensors'
  whole = theta.read_bytes()
  assert is_theta(theta)
  theta.unlink()
  assert not is_theta(theta)
  for content in (b'', whole[:-1]):
    theta.write_bytes(content)
    assert not is_theta(theta)
  report, told = again()
  assert 'theta.safetensors is missing or damaged: it is made again' in told
  assert theta.read_bytes() == whole
  assert report['theta_sha256'] == complete[1]['theta_sha256']
  assert again() == (report, '')


def test_theta_that_cannot_be_made_again(run, again):
  (run / 'theta.safetensors').unlink()
  shutil.rmtree(run / 'checkpoints')
  with pytest.raises(cli.Mistake, match='no checkpoint to make it from; delete report.json'):
    again()


def test_the_best_theta_is_said_to_be_missing(run, again):
  (run / 'best.safetensors').unlink()
  assert 'best.safetensors is missing or damaged, and cannot be made again' in again()[1]


def test_report_json_comes_last(complete, tmp_path, monkeypatch):
  from jpeft.training import report

  folder, told = complete
  order = []
  monkeypatch.setattr(report, 'write', lambda path, text: order.append(path.name))
  monkeypatch.setattr(report, 'draw_curves', lambda path, *rest: order.append(path.name))
  report.write_report(tmp_path, told, read_metrics(folder / 'metrics.jsonl'))
  assert order == ['curves.png', 'report.md', 'report.json']


# ---- What ends a run from outside.


def test_it_is_told_where_a_run_goes_on(run, tmp_path):
  with pytest.raises(cli.Mistake, match='x is full; the same command goes on from checkpoint 12$'):
    with resumable(run):
      raise writing.NotWritten('x is full')
  with pytest.raises(cli.Mistake, match='there is no checkpoint yet; the same command starts'):
    with resumable(tmp_path / 'none'):
      raise writing.NotWritten('x is full')


def test_a_log_that_was_cut_short(run, again, complete):
  unfinished(run)
  log = run / 'metrics.jsonl'
  log.write_text(log.read_text()[:-9])
  report, _ = again()  # which evaluates once more
  assert report['eval'] == complete[1]['eval']
  assert len(read_metrics(log)) == 8 and json.loads(log.read_text().splitlines()[-1])


def test_a_log_that_is_damaged(run, again):
  unfinished(run)
  log = run / 'metrics.jsonl'
  lines = log.read_text().splitlines(keepends=True)
  log.write_text(''.join([*lines[:2], '\0\0\0\n', *lines[3:]]))
  with pytest.raises(cli.Mistake, match=f'line 3 of {log} is damaged .*: delete that line'):
    again()


def test_what_a_run_keeps_is_damaged(run, again):
  kept = run / 'run.json'
  whole = kept.read_text()
  for text, told in (
    (whole[:-9], f'{kept} is no JSON'),
    (json.dumps(json.loads(whole) | {'processes': 'two'}), f'{kept}: processes must be an integer'),
  ):
    kept.write_text(text)
    with pytest.raises(cli.Mistake, match=re.escape(told)):
      again()
  kept.write_text(whole)
  report = run / 'report.json'
  values = json.loads(report.read_text())
  del values['eval']
  report.write_text(json.dumps(values))
  with pytest.raises(cli.Mistake, match=f"{report} is damaged .* has no 'eval'.: delete it"):
    again()
  report.write_text(json.dumps(values | {'eval': {}, 'best': 'the last'}))
  (run / 'report.md').unlink()
  with pytest.raises(cli.Mistake, match=f'{report} is damaged .*best must be an object'):
    again()


def test_a_folder_that_has_no_locks(run, again, monkeypatch):
  def flock(*args):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with pytest.raises(cli.Mistake, match=r'cannot be locked .*\(No locks available\): choose'):
    again()
