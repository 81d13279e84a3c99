"""The command `jpeft` runs the others, and says what there is."""

import subprocess
import sys

import pytest

from jpeft import __main__ as command


def run(monkeypatch, *words):
  monkeypatch.setattr(sys, 'argv', ['jpeft', *words])
  return command.main()


def test_it_lists_the_commands(monkeypatch, capsys):
  assert run(monkeypatch, '--help') == 0
  out = capsys.readouterr().out
  assert 'jpeft train' in out and 'jpeft bench memory' in out


@pytest.mark.parametrize(
  ('words', 'message'),
  (
    (['trian'], "there is no command 'trian'; did you mean 'train'"),
    (['bench'], "there is no benchmark ''; there are accuracy"),
    (['bench', 'memry'], "did you mean 'memory'"),
  ),
)
def test_an_unknown_command_is_one_sentence(monkeypatch, capsys, words, message):
  assert run(monkeypatch, *words) == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


def test_a_command_is_run_as_python_m_runs_it(tmp_path):
  def output(*words):
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr

  assert output('-m', 'jpeft', 'methods') == output('-m', 'jpeft.methods')
  missing = ['--run', str(tmp_path), '--out', str(tmp_path / 'out')]
  assert output('-m', 'jpeft', 'merge', *missing) == output('-m', 'jpeft.merge', *missing)
