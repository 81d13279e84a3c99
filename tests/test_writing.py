"""What is written is whole and on the disk; a disk that takes no more is told in one sentence."""

import contextlib
import os
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import cli, models, writing
from jpeft.training.checkpoints import Checkpoints
from tests.limits import files_of

TOO_LONG = r'cannot be written: it would be longer than files may be \(ulimit -f\)$'


def names(folder):
  return sorted(path.name for path in folder.iterdir())


# ---- Files and folders.


def test_a_file_is_whole_or_as_it_was(tmp_path):
  file = tmp_path / 'a.txt'
  writing.write(file, 'old')
  with files_of(10), pytest.raises(writing.NotWritten, match=f'{file} {TOO_LONG}'):
    writing.write(file, 'x' * 100)
  assert file.read_text() == 'old' and names(tmp_path) == ['a.txt']
  writing.write(file, b'new')
  assert file.read_text() == 'new'


def test_the_disk_has_it_before_the_name_has(tmp_path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace

  def synced(number):
    calls.append(os.path.basename(os.readlink(f'/proc/self/fd/{number}')))
    fsync(number)

  def renamed(old, new):
    calls.append('rename')
    replace(old, new)

  monkeypatch.setattr(os, 'fsync', synced)
  monkeypatch.setattr(os, 'replace', renamed)
  writing.write(tmp_path / 'a.txt', 'x')
  assert calls == ['.a.part.txt', 'rename', tmp_path.name]


def test_a_line_is_added_or_not(tmp_path):
  file = tmp_path / 'log'
  writing.append(file, 'a\n')
  writing.append(file, 'b\n')
  with files_of(10), pytest.raises(writing.NotWritten, match=TOO_LONG):
    writing.append(file, 'x' * 20 + '\n')
  assert file.read_text() == 'a\nb\n'


def test_a_folder_is_filled_or_as_it_was(tmp_path):
  folder = tmp_path / 'out'

  def fill():
    with writing.filled(folder) as part:
      (part / 'sub').mkdir()
      (part / 'sub' / 'one').write_text('1')
      assert names(folder) == [writing.PART]
      cli.check_new(folder)  # after a kill here, the same command may be given again
      writing.write(part / 'two', '2' * 100)

  with files_of(10), pytest.raises(writing.NotWritten, match='two ' + TOO_LONG):
    fill()
  assert not folder.exists()
  (folder / writing.PART / 'left').mkdir(parents=True)
  fill()
  assert names(folder) == ['sub', 'two'] and (folder / 'sub' / 'one').read_text() == '1'
  with pytest.raises(ValueError, match='is there already'):
    cli.check_new(folder)


def test_what_a_kill_left_goes(tmp_path):
  for name in ('.a.part.txt', '.lock', 'a.txt', 'b.part'):
    (tmp_path / name).write_text('x')
  writing.remove_parts(tmp_path)
  assert names(tmp_path) == ['.lock', 'a.txt', 'b.part']


def test_errors_of_something_else_stay_what_they_are(tmp_path):
  with pytest.raises(FileNotFoundError), writing.told(tmp_path):
    raise FileNotFoundError(2, 'No such file', 'data.csv')
  with pytest.raises(PermissionError), writing.told(tmp_path):
    raise PermissionError(13, 'Permission denied', 'data.csv')
  with pytest.raises(writing.NotWritten, match='permission denied'):
    with writing.told(tmp_path, permissions=True):
      raise PermissionError(13, 'Permission denied')
  assert writing.reason_of(ValueError('[OS error 28: ENOSPC No space left]')) == 'the disk is full'
  assert writing.reason_of(ValueError("failed [os_error_code='122']")).startswith('the quota')
  assert writing.reason_of(ValueError('No such file (os error 2)')) is None


# ---- Libraries that write.


def test_safetensors_that_do_not_fit(tmp_path):
  with files_of(1000), pytest.raises(writing.NotWritten, match=TOO_LONG):
    models.write_tensors(tmp_path / 'm.safetensors', {'x': np.zeros(1000)})
  assert names(tmp_path) == []


def test_a_checkpoint_that_does_not_fit(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c', keep=2)
  state = {'x': jnp.asarray(np.random.default_rng(0).normal(size=1000))}
  checkpoints.save(1, state, {})
  checkpoints.wait()
  with pytest.raises(writing.NotWritten, match=TOO_LONG), files_of(1000):
    checkpoints.save(2, state, {})
    checkpoints.wait()
  with contextlib.suppress(writing.NotWritten):
    checkpoints.close()
  again = Checkpoints(tmp_path / 'c', keep=2)
  assert again.latest == 1 and names(tmp_path / 'c') == ['1']
  again.close()


# ---- Commands.


@pytest.fixture
def ended(monkeypatch, capsys):
  """ended(main, stdout) -> (exit code of a command, what it has told)."""

  def run(main, stdout=None):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
      if stdout is not None:
        patch.setattr(sys, 'stdout', stdout)
      code = cli.command('jpeft.x', main, [])
    signal.signal(signal.SIGINT, before)
    return code, capsys.readouterr().err

  return run


def prints(argv):
  print('y' * 10_000)


def test_an_output_that_is_full(ended):
  with open('/dev/full', 'w') as full:
    told = ended(prints, full)
  assert told == (2, 'jpeft.x: error: the output, or a file, cannot be written: the disk is full\n')


def test_an_output_that_nobody_reads(ended):
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, 'w') as pipe:
    assert ended(prints, pipe) == (128 + signal.SIGPIPE, '')


@pytest.mark.parametrize(
  'words, name',
  [
    ('python -m jpeft.train --config=x', 'jpeft.train'),
    ('python -u -X dev -m jpeft plan', 'jpeft'),
    ('python /usr/bin/jpeft train', 'jpeft'),
    ('python /usr/bin/pytest -m jpeft', None),
    ('python -m pytest jpeft', None),
    ('python jpeft.py', None),
    ('python', None),
  ],
)
def test_which_command_a_process_is(monkeypatch, words, name):
  monkeypatch.setattr(sys, 'orig_argv', words.split())
  assert cli._started_as() == name


def test_ctrl_c_is_one_line(ended):
  def interrupted(argv):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

  assert ended(interrupted) == (130, 'jpeft.x: stopped by SIGINT\n')


def test_a_disk_is_one_line_and_a_fault_is_not(ended, tmp_path):
  def full(argv):
    raise OSError(28, 'No space left on device', str(tmp_path / 'x'))

  def fault(argv):
    raise OSError(2, 'No such file', 'x')

  code, told = ended(full)
  assert code == 2 and told == f'jpeft.x: error: {tmp_path}/x cannot be written: the disk is full\n'
  with pytest.raises(FileNotFoundError):
    ended(fault)
