"""Folders of the adapters library: they compute here what they compute there, and come back."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN as MODELS
from tests.models.goldens import close, golden

GOLDEN = Path(__file__).parent / 'golden' / 'adapters'
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
FORMS = {'double': 'houlsby', 'gelu': 'houlsby', 'seq': 'pfeiffer', 'tanh': 'pfeiffer'}
CONFIG, FILE, HEAD = 'adapter_config.json', 'adapter.safetensors', 'model_head.safetensors'


def attached(name, method, scan=False):
  """(the backbone, tuned, the arguments of a call)."""
  loaded = jpeft.load(MODELS / name, scan=scan)
  inputs, _ = golden(name)
  return loaded, jpeft.attach(loaded.model, method, loaded.variables, **inputs), inputs


def on_golden(name, folder, scan=False):
  """(the backbone, tuned, theta, what the model computes) of a folder."""
  loaded = jpeft.load(MODELS / name, scan=scan)
  inputs, _ = golden(name)
  method, theta = jpeft.load_adapter(folder, loaded)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, tuned.shapes)
  out = np.asarray(jax.jit(tuned.apply)(theta, loaded.variables, **inputs))
  return loaded, tuned, theta, out * inputs['mask'][..., None] if name == 'llama' else out


@pytest.mark.parametrize('case', CASES)
def test_a_folder_computes_what_the_library_computed_and_is_written_as_it_was(case, tmp_path):
  name, _, kind = case.partition('_')
  folder = GOLDEN / case
  scan = kind in ('double', 'par', 'learned')
  loaded, tuned, theta, out = on_golden(name, folder, scan)
  close(out, np.load(folder / 'logits.npy'), 1e-5)
  assert FORMS.get(kind, 'parallel' if name in ('bert', 'roberta') else 'adaptformer') in theta
  assert ('modules' in theta) == (folder / HEAD).exists()

  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned, layout='adapters', base=f'tiny-{name}')
  files = [FILE, *([HEAD] if (folder / HEAD).exists() else [])]
  told, theirs = (json.loads((f / CONFIG).read_text()) for f in (tmp_path, folder))
  scaled = kind in ('gelu', 'tanh')  # the scale went into the up projection
  for file in files:
    found, want = load_file(tmp_path / file), load_file(folder / file)
    found = {key.replace(f'.{told["name"]}.', '.task.'): x for key, x in found.items()}
    want = {key: x for key, x in want.items() if not (scaled and key.endswith('scaling'))}
    assert found.keys() == want.keys()
    for key, x in found.items():
      if not (scaled and '.adapter_up.' in key):
        np.testing.assert_array_equal(x, want[key])
  for field, value in told['config'].items():
    if field not in ('init_weights', 'scaling'):
      assert value == theirs['config'][field], field
  assert told['config']['scaling'] == (1.0 if scaled else theirs['config']['scaling'])
  assert {k: v for k, v in told.items() if k not in ('config', 'name')} == {
    k: v for k, v in theirs.items() if k not in ('config', 'name')
  }
  *_, again = on_golden(name, tmp_path, scan)
  close(again, out, 1e-6)


@pytest.fixture
def folder(tmp_path):
  """folder(case, drop=file, outer fields.., **fields of the inner config) -> a changed copy."""

  def made(case='bert_double', drop=(), outer=(), **fields):
    target = tmp_path / 'copy'
    shutil.copytree(GOLDEN / case, target)
    told = json.loads((target / CONFIG).read_text())
    told['config'].update(fields)
    told.update(outer)
    (target / CONFIG).write_text(json.dumps(told))
    for file in drop:
      (target / file).rename(
        target / {FILE: 'pytorch_adapter.bin', HEAD: 'pytorch_model_head.bin'}[file]
      )
    return target

  return made


@pytest.mark.parametrize(
  ('fields', 'message'),
  (
    ({'ln_before': True}, 'ln_before=True is not supported: it adds a norm'),
    ({'use_gating': True}, 'use_gating=True is not supported'),
    ({'inv_adapter': 'nice'}, "inv_adapter='nice' is not supported"),
    ({'phm_layer': True}, 'phm_layer=True is not supported'),
    ({'original_ln_after': False}, 'original_ln_after=False is not supported'),
    ({'original_ln_before': True}, 'original_ln_before=True with mh_adapter'),
    ({'is_parallel': True}, 'is_parallel=True with mh_adapter'),
    ({'residual_before_ln': 'post_add'}, "residual_before_ln='post_add' is not supported"),
    ({'non_linearity': 'leakyrelu'}, "non_linearity='leakyrelu' is none of relu"),
    ({'scaling': 'channel'}, "scaling='channel' is neither a number"),
    ({'reduction_factor': 8}, 'has a bottleneck of 6, and by adapter_config.json'),
    ({'router': 'top2'}, "router='top2' is not known here"),
    ({'architecture': 'lora'}, "architecture='lora' is not supported"),
    ({'outer': {'name': 'other'}}, "is no part of a bottleneck adapter 'other'"),
    ({'drop': [FILE]}, 'pytorch_adapter.bin is a pickle.* use_safetensors=True'),
    ({'drop': [HEAD]}, 'pytorch_model_head.bin is a pickle'),
  ),
)
def test_what_is_not_understood_is_refused_by_name(fields, message, folder):
  made = folder(**fields)
  with pytest.raises(ValueError, match=message):
    jpeft.load_adapter(made, jpeft.load(MODELS / 'bert'))


def test_gelu_of_old_folders_is_the_approximation(folder):
  """Before version 1 of the library `gelu` was what transformers calls gelu_new."""
  made = folder('bert_double', non_linearity='gelu')
  exact, _ = jpeft.load_adapter(made, jpeft.load(MODELS / 'bert'))
  told = json.loads((made / CONFIG).read_text())
  del told['version']
  (made / CONFIG).write_text(json.dumps(told))
  old, _ = jpeft.load_adapter(made, jpeft.load(MODELS / 'bert'))
  activations = [m[0][1].origin.hyperparameters['activation'] for m in (exact, old)]
  assert activations == ['gelu_exact', 'gelu']


def test_other_backbones_are_refused_by_name():
  loaded = jpeft.load(MODELS / 'dinov2')
  with pytest.raises(ValueError, match="for bert, roberta, vit, t5, llama, and .* 'dinov2'"):
    jpeft.load_adapter(GOLDEN / 'vit_double', loaded)


def test_layers_may_be_left_out_and_differ_in_width(tmp_path):
  first, last = jpeft.houlsby(4, '{fc2}'), jpeft.houlsby(3, '{fc2}', name='last')
  method = jpeft.chain(jpeft.in_layers(first, '0'), jpeft.in_layers(last, '1'))
  loaded, tuned, inputs = attached('bert', method)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path / 'both', loaded, theta, tuned=tuned, layout='adapters')
  told = json.loads((tmp_path / 'both' / CONFIG).read_text())['config']
  assert [24 // told['reduction_factor'][i] for i in '01'] == [4, 3] and not told['leave_out']
  *_, out = on_golden('bert', tmp_path / 'both')
  close(out, np.asarray(tuned.apply(theta, loaded.variables, **inputs)), 1e-6)

  loaded, tuned, inputs = attached('t5', jpeft.in_layers(jpeft.pfeiffer(4), '1:3'))
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path / 'some', loaded, theta, tuned=tuned, layout='adapters')
  told = json.loads((tmp_path / 'some' / CONFIG).read_text())['config']
  blocks = {key.rpartition('.layer')[0] for key in load_file(tmp_path / 'some' / FILE)}
  # The library counts the decoder's layers behind the two of the encoder.
  assert blocks == {'encoder.block.1', 'decoder.block.1', 'decoder.block.2'}
  assert told['leave_out'] == [0, 2]
  *_, out = on_golden('t5', tmp_path / 'some')
  close(out, np.asarray(tuned.apply(theta, loaded.variables, **inputs)), 1e-6)


@pytest.mark.parametrize(
  ('name', 'method', 'message'),
  (
    ('bert', jpeft.lora(2), 'theta holds none of houlsby'),
    ('bert', jpeft.vpt_deep(2), "'vpt_deep' at .* is none of houlsby"),
    ('bert', jpeft.houlsby(4, '{q}'), 'where the adapters library has no adapter of this kind'),
    ('vit', jpeft.parallel(4), 'reads what jpeft.adaptformer reads, and not what parallel does'),
    ('bert', jpeft.chain(jpeft.houlsby(4), jpeft.tune('{norm}')), 'holds adapters and a head'),
    ('bert', jpeft.chain(jpeft.houlsby(4), jpeft.pfeiffer(4)), 'differ in their kind'),
    (
      'bert',
      jpeft.chain(jpeft.houlsby(4, '{fc2}'), jpeft.houlsby(3, '{o}', name='o')),
      'each layer has all of them, of one width',
    ),
  ),
)
def test_what_such_folders_cannot_hold_is_told(name, method, message, tmp_path):
  loaded, tuned, _ = attached(name, method)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  with pytest.raises(ValueError, match=message):
    jpeft.save_adapter(tmp_path / 'out', loaded, theta, tuned=tuned, layout='adapters')
  assert not (tmp_path / 'out').exists()


def test_a_rule_without_theta_is_seen(tmp_path):
  def doubled(t, call, *args, **kwargs):
    return call.site.map_stream(call(*args, **kwargs), lambda x: 2 * x)

  method = jpeft.chain(jpeft.houlsby(4), jpeft.at('{mlp}', jpeft.Call('doubled', doubled)))
  loaded, tuned, _ = attached('bert', method)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables))
  with pytest.raises(ValueError, match='does what the folder does not hold'):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned, layout='adapters')


def test_other_tensors_are_refused(folder):
  made = folder()
  tensors = load_file(made / FILE)
  extra = 'bert.encoder.layer.0.output.adapters.task.gate.weight'
  save_file({**tensors, extra: np.ones((1, 24), np.float32)}, made / FILE)
  with pytest.raises(ValueError, match='gate.weight.* is no part of a bottleneck adapter'):
    jpeft.load_adapter(made, jpeft.load(MODELS / 'bert'))
