"""Rows of tokens that devices share: every layout gives the numbers of one device.

For what is compared and why, see test_layout.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft import cli, plan, programs, training
from jpeft.core import dot_product
from jpeft.models import Llama
from jpeft.models.nn import Experts
from tests.params import fast_if
from tests.training.decoders import Shape, distance, named, prepared

# Meshes are (data, model, sequence).
ROWS_OF_TEXTS = Shape(length=16, packed=True)
SHAPES = {
  'scan': ROWS_OF_TEXTS,
  'remat': Shape(length=16, packed=True, remat=True),
  'unroll': Shape(length=16, packed=True, scan=False),
  'unroll remat': Shape(length=16, packed=True, scan=False, remat=True),
  'two key heads': Shape(length=16, packed=True, kv_heads=2),
}
QUICK = ('lora', (2, 2, 2), 'sharded', 'remat')
CELLS = [
  QUICK,
  ('qlora', (2, 2, 2), 'sharded', 'scan'),
  ('qst', (2, 2, 2), 'sharded', 'remat'),
  ('lora', (1, 1, 8), 'replicated', 'remat'),
  ('lora', (1, 4, 2), 'sharded', 'two key heads'),
  ('lora', (4, 1, 2), 'fsdp', 'unroll remat'),
  ('qlora', (1, 1, 8), 'fsdp', 'unroll'),
  ('qlora', (4, 1, 2), 'replicated', 'remat'),
  ('qst', (1, 1, 8), 'replicated', 'scan'),
  ('qst', (4, 1, 2), 'fsdp', 'unroll'),
  ('lst', (2, 2, 2), 'fsdp', 'scan'),
  ('lst', (1, 1, 8), 'replicated', 'unroll'),
  ('lst', (4, 1, 2), 'replicated', 'remat'),
  ('saved_bits', (1, 2, 4), 'sharded', 'scan'),
  ('meft', (2, 1, 4), 'replicated', 'scan'),
  ('full', (2, 2, 2), 'fsdp', 'remat'),
]


@pytest.fixture
def long_contexts(monkeypatch):
  """Every context is long, and no piece of attention has all rows."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 300)


@pytest.mark.parametrize(
  ('kind', 'mesh', 'backbone', 'shape'), fast_if(lambda *cell: cell == QUICK, CELLS, named)
)
def test_long_contexts_train_as_on_one_device(kind, mesh, backbone, shape, long_contexts):
  """With several texts in a row, and padding on both sides."""
  shape = SHAPES[shape]
  many = prepared.__wrapped__(kind, mesh, backbone, shape)
  alone = prepared.__wrapped__(kind, (1, 1), 'replicated', shape)
  one = alone.trained(8)
  assert distance(many.trained(8), one) < 1e-5 * distance(one, alone.trained(0))
  sent = programs.collectives(many.program, many.layout.mesh.shape)
  assert any(one.kind == 'all-gather' and one.axes == ('sequence',) for one in sent)


def planned(length, methods, mesh=(1, 1, 2), **fields):
  """The plans of methods on texts of some length."""
  model = Llama(32, 1, 4, 64, 40, kv_heads=2, **fields)
  texts = jax.ShapeDtypeStruct((2, length), jnp.int32)
  batch = {'tokens': texts, 'token_mask': texts, 'label': texts}
  return jpeft.plan(model, methods, batch, mesh=mesh, target='cpu', head=False)


def test_a_plan_says_what_is_sent_along_a_text_and_what_reads_all_of_it(long_contexts):
  plans = planned(8, 'lora', experts=Experts(4, 2))
  (found,) = plans
  assert found.devices == 2
  kinds = {one.kind for one in found.traffic if one.axes == ('sequence',)}
  assert 'all-gather' in kinds
  (told,) = found.uncut
  assert told.startswith('mesh.sequence=2: the tokens of all devices are sorted for decoder/')
  assert f'lora: {told}' in str(plans).splitlines()


def test_tokens_that_cannot_be_cut_are_refused():
  with pytest.raises(ValueError, match='mesh.sequence=2 does not divide the 9 tokens .*=8 would'):
    planned(9, 'lora')
  # Tokens of the method's own: nine in all.
  with pytest.raises(ValueError, match="does not divide the 9 tokens that the block 'decoder/bl"):
    planned(8, {'prompt': jpeft.prompt_tuning(1)})
  (found,) = planned(8, {'prompt': jpeft.prompt_tuning(2)})
  assert found.uncut == ()


@pytest.fixture
def texts(language):
  """texts(**{dotted key: value}) -> a config of a run that learns to write."""
  own = {
    'method.name': 'lora',
    'optimizer.eps': 1e-2,
    'schedule.name': 'constant',  # that of any length
    'steps': 4,
    'log.every': 1,
  }
  return lambda **changes: language(**own | changes)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(texts, tmp_path, long_contexts):
  """Two updates with rows that four devices share, then two with others."""
  alone = training.train(texts(), tmp_path / 'alone')
  cut = {'mesh.sequence': 4, 'mesh.model': 2, 'mesh.backbone': 'sharded', 'mesh.whole_below': 1}
  training.train(texts(steps=2, **cut), tmp_path / 'cut')
  again = texts(**{'mesh.data': 2, 'mesh.sequence': 2})
  found = training.train(again, tmp_path / 'cut', ['mesh', 'steps'])
  assert found['steps'] == 4
  one, other = (load_file(tmp_path / name / 'theta.safetensors') for name in ('alone', 'cut'))
  for name, x in one.items():
    np.testing.assert_allclose(x, other[name], rtol=1e-4, atol=1e-5)
  for name, value in alone['eval'].items():
    np.testing.assert_allclose(found['eval'][name], value, rtol=1e-4)


def test_train_and_plan_refuse_a_length_alike(texts, tmp_path, capsys):
  settings = texts(**{'mesh.sequence': 5})
  said = 'mesh.sequence=5 does not divide the 24 tokens of a row: data.max_length=20 would do'
  with pytest.raises(cli.Mistake, match=said):
    training.train(settings, tmp_path / 'run')
  file = tmp_path / 'own.py'
  file.write_text(f'def get_config():\n  return {settings.to_dict()!r}\n')
  with pytest.raises(cli.Mistake, match=said):
    plan.main([f'--config={file}', '--target=cpu'])
