"""Every method of the registry through the commands: trained, killed, planned, asked and merged.

A run is stopped between two updates by a copy of its folder: what is there is what a kill leaves.
The copy goes on with an empty cache of programs, as a new process does, and must end with the bits
of the run that was left alone. test_resume.py kills processes in the midst of anything.
"""

import json
import random
import re
import shutil
import time
from typing import NamedTuple

import jax
import pytest
from safetensors.numpy import load_file

from jpeft import cli, evaluate, generate, merge, plan, predict, train
from jpeft.methods import REGISTRY
from jpeft.training import loop
from tests.contract.table import error_of
from tests.training import killing

STEPS = 15  # and an evaluation behind the last of each 7
FLAGS = (
  f'steps={STEPS}',
  'log.every=1',
  'eval.every=7',
  'checkpoint.every=2',
  'optimizer.lr=1e-2',
)

# What the sizes of the tiny models, or the few updates, ask for beside the defaults.
METHODS = {
  'explora': ('method.rank=4',),
  'bi_lora': ('method.rank=4',),
  'eva': ('method.rank=2', 'method.batches=3'),
  'adalora': ('method.rank=4', 'method.every=2'),
  'qlora': ('method.rank=4',),
  'vera': ('method.rank=8',),
  'vb_lora': ('method.vectors=6', 'method.length=4'),
  'randlora': ('method.rank=4', 'method.alpha=8'),
  'hira': ('method.rank=4',),
  'oft': ('method.block=4',),
  'fourierft': ('method.count=50',),
  'switchlora': ('method.rank=4', 'method.rest=1', 'method.interval=4'),
  'lamda': ('method.rank=4',),
  'lamda_pp': ('method.rank=4',),
  'snella': ('method.every=3', 'method.rounds=4'),
  'pst': ('method.rank=4', 'method.score_rank=4'),
  'sct': ('method.channels=4',),
  'spt': ('method.budget=600', 'method.step=50', 'method.rank=1'),
  'lt_sft': ('method.count=300', 'method.first_steps=3', 'method.first_lr=1e-3'),
  'light_peft': (
    'method.rank=4',
    'method.updates=4',
    'method.batch_size=6',
    'method.rate=1e-2',
  ),
  'loram': ('method.rank=4', 'method.ratio=0.5', 'method.skip_first=0', 'method.skip_last=0'),
  'loraprune': ('method.rank=4', 'method.every=2'),
  'parallel': ('method.bottleneck=8',),
  'mam': ('method.tokens=4', 'method.bottleneck=8'),
  'dyt': ('method.bottleneck=4',),
  'e2vpt': (
    'method.tokens=4',
    'method.prune_tokens=0.5',
    'method.prune_segments=0.5',
    'method.segments=4',
    'method.prune_after=7',
  ),
  'prefix': ('method.tokens=4',),
  'prompt_tuning': ('method.tokens=4',),
  'dept': ('method.tokens=4', 'method.rank=2', 'method.length=24'),
  'velora': ('method.groups=4',),
  's2a': ('method.rank=2', 'method.side=8'),
  'lst': ('method.reduction=4',),
  'qst': ('method.reduction=4', 'method.bottleneck=4'),
  'side_tuning': ('method.reduction=4',),
  'hst': ('method.widths=(4,4,8,8)', 'method.heads=(1,1,1,1)'),
  'sherl': ('method.reduction=4',),
}

# The decoder has one block, its head is its table of words, and it reads words by a module.
SMALL_DECODER = {
  **dict.fromkeys(('linear', 'head2toe', 'vqt', 'unipt_global'), "no site matches: '{head}'"),
  'sct': 'sct ranks channels by class',
  'prompt_tuning': None,
  'dept': None,
  'explora': "none of the 2 sites .* is in the layers '!-1'",
  'sherl': 'no block before the last of 1',
}

WORDS = '''"""Texts that a tiny decoder learns to write."""


def get_config(method='lora'):
  return {{
    'task': 'language',
    'model': {{'source': {decoder!r}}},
    'data': {{
      'name': 'completions:{backwards}', 'batch_size': 8, 'max_length': 24, 'pack': False
    }},
    'method': {{'name': method}},
    'steps': 1,
  }}
'''


class Told(NamedTuple):
  """What a command ended with.

  Attributes:
    code: its exit code.
    text: what it printed, and what it said of a mistake.
  """

  code: int
  text: str


@pytest.fixture
def told(capsys):
  """told(command, *arguments) -> what a command of jpeft ended with."""

  def run(command, *arguments):
    capsys.readouterr()
    code = cli.command(command.__name__, command.main, [str(word) for word in arguments])
    return Told(code, ''.join(capsys.readouterr()))

  return run


def trained_and_killed(told, monkeypatch, folder, *flags):
  """(folder of a run, folder of the same run that was killed and went on)."""
  alone, killed = folder / 'alone', folder / 'killed'
  update = random.Random(time.time_ns()).randint(3, STEPS - 1)
  print(f'killed after {update} updates')
  make_update = loop.Loop._update

  def until_killed(self):
    make_update(self)
    if self.place.number == update and not killed.exists():
      self.checkpoints.wait()
      shutil.copytree(alone, killed)

  with monkeypatch.context() as patched:
    patched.setattr(loop.Loop, '_update', until_killed)
    code, text = told(train, *flags, f'--workdir={alone}')
  assert code == 0, text
  jax.clear_caches()
  code, text = told(train, *flags, f'--workdir={killed}')
  kept = (update - 1) // 2 * 2  # that of an update is written after it
  assert code == 0 and f'going on after {kept}\n' in text, text
  return alone, killed


def flags_of(file, name):
  own = (f'method.name={name}', *FLAGS, *METHODS.get(name, ()))
  return (f'--config={file}', *(f'--config.{flag}' for flag in own))


def refused(told, name, backbone, folder, *flags):
  """Whether the method cannot serve such a model, which must then be said in one sentence."""
  wanted = error_of(name, backbone)
  if backbone == 'nnx_llama':
    wanted = SMALL_DECODER.get(name, wanted)
  if wanted is None:
    return False
  code, text = told(train, *flags, f'--workdir={folder}')
  assert code == 2 and re.search(wanted, text.splitlines()[-1]), text
  return True


def check_plan(told, name, flags):
  code, text = told(plan, *flags, '--target=cpu')
  assert code == 0 and name in text, text


def check_scores(told, name, run):
  """That the folder alone gives the scores of the report."""
  code, text = told(evaluate, f'--run={run}', '--json')
  assert code == 0, text
  found = json.loads(text.splitlines()[-1])
  if name == 'loram':  # the report has those of the narrow model
    assert found['step'] == STEPS
    return
  assert found['values'] == pytest.approx(
    json.loads((run / 'report.json').read_text())['eval'], rel=1e-5
  )


def check_merge(told, name, run, out):
  code, text = told(merge, f'--run={run}', f'--out={out}')
  if REGISTRY[name].mergeable:
    assert code == 0 and (out / 'model.safetensors').is_file(), text
  else:
    assert code == 2 and 'cannot be merged' in text and len(text.splitlines()) == 1, text


@pytest.mark.slow
@pytest.mark.parametrize('name', REGISTRY)
def test_images(told, monkeypatch, config_file, images, tmp_path, name):
  flags = flags_of(config_file, name)
  if refused(told, name, 'linen_vit', tmp_path, *flags):
    return
  alone, killed = trained_and_killed(told, monkeypatch, tmp_path, *flags)
  theta = load_file(alone / 'theta.safetensors')
  killing.assert_same(killed, alone, STEPS, arrays=len(theta))
  check_plan(told, name, flags)
  check_scores(told, name, killed)
  image = next(iter(sorted(images.rglob('*.png'))))
  code, text = told(predict, f'--run={killed}', f'--input={image}')
  assert code == 0 and image.name in text, text
  check_merge(told, name, killed, tmp_path / 'merged')


@pytest.fixture(scope='module')
def words_file(decoder, backwards, tmp_path_factory):
  file = tmp_path_factory.mktemp('words') / 'words.py'
  file.write_text(WORDS.format(decoder=str(decoder), backwards=backwards))
  return file


@pytest.mark.slow
@pytest.mark.parametrize('name', REGISTRY)
def test_texts(told, monkeypatch, words_file, tmp_path, name):
  flags = flags_of(words_file, name)
  if refused(told, name, 'nnx_llama', tmp_path, *flags):
    return
  alone, killed = trained_and_killed(told, monkeypatch, tmp_path, *flags)
  theta = load_file(alone / 'theta.safetensors')
  killing.assert_same(killed, alone, STEPS, arrays=len(theta))
  check_plan(told, name, flags)
  check_scores(told, name, killed)
  code, text = told(generate, f'--run={killed}', '--prompt', 'a b j', '--max_tokens=3')
  assert code == 0 and text.count('\n') == 1, text
  check_merge(told, name, killed, tmp_path / 'merged')
