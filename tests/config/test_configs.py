"""The configs of the repository: each loads for every method, with hyperparameters it takes."""

import pathlib
import re

import pytest

from jpeft import config, tasks, training
from jpeft.methods import REGISTRY

FILES = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_method_by_name(file):
  for name in [*REGISTRY, 'pissa']:
    loaded = config.load(f'{file}:{name}')
    assert len(training.method_of(loaded)) >= 1
    assert loaded.method.name == ('lora' if name == 'pissa' else name)


def test_rows_of_the_language_config_that_are_more_than_a_method():
  def of(name):
    return config.load(f'configs/llm.py:{name}')

  galore = of('galore')
  assert (galore.method.name, galore.optimizer.name) == ('full', 'galore')
  assert (of('qpaca').method.name, of('qpaca').model.quantize) == ('paca', 'nf4_double')
  assert of('dept').optimizer.groups == (('.*/(a|b)', 1e-2),)
  assert (of('dpo').task, of('dpo').eval.metric) == ('preferences', 'accuracy')
  assert of('qlora').model.quantize is None


@pytest.mark.parametrize('name', ['prompt_tuning', 'dept'])
def test_methods_that_add_tokens_have_a_row_for_each_text(name, decoder):
  small = {'model.source': str(decoder), 'method.tokens': '2'}
  if name == 'dept':
    small['method.rank'] = '2'
  loaded = config.load(f'configs/llm.py:{name}', small)
  _, tuned = training.build(loaded, 0)
  task = tasks.of(loaded)
  task.check(loaded, tuned)
  loaded.data.pack = True
  with pytest.raises(ValueError, match='set config.data.pack=false'):
    task.check(loaded, tuned)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_the_docstring_holds_the_command(file):
  whole = config.load(str(file))
  command = re.search(
    r'python -m jpeft.train (--config=\S+)(?: --\S+)*', file.read_text().split('"""')[1]
  )
  assert command[1].startswith(f'--config=configs/{file.name}')
  assert whole.baseline is None or config.load(f'{file}:{whole.baseline}').baseline is None


def test_there_are_configs():
  known = {'emoji', 'glue', 'llm', 'quickstart', 'sentiment', 'vtab'}
  assert known <= {file.stem for file in FILES}
