"""Decoders with experts through the commands: trained, planned, asked, on a mesh, in 4 bits."""

import shutil

import jax
import numpy as np
import pytest

from jpeft import cli, generate, models, plan, train, training
from tests.params import fast_if
from tests.runs import LLAMA

SHARED = {**LLAMA, 'num_hidden_layers': 2, 'tie_word_embeddings': False, 'num_experts_per_tok': 2}
QWEN = {'num_experts': 4, 'moe_intermediate_size': 32, 'decoder_sparse_step': 1}
FAMILIES = {
  'mixtral': {'num_local_experts': 4},
  'qwen2_moe': {**QWEN, 'shared_expert_intermediate_size': 32, 'norm_topk_prob': False},
  'qwen3_moe': {**QWEN, 'norm_topk_prob': True, 'head_dim': 8},
}
CONFIG = '''"""Texts that a tiny decoder with experts learns to write."""


def get_config():
  return {{
    'task': 'language',
    'model': {{'source': {source!r}}},
    'data': {{'name': 'completions:{backwards}', 'batch_size': 8, 'max_length': 24}},
    'method': {{'name': 'lora', 'rank': 2, 'targets': '{{linear}}'}},
    'optimizer': {{'lr': 1e-2, 'eps': 1e-2}},
    'steps': 4,
    'log': {{'every': 1}},
    'mesh': {{'whole_below': 1}},
  }}
'''


@pytest.fixture(scope='module')
def config_of(decoder, backwards, tmp_path_factory):
  """config_of(family) -> the file of a config whose backbone is a random decoder of a family."""

  def made(family):
    folder = tmp_path_factory.mktemp(family)
    settings = {**SHARED, **FAMILIES[family], 'model_type': family}
    model = models.from_config(settings)
    tokens = np.zeros((1, 4), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    models.save_pretrained(folder / 'model', model, variables, settings)
    for file in ('tokenizer.json', 'tokenizer_config.json'):
      shutil.copy(decoder / file, folder / 'model')
    file = folder / 'config.py'
    file.write_text(CONFIG.format(source=str(folder / 'model'), backwards=backwards))
    return file

  return made


@pytest.fixture
def told(capsys):
  """told(command, *arguments) -> what a command that succeeds prints."""

  def run(command, *arguments):
    capsys.readouterr()
    code = cli.command(command.__name__, command.main, [str(word) for word in arguments])
    text = ''.join(capsys.readouterr())
    assert code == 0, text
    return text

  return run


@pytest.mark.parametrize('family', fast_if(lambda family: family == 'mixtral', FAMILIES))
def test_experts_are_trained_planned_and_asked(told, config_of, tmp_path, family):
  file = config_of(family)
  told(train, f'--config={file}', f'--workdir={tmp_path / "run"}')
  theta = training.reopen(tmp_path / 'run')[2]
  moved = {
    path.rpartition('/')[2]: np.abs(arrays['kernel']['b']).max()
    for path, arrays in theta['lora'].items()
    if 'experts' in path
  }
  assert set(moved) == {'gate', 'fc1', 'fc2'} and min(moved.values()) > 0
  assert 'lora' in told(plan, f'--config={file}', '--target=cpu')
  asked = ('--prompt', 'a b j', '--max_tokens=3')
  assert told(generate, f'--run={tmp_path / "run"}', *asked).count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('backbone', ['sharded', 'fsdp'])
def test_experts_on_a_mesh_are_those_of_one_device(told, config_of, tmp_path, family, backbone):
  file = config_of(family)
  mesh = ('--config.mesh.data=2', '--config.mesh.model=2', f'--config.mesh.backbone={backbone}')
  told(train, f'--config={file}', f'--workdir={tmp_path / "alone"}')
  told(train, f'--config={file}', f'--workdir={tmp_path / "mesh"}', *mesh)
  alone, cut = (training.reopen(tmp_path / name)[2] for name in ('alone', 'mesh'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), cut, alone)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_experts_in_4_bits(told, config_of, tmp_path, family):
  file = config_of(family)
  stored = ('--config.model.quantize=nf4',)
  told(train, f'--config={file}', f'--workdir={tmp_path / "run"}', *stored)
  assert 'nf4' in told(plan, f'--config={file}', *stored, '--target=cpu')
  asked = ('--prompt', 'a b j', '--max_tokens=3')
  assert told(generate, f'--run={tmp_path / "run"}', *asked).count('\n') == 1
