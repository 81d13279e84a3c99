"""The loops of docs/index.md run as they stand, and may be interrupted and given again."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SECTION = re.search(r'^## Compare\n(.*?)^## ', (ROOT / 'docs/index.md').read_text(), re.S | re.M)[1]
LOOP, TABLE = re.findall(r'^```bash\n(.*?)^```$', SECTION, re.S | re.M)
(SHOW,) = re.findall(r'^```python\n(.*?)^```$', SECTION, re.S | re.M)


@pytest.fixture
def shell(config_file, compilations, tmp_path):
  """shell(script) -> its process, in which `jpeft` is the command, on a config of seconds."""
  command = tmp_path / 'bin' / 'jpeft'
  command.parent.mkdir()
  command.write_text(f'#!/bin/sh\nexec {sys.executable} -m jpeft "$@"\n')
  command.chmod(0o755)
  env = os.environ | {
    'PATH': f'{command.parent}:{os.environ["PATH"]}',
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(compilations),
  }

  def started(script):
    for old, new in (
      ('--config=quickstart:', f'--config={config_file}:'),
      ('1e-3 3e-3 1e-2', '1e-3 1e-2'),
      ('in lora ssf', 'in linear'),
      ('--tasks=quickstart', f'--configs={config_file.parent} --tasks=tiny'),
      ('lora,ssf --seeds=0,1,2', 'linear --seeds=0,1'),
    ):
      script = script.replace(old, new)
    return subprocess.Popen(
      ['bash', '-c', script],
      cwd=tmp_path,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  return started


def finished(process):
  printed, told = process.communicate(timeout=300)
  assert process.returncode == 0, told
  return printed


@pytest.mark.slow
def test_a_sweep_is_interrupted_and_given_again(shell, tmp_path, monkeypatch, capsys):
  first = tmp_path / 'runs/sweep/linear-1e-3'
  second = tmp_path / 'runs/sweep/linear-1e-2'
  process = shell(LOOP)
  end = time.monotonic() + 300
  while not (first / 'metrics.jsonl').exists() and time.monotonic() < end:
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
  process.communicate(timeout=300)
  assert not second.exists()  # the loop has ended with its run

  finished(shell(LOOP))
  report = first / 'report.json'
  stamp = report.stat().st_mtime_ns
  assert json.loads((second / 'config.json').read_text())['optimizer']['lr'] == 0.01
  finished(shell(LOOP))
  assert report.stat().st_mtime_ns == stamp
  monkeypatch.chdir(tmp_path)
  exec(SHOW, {})
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ['linear-1e-2', 'linear-1e-3']


def test_the_table_of_seeds(shell, tmp_path):
  printed = finished(shell(TABLE))
  assert '| linear | ' in printed and ' ± ' in printed
  assert (tmp_path / 'runs/seeds.md').read_text() in printed + '\n'
  assert len(list((tmp_path / 'runs/seeds/tiny').glob('linear-*/report.json'))) == 2
