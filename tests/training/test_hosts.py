"""Two processes on one machine train as one does: if one is lost, the other does not wait."""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jpeft import data, tasks, training
from jpeft.training import checkpoints, hosts
from tests.training import killing

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 30
OPTIONS = {
  'steps': STEPS,
  'log.every': 1,
  'eval.every': 7,
  'checkpoint.every': 5,
  'data.augment': 'flip_crop',
  'data.batch_size': 8,
  'data.eval_batch_size': 4,
  'mesh.data': 2,
  'mesh.whole_below': 1,  # theta is cut between the processes
}
# Seconds after which a process that does not answer counts as dead. One that is killed is missed at
# once, as its connections end; one that waits for a busy machine must not be.
LOST = 30


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@pytest.fixture(scope='module')
def start(config_file, compilations):
  """start(folder, *flags, own={number: its flags}, devices=of each) -> two processes of a run."""
  env = killing.environment(compilations)
  # One would often read what the other is just writing, and warn.
  env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
  flags = [f'--config.{key}={value}' for key, value in OPTIONS.items()]

  def started(folder, *more, own=None, devices=1):
    port = free_port()
    own_env = env | {'JAX_NUM_CPU_DEVICES': str(devices)}
    processes = []
    for i in range(2):
      command = [sys.executable, '-m', 'jpeft.train', f'--config={config_file}:linear', *flags]
      command += [f'--hosts=127.0.0.1:{port}', '--processes=2', f'--process={i}']
      command += [f'--lost-after={LOST}', '--connect-timeout=60', f'--workdir={folder}', *more]
      command += (own or {}).get(i, [])
      processes.append(
        subprocess.Popen(
          command, env=own_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
      )
    return processes

  return started


def ended(processes, timeout=300):
  """[(exit code, stderr)] of processes."""
  told = [process.communicate(timeout=timeout)[1] for process in processes]
  return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def finished(processes):
  """stderr of processes that have completed a run."""
  found = ended(processes)
  assert [code for code, _ in found] == [0, 0], '\n'.join(text for _, text in found)
  return [text for _, text in found]


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
  """The folder of a run of two processes that nothing disturbed."""
  folder = tmp_path_factory.mktemp('alone') / 'run'
  first, second = finished(start(folder))
  assert 'trainable numbers' in first
  assert not [line for line in second.splitlines() if 'Gloo' not in line]
  return folder


def assert_near(folder, other):
  """The thetas of two runs are the same but for rounding."""
  a, b = (load_file(f / 'theta.safetensors') for f in (folder, other))
  assert a.keys() == b.keys()
  for name, x in a.items():
    np.testing.assert_allclose(x, b[name], rtol=0, atol=1e-6)


def test_two_processes_train_as_one(alone, load, tmp_path):
  told = training.train(load('linear', **OPTIONS), tmp_path / 'one')
  by_two = json.loads((alone / 'report.json').read_text())
  assert (by_two['processes'], told['processes']) == (2, 1)
  assert by_two['backbone_sha256'] == told['backbone_sha256']
  for name, value in told['eval'].items():
    np.testing.assert_allclose(by_two['eval'][name], value, rtol=1e-5)
  assert_near(alone, tmp_path / 'one')
  confusion = [
    json.loads((f / 'confusion.json').read_text())['confusion'] for f in (alone, tmp_path / 'one')
  ]
  assert confusion[0] == confusion[1] and np.sum(confusion[0]) == 10  # rows that fill up are out


@pytest.mark.slow
def test_features_and_ranks_of_two_processes(start, images, load, tmp_path):
  table = tmp_path / 'numbers.csv'
  files = sorted(images.rglob('*.png'))
  lines = [f'{file},{i % 7}' for i, file in enumerate(files)]
  table.write_text('\n'.join(['image,label', *lines]))
  options = {
    'task': 'regression',
    'data.name': f'csv:{table}?image=image&label=label',
    'data.augment': 'none',
    'data.cache_features': 'true',
    'eval.metric': 'spearman',
    'mesh.data': 2,
    'mesh.model': 2,
    'mesh.whole_below': 2**18,  # whole in each process: one writes it
    'steps': 6,
  }
  flags = [f'--config.{key}={value}' for key, value in options.items()]
  finished(start(tmp_path / 'two', *flags, devices=2))
  told = training.train(load('linear', **OPTIONS | options), tmp_path / 'one')
  by_two = json.loads((tmp_path / 'two' / 'report.json').read_text())
  for name, value in told['eval'].items():
    np.testing.assert_allclose(by_two['eval'][name], value, rtol=1e-5)
  assert_near(tmp_path / 'two', tmp_path / 'one')
  assert not list((tmp_path / 'two').rglob('about.json'))


def test_stopped_and_killed_they_go_on(start, alone, load, tmp_path):
  folder = tmp_path / 'run'
  processes = start(folder)
  killing.reached(processes[0], folder, 8)
  processes[1].send_signal(signal.SIGTERM)
  (code, told), (other, quiet) = ended(processes)
  assert code == other == 128 + signal.SIGTERM, (told, quiet)
  last = max(checkpoints.steps_of(folder / 'checkpoints'))
  assert f'stopped by SIGTERM; checkpoint {last} of {STEPS} is in {folder}' in told
  assert 'stopped' not in quiet and 'Traceback' not in told + quiet
  assert last >= 8
  written = {file.name for file in (folder / f'checkpoints/{last}').iterdir()}
  assert written == {'0.bin', '1.bin', 'about.json'}

  # One process alone goes on as well, if that is allowed.
  copy = shutil.copytree(folder, tmp_path / 'by one')
  told = training.train(load('linear', **OPTIONS), copy, ['hosts'])
  assert told['changes'] == [{'after': last, 'changed': {'hosts': [2, 1]}}]
  assert_near(copy, alone)

  processes = start(folder)
  killing.reached(processes[0], folder, last + 7)
  processes[1].send_signal(signal.SIGKILL)
  before = time.monotonic()
  (code, told), (killed, _) = ended(processes)
  assert killed == -signal.SIGKILL and code in (1, -signal.SIGABRT), told
  assert time.monotonic() - before < 2 * LOST
  assert 'another process is lost' in told or 'another task died' in told

  first, _ = finished(start(folder))
  assert 'going on after' in first
  killing.assert_same(folder, alone, STEPS)


@pytest.mark.slow
def test_without_a_shared_disk_process_0_writes(start, alone, tmp_path):
  elsewhere = {1: [f'--workdir={tmp_path / "elsewhere"}']}
  folder = tmp_path / 'run'
  processes = start(folder, own=elsewhere)
  killing.reached(processes[0], folder, 8)
  processes[1].send_signal(signal.SIGTERM)
  assert {code for code, _ in ended(processes)} == {128 + signal.SIGTERM}
  assert not list(folder.rglob('about.json'))
  finished(start(folder))  # the rest in pieces
  killing.assert_same(folder, alone, STEPS)
  assert len(list(folder.rglob('about.json'))) == len(list((folder / 'checkpoints').iterdir()))


@pytest.mark.slow
def test_killed_twenty_times_they_end_with_the_same_bits(start, tmp_path):
  """JPEFT_KILLS and JPEFT_SEED in the environment: how many, and when."""
  wanted = int(os.environ.get('JPEFT_KILLS', 20))
  steps = 60
  more = (f'--config.steps={steps}',)
  finished(start(tmp_path / 'alone', *more))
  seed = int(os.environ.get('JPEFT_SEED', time.time_ns()))
  rng = random.Random(seed)
  folder = tmp_path / 'run'
  reached = 0
  for i in range(wanted):
    processes = start(folder, *more, '--connect-timeout=15')
    if rng.random() < 0.25:
      time.sleep(rng.uniform(0, 4))  # somewhere before the first update
    else:
      killing.reached(processes[0], folder, min(reached + rng.randint(1, 12), steps - 5))
      time.sleep(rng.uniform(0, 0.05))
    killed = rng.choice(((0,), (1,), (0, 1)))
    for number in killed:
      processes[number].send_signal(signal.SIGKILL)
    codes = [code for code, _ in ended(processes)]
    assert 0 not in codes, (seed, i)
    reached = max(checkpoints.steps_of(folder / 'checkpoints'), default=0)
    print(f'seed {seed}: {i + 1} kills, of {killed}: {codes}, checkpoint {reached}', flush=True)
  finished(start(folder, *more))
  killing.assert_same(folder, tmp_path / 'alone', steps)


@pytest.mark.slow
def test_the_others_wait_while_process_0_writes_its_report(start, tmp_path):
  late = tmp_path / 'late.py'
  late.write_text(LATE)
  more = (f'--import={late}', '--config.steps=3', '--lost-after=10')
  finished(start(tmp_path / 'run', *more))


# Of the report of a run, which process 0 alone writes when all else is done.
LATE = """
import time
from jpeft.training import report

write = report.write_report

def late(*args):
  time.sleep(20)
  return write(*args)

report.write_report = late
"""


def test_what_is_wrong_in_one_ends_both(start, tmp_path):
  found = ended(start(tmp_path / 'run', own={1: ['--config.optimizer.lr=3']}))
  assert [code for code, _ in found] == [2, 2], found
  where = 'the config is another one than in process 0: optimizer.lr (3.0 here, 0.01 there)'
  assert f'jpeft.train: error: process 1: {where}' in found[0][1]
  assert f'jpeft.train: error: {where}' in found[1][1]
  assert not (tmp_path / 'run').exists()


def test_a_broken_example_of_one_stops_both_at_a_checkpoint(start, images, load, tmp_path):
  copy = shutil.copytree(images, tmp_path / 'images')
  config = load('linear', **OPTIONS, **{'data.name': f'folder:{copy}'})
  source = tasks.of(config).source(config, 'train')
  order = data.Batches([{'row': i} for i in range(len(source))], 8, seed=config.seed)
  row = [next(order)['row'] for _ in range(3)][2][5]  # of the third batch, made by process 1
  file = next(
    file
    for file in (copy / 'train').rglob('*.png')
    if np.array_equal(Image.open(file), source[int(row)]['image'])
  )
  content = file.read_bytes()
  file.write_bytes(content[:-30])
  flags = f'--config.data.name=folder:{copy}', '--config.eval.every=30'
  found = ended(start(tmp_path / 'run', *flags))
  assert [code for code, _ in found] == [2, 2], found
  for _, told in found:
    assert str(file) in told and 'Traceback' not in told
  assert 'error: process 1: ' in found[0][1]
  assert max(checkpoints.steps_of(tmp_path / 'run/checkpoints')) == 2  # nothing is lost


@pytest.mark.slow
def test_a_full_disk_of_one_ends_both(start, tmp_path):
  folder = tmp_path / 'run'
  processes = start(folder)
  killing.reached(processes[0], folder, 8)
  log = folder / 'metrics.jsonl'
  no_more = log.stat().st_size, resource.RLIM_INFINITY
  resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, no_more)
  (code, told), (other, lost) = ended(processes, 2 * LOST)
  assert (code, other) == (2, 2), (told, lost)
  assert f'error: {folder}' in told and f'error: process 0: {folder}' in lost
  for text in (told, lost):
    assert 'cannot be written: it would be longer' in text and 'Traceback' not in text
    assert 'the same command goes on from checkpoint' in text
  finished(start(folder))


@pytest.mark.parametrize(
  ('flags', 'message'),
  (
    ({'data.on_error': 'skip'}, "^config.data.on_error='skip': each of 2 processes would know"),
    ({'eval.generate': 2}, '^config.eval.generate=2: 2 processes do not write texts together'),
  ),
)
def test_what_several_processes_cannot_do(load, monkeypatch, flags, message):
  config = load('linear', **flags)
  hosts.check_supported(config)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match=message):
    hosts.check_supported(config)


def test_a_process_that_finds_no_other_ends(config_file, tmp_path):
  command = [sys.executable, '-m', 'jpeft.train', f'--config={config_file}']
  command += [f'--hosts=127.0.0.1:{free_port()}', '--processes=2', '--process=1']
  command += ['--connect-timeout=2', f'--workdir={tmp_path / "run"}']
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
  assert found.returncode == 2
  assert found.stderr.count('\n') == 1, found.stderr
  assert 'process 0 does not answer there' in found.stderr and 'in 2 s' in found.stderr
