"""Killed at any step and started again, a run ends with the bits of one that was left alone."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from jpeft.training.metrics import read_metrics, values

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
OPTIONS = {
  'steps': STEPS,
  'log.every': 1,
  'eval.every': 7,
  'checkpoint.every': 5,
  'data.augment': 'flip_crop',
}


@pytest.fixture(scope='module')
def start(config_file, tmp_path_factory):
  """start(folder) -> the process of a training run; compilations are shared."""
  cache = tmp_path_factory.mktemp('jax')
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  flags = [f'--config.{key}={value}' for key, value in OPTIONS.items()]

  def started(folder):
    command = [
      sys.executable,
      '-m',
      'jpeft.train',
      f'--config={config_file}',
      *flags,
      f'--workdir={folder}',
    ]
    return subprocess.Popen(
      command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  return started


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
  """The folder of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp('alone') / 'run'
  process = start(folder)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0, told
  return folder


def reached(process, folder, step):
  """Waits until the log shows a step."""
  end = time.monotonic() + 120
  while time.monotonic() < end and process.poll() is None:
    if any(row['step'] >= step for row in read_metrics(folder / 'metrics.jsonl')):
      return
    time.sleep(0.002)
  raise AssertionError(f'step {step} was not reached: {process.communicate()[1]}')


def assert_same(folder, other):
  """All that two runs leave is equal, clocks apart."""
  folders = folder, other
  rows = [read_metrics(f / 'metrics.jsonl') for f in folders]
  logs = [[(row['step'], row['split'], values(row)) for row in log] for log in rows]
  assert logs[0] == logs[1]
  assert len(logs[0]) == STEPS + STEPS // 7 + 1
  for name in ('theta.safetensors', 'best.safetensors'):
    a, b = load_file(folder / name), load_file(other / name)
    assert a.keys() == b.keys() and len(a) == 2
    for key in a:
      assert a[key].tobytes() == b[key].tobytes(), key
  reports = [json.loads((f / 'report.json').read_text()) for f in folders]
  for key in ('theta_sha256', 'backbone_sha256', 'eval', 'best', 'steps'):
    assert reports[0][key] == reports[1][key], key
  kept = [json.loads((f / f'checkpoints/{STEPS}/about/metadata').read_text()) for f in folders]
  assert kept[0]['sha256'] == kept[1]['sha256']  # of theta, the optimizer and the sums


def test_sigkill_at_random_steps(start, alone, tmp_path):
  rng, folder = random.Random(time.time_ns()), tmp_path / 'run'
  for low, high in ((1, 20), (21, 40), (41, 55)):
    process, step = start(folder), rng.randint(low, high)
    reached(process, folder, step)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / 'theta.safetensors').exists()
  process = start(folder)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0, told
  assert 'going on after' in told
  assert_same(folder, alone)


def test_sigterm_saves_and_exits(start, alone, tmp_path):
  folder = tmp_path / 'run'
  process = start(folder)
  reached(process, folder, 13)
  process.send_signal(signal.SIGTERM)
  _, told = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, told
  last = max(int(p.name) for p in (folder / 'checkpoints').iterdir())
  assert f'stopped by SIGTERM; checkpoint {last} of {STEPS}' in told and 'Traceback' not in told
  assert last >= read_metrics(folder / 'metrics.jsonl')[-1]['step'] >= 13  # nothing is lost
  process = start(folder)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0 and f'going on after {last}' in told, told
  assert_same(folder, alone)
