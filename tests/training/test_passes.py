"""A run whose method needs a pass over the data: killed in it, it finds the same, and keeps it."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.training import killing

STEPS = 14
FLAGS = ('log.every=1', 'eval.every=7', 'checkpoint.every=5', f'steps={STEPS}')
METHODS = {
  'sct': ('method.channels=4',),
  'lt_sft': ('method.count=300', 'method.first_steps=3', 'method.first_batch=8'),
  'light_peft': ('method.rank=2', 'method.updates=4', 'method.batch_size=6', 'method.rate=1e-2'),
  'spt': ('method.budget=600', 'method.step=50', 'method.rank=1'),
  'eva': ('method.rank=2', 'method.batches=3'),
}


@pytest.fixture(scope='module')
def start(config_file, compilations):
  """start(folder, method) -> the process of a training run; compilations are shared."""
  env = killing.environment(compilations)

  def started(folder, method):
    flags = [f'--config.{flag}' for flag in (*FLAGS, *METHODS[method])]
    command = [sys.executable, '-m', 'jpeft.train', f'--config={config_file}:{method}', *flags]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen([*command, f'--workdir={folder}'], env=env, **pipes)

  return started


def ended(process) -> str:
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  return told


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_a_run_that_is_killed_in_its_pass_finds_the_same(start, tmp_path, method):
  alone, killed = tmp_path / 'alone', tmp_path / 'killed'
  ended(start(alone, method))
  process = start(killed, method)
  line = process.stderr.readline()
  assert f'{method} ' in line and 'a pass over 24 training examples' in line
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=120)
  assert not (killed / 'config.json').exists()  # the next command finds an empty folder

  process = start(killed, method)
  killing.reached(process, killed, 11)  # the save at 10 waits for the one at 5
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=120)
  told = ended(start(killed, method))
  assert 'a pass over' not in told and 'going on after' in told
  theta = load_file(alone / 'theta.safetensors')
  killing.assert_same(killed, alone, STEPS, arrays=len(theta))
  files = [folder / 'prepared.safetensors' for folder in (alone, killed)]
  assert files[0].read_bytes() == files[1].read_bytes()
  assert json.loads((alone / 'run.json').read_text())['prepared_sha256']

  # Another file in its place is not taken.
  found = load_file(files[1])
  save_file({name: np.zeros_like(x) for name, x in found.items()}, files[1])
  (killed / 'report.json').unlink()
  process = start(killed, method)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 2 and 'is not what the run was begun with' in told
  files[1].unlink()
  process = start(killed, method)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 2 and 'what its method found before training: put it back' in told
