"""Configurations as text: what keys there are, and the values of one."""

import json
import sys

import pytest

from jpeft import cli, config
from jpeft.config import __main__ as command
from jpeft.config.schema import FIELDS


@pytest.mark.parametrize('width', [40, 80, 130])
def test_all_keys_in_groups_within_the_width(width):
  lines = config.reference(width).splitlines()
  assert max(map(len, lines)) <= max(width, 60)  # below, names and meanings have no room
  first = [line.split()[0] for line in lines if line.startswith('  ') and line[2] != ' ']
  assert set(first) == set(FIELDS)
  section = 'run'
  for line in lines:
    if line and line[0] != ' ':
      section = line.removesuffix(':')
    elif line[2:3].strip():
      key = line.split()[0]
      assert key.startswith(f'{section}.') or (section == 'run' and '.' not in key)


def said(capsys, *argv):
  code = cli.command('jpeft.config', command.main, list(argv))
  printed = capsys.readouterr()
  return code, printed.out, printed.err


@pytest.mark.parametrize('name', config.packaged())
def test_what_is_printed_makes_the_same_config(capsys, name):
  code, out, _ = said(capsys, f'{name}:lora', '--config.optimizer.lr=0.25')
  lines = [line for line in out.splitlines() if line]
  assert code == 0 and {line.partition('=')[0] for line in lines} >= set(FIELDS)
  whole = config.parse([f'--config={name}:lora', *(f'--config.{line}' for line in lines)]).load()
  wanted = config.load(f'{name}:lora', {'optimizer.lr': '0.25'})
  assert config.differences(whole, wanted) == []


def test_values_are_read_back_as_they_are_written():
  for value in (None, True, False, 3, 1e-08, 'dots', [('.*/b', 2.0)], ()):
    overrides = {'method.value': config.as_text(value)}
    assert config.load('quickstart:lora', overrides).method.value == value


def test_json_and_mistakes(capsys):
  code, out, _ = said(capsys, '--config=quickstart', '--json')
  assert code == 0 and json.loads(out)['method']['name'] == 'lst'
  code, _, err = said(capsys, 'quickstrat')
  assert code == 2 and "did you mean 'quickstart'" in err and err.count('\n') == 1
  code, _, err = said(capsys, 'quickstart', '--config.optimizer.lrr=1')
  assert code == 2 and "did you mean 'optimizer.lr'" in err


def test_names_alone(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '60')
  code, out, _ = said(capsys)
  assert code == 0 and max(map(len, out.splitlines())) <= 60
  assert all(f'\n{name} ' in f'\n{out}' for name in config.packaged())


def test_help_fits_the_terminal(capsys, monkeypatch):
  from jpeft import plan, train

  monkeypatch.setattr(sys, 'argv', ['jpeft'])
  for main in (train.main, plan.main):
    monkeypatch.setenv('COLUMNS', '72')
    assert main(['-h']) == 0
    narrow = capsys.readouterr().out.splitlines()
    # Command lines stay as they are.
    assert max(len(line) for line in narrow if not line.startswith('    ')) <= 72
