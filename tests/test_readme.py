"""What the README says of the code is what the code is, and its commands run as they stand.

tests/test_docs.py runs its Python.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jpeft import __main__ as console
from jpeft import config
from jpeft.methods.__main__ import rows
from jpeft.training.scoring import MAY_CHANGE

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
# Training as it stands takes minutes: fewer updates and examples, set after what stands there.
SHORT = [
  '--config.epochs=none',
  '--config.steps=2',
  '--config.data.train=train[:100]',
  '--config.data.test=test[:100]',
]
SHORT_TEXTS = [*SHORT, '--config.data.test=test[:8]', '--config.eval.generate=2']
# {where a line that is not run here is covered: how it begins}.
ELSEWHERE = {
  # It installs all extras of the tests, of the quickstart among them, and runs the same pytest.
  '.ci/run': ('python3 -m venv .venv', '. .venv/bin/activate', 'pip install', 'pytest -n 2'),
}


def section(name: str) -> str:
  return re.search(rf'<!-- {name} -->\n(.*?)<!-- /{name} -->', README, re.DOTALL)[1]


def methods_table() -> str:
  lines = [
    '| method | what it is | arXiv | memory class | merges |',
    '| --- | --- | --- | --- | --- |',
  ]
  for r in rows():
    merges = 'yes' if r['mergeable'] else 'no'
    lines.append(f'| `{r["name"]}` | {r["title"]} | {r["paper"]} | {r["memory"]} | {merges} |')
  return '\n'.join(lines) + '\n'


def test_the_methods_table_is_the_registry():
  assert section('methods') == methods_table()


def test_every_file_it_names_exists():
  named = re.findall(r'\]\(([\w./]+)\)', README) + re.findall(r'configs/\w+\.py', README)
  assert len(named) >= 4
  for path in named:
    assert (ROOT / path).exists(), path


def commands() -> list[str]:
  """The commands of all shell blocks, without comments; what `&&` joins is several."""
  found = []
  for block in re.findall(r'^```bash\n(.*?)^```$', README, re.DOTALL | re.MULTILINE):
    for line in block.splitlines():
      found += [part.strip() for part in re.sub(r'\s+#.*', '', line).split('&&')]
  return found


def words_of(line: str) -> list[str] | None:
  """The arguments of `python -m jpeft` for a command; None for one that is no command of jpeft."""
  words = shlex.split(line)
  if words[:2] == ['python', '-m'] and words[2].startswith('jpeft.'):
    return [*words[2].split('.')[1:], *words[3:]]
  if words[0] == 'jpeft':
    return words[1:]
  return None


OURS = [line for line in commands() if words_of(line)]


def test_every_block_is_run_somewhere():
  kinds = set(re.findall(r'^```(\w+)$', README, re.MULTILINE))
  assert kinds == {'python', 'bash'}  # the first is run by tests/test_docs.py
  assert {words_of(line)[0] for line in OURS} == set(console.COMMANDS) - {'methods', 'config'}
  for line in set(commands()) - set(OURS):
    covered = [file for file, starts in ELSEWHERE.items() if line.startswith(starts)]
    assert covered, f'no test runs {line!r}'
    assert all((ROOT / file).is_file() for file in covered)


@pytest.mark.parametrize('line', OURS)
def test_commands_name_what_there_is(line):
  name, *flags = words_of(line)
  assert console.module_of([name])
  files = [value for flag, value in zip(flags, flags[1:], strict=False) if flag == '--input']
  assert all((ROOT / file).is_file() for file in files)
  flags = [flag for flag in flags if flag.startswith(('--config', '--workdir'))]
  if name == 'evaluate':  # its config is that of the run
    overrides, _ = config.overrides_of(flags)
    assert overrides.keys() <= set(MAY_CHANGE)
  elif flags:
    whole = config.parse(flags).load()
    assert whole.steps or whole.epochs


def run(line: str, folder: pathlib.Path, *more: str) -> str:
  """What a command prints; its run folders, and what it writes, are in `folder`."""
  name, *flags = words_of(line)
  written = re.compile(r'(--\w+=)?((?:runs|merged|adapter)/.*)')
  flags = [written.sub(rf'\1{folder}/\2', flag) for flag in flags]
  done = subprocess.run(
    [sys.executable, '-m', 'jpeft', name, *flags, *more],
    env={'JAX_PLATFORMS': 'cpu', **os.environ},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f'{line}: {done.stderr}'
  return done.stdout


@pytest.mark.assets
def test_commands_run_one_after_another(tmp_path):
  printed = {}
  for line in OURS:
    name = words_of(line)[0]
    if name == 'plan':  # below
      continue
    more = []
    if name == 'train':
      more = SHORT_TEXTS if 'llm.py' in line else SHORT
    printed[name] = run(line, tmp_path, *more)
  assert printed['predict'].startswith('docs/digit.png\t')
  assert (tmp_path / 'merged' / 'model.safetensors').is_file()
  assert (tmp_path / 'adapter' / 'adapter_model.safetensors').is_file()


@pytest.mark.aot
def test_the_plan_runs(tmp_path):
  pytest.importorskip('libtpu')
  (line,) = (line for line in OURS if words_of(line)[0] == 'plan')
  printed = run(line, tmp_path)
  assert all(name in printed for name in ('lst', 'lora', 'full', 'tpu:v5e'))
