"""What tests need that kill runs: when to, and whether nothing is lost."""

import json
import math
import os
import pathlib
import re
import signal
import time

from safetensors.numpy import load_file

from jpeft import data
from jpeft.training.metrics import read_metrics, values

ROOT = pathlib.Path(__file__).parents[2]


def written(file):
  """When a file was written last; 0 if it is not there."""
  return file.stat().st_mtime_ns if file.exists() else 0


def watched(folder):
  """made(step) -> whether a process that starts now has logged a step.

  What the log has of processes before it does not count: it is cut when the run goes on.
  """
  log = folder / 'metrics.jsonl'
  before = read = written(log)
  last = 0

  def made(step):
    nonlocal read, last
    now = written(log)
    if now not in (before, read):
      read = now
      last = max((row['step'] for row in read_metrics(log)), default=0)
    return last >= step

  return made


def reached(process, folder, step):
  """Waits until a process that was just started has logged a step."""
  made = watched(folder)
  end = time.monotonic() + 600
  while time.monotonic() < end and process.poll() is None:
    if made(step):
      return
    time.sleep(0.002)
  raise AssertionError(f'step {step} was not reached: {process.communicate()[1]}')


def environment(cache):
  """The environment of runs that are processes of their own, and share what they compile."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(cache),
  }


def run_and_killed_run(start, folder, more, timeout):
  """(folder of a run, folder of the same run that was killed at update 23 and went on)."""
  alone, killed = folder / 'alone', folder / 'killed'
  process = start(alone, *more)
  _, told = process.communicate(timeout=timeout)
  assert process.returncode == 0, told
  process = start(killed, *more)
  reached(process, killed, 23)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=120)
  process = start(killed, *more)
  _, told = process.communicate(timeout=timeout)
  assert process.returncode == 0 and 'going on after' in told, told
  return alone, killed


def files_of(folder):
  """The files of a run; those of arrays in checkpoints have random names."""
  names = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
  return {re.sub('/d/[0-9a-f]{32}$', '/d/*', name) for name in names}


def assert_same(folder, other, steps, arrays=2):
  """All that two runs leave is equal, clocks apart."""
  folders = folder, other
  assert files_of(folder) == files_of(other)
  for name in ('config.json', 'run.json', 'confusion.json'):
    if (folder / name).exists():
      assert (folder / name).read_text() == (other / name).read_text(), name
  rows = [read_metrics(f / 'metrics.jsonl') for f in folders]
  logs = [[(row['step'], row['split'], values(row)) for row in log] for log in rows]
  assert logs[0] == logs[1]
  written = [split for _, split, _ in logs[0] if split != 'untuned']
  assert len(written) == steps + math.ceil(steps / 7)  # log.every=1, eval.every=7, and the end
  for name in ('theta.safetensors', 'best.safetensors'):
    a, b = load_file(folder / name), load_file(other / name)
    assert a.keys() == b.keys() and len(a) == arrays
    for key in a:
      assert a[key].tobytes() == b[key].tobytes(), key
  reports = [json.loads((f / 'report.json').read_text()) for f in folders]
  for key in ('theta_sha256', 'backbone_sha256', 'eval', 'best', 'steps'):
    assert reports[0][key] == reports[1][key], key
  kept = [stored(f / f'checkpoints/{steps}') for f in folders]
  assert kept[0] == kept[1]


def stored(place):
  """The digests of a checkpoint: of theta, the optimizer and the sums."""
  about = place / 'about.json'
  if about.exists():  # in pieces
    return [piece['sha256'] for piece in json.loads(about.read_text())['pieces']]
  return json.loads((place / 'about/metadata').read_text())['sha256']


def interrupt(monkeypatch, batch):
  """Sends SIGTERM as a run reads its n-th batch."""
  read, seen = data.Batches.__next__, []

  def interrupted(self):
    seen.append(0)
    if len(seen) == batch:
      os.kill(os.getpid(), signal.SIGTERM)
    return read(self)

  monkeypatch.setattr(data.Batches, '__next__', interrupted)
