"""Folders in and out: round trips, other layouts of the same weights, and files that are wrong."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as st

from jpeft import models
from tests.models.goldens import GOLDEN, NAMES


def tensors(folder):
  return st.load_file(folder / 'model.safetensors')


def changed(name, folder, change):
  """A copy of a golden folder whose tensors went through change(dict)."""
  folder.mkdir(exist_ok=True)
  shutil.copy(GOLDEN / name / 'config.json', folder)
  st.save_file(change(tensors(GOLDEN / name)), folder / 'model.safetensors')
  return folder


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('scan', (False, True))
@pytest.mark.parametrize('name', NAMES)
def test_saving_gives_back_every_tensor(name, scan, tmp_path):
  loaded = models.load(GOLDEN / name, scan=scan)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  same(tensors(tmp_path), tensors(GOLDEN / name))
  before, after = (json.loads((f / 'config.json').read_text()) for f in (GOLDEN / name, tmp_path))
  assert before['architectures'] == after['architectures']
  same(models.load(tmp_path, scan=scan).variables, loaded.variables)


def test_scanned_and_unrolled_layouts_hold_the_same_numbers():
  plain, stacked = (
    models.load(GOLDEN / 't5', scan=scan).variables['params']['decoder'] for scan in (False, True)
  )
  for i in range(3):
    same(plain[f'block_{i}'], jax.tree.map(lambda x, i=i: x[i], stacked['blocks']))


def test_a_new_head_is_small_and_seeded_and_its_config_says_so(tmp_path):
  loaded, other = (models.load(GOLDEN / 'deit', num_classes=5, seed=seed) for seed in (0, 1))
  for name in ('head', 'head_distill'):
    head = loaded.variables['params'][name]
    assert head['kernel'].shape == (24, 5) and 0.01 < float(head['kernel'].std()) < 0.03
    assert not np.asarray(head['bias']).any()
    assert not np.array_equal(head['kernel'], other.variables['params'][name]['kernel'])
  assert len(loaded.config['id2label']) == 5
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  same(models.load(tmp_path).variables, loaded.variables)


@pytest.mark.parametrize('name', ('vit', 'roberta', 't5'))
def test_layers_keeps_the_first_blocks(name, tmp_path):
  whole, short = models.load(GOLDEN / name), models.load(GOLDEN / name, layers=1)
  same(
    short.variables['params']['encoder']['block_0'], whole.variables['params']['encoder']['block_0']
  )
  assert 'block_1' not in short.variables['params']['encoder']
  models.save_pretrained(tmp_path, short.model, short.variables, short.config)
  same(models.load(tmp_path).variables, short.variables)
  with pytest.raises(ValueError, match='layers=9 is not between 1 and'):
    models.load(GOLDEN / name, layers=9)


def test_bare_and_headed_files_hold_the_same_backbone(tmp_path):
  strip = lambda t: {
    k.removeprefix('vit.'): v for k, v in t.items() if not k.startswith('classifier')
  }
  bare, headed = models.load(changed('vit', tmp_path, strip)), models.load(GOLDEN / 'vit')
  assert bare.model.num_classes is None
  for name, part in bare.variables['params'].items():
    same(part, headed.variables['params'][name])


def test_shards_hold_the_same_tensors(tmp_path):
  whole = tensors(GOLDEN / 'bert')
  shutil.copy(GOLDEN / 'bert' / 'config.json', tmp_path)
  index = {}
  for i in range(2):
    part = dict(list(whole.items())[i::2])
    st.save_file(part, tmp_path / f'part{i}.safetensors')
    index |= {key: f'part{i}.safetensors' for key in part}
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(json.dumps({'weight_map': index}))
  loaded = models.load(tmp_path)
  same(loaded.variables, models.load(GOLDEN / 'bert').variables)
  assert set(loaded.files) == {'part0.safetensors', 'part1.safetensors'}
  path.write_text(json.dumps({'weight_map': index | {'extra': 'part1.safetensors'}}))
  with pytest.raises(ValueError, match="'extra' is said to be in part1.safetensors"):
    models.load(tmp_path)
  (tmp_path / 'part1.safetensors').rename(tmp_path / 'part2.safetensors')
  with pytest.raises(FileNotFoundError, match='part1.safetensors is missing.*there is'):
    models.load(tmp_path)


@pytest.mark.parametrize('dtype', (ml_dtypes.bfloat16, np.float16))
def test_half_precision_files_are_widened_and_saved_as_they_were(dtype, tmp_path):
  folder = changed('bert', tmp_path / 'half', lambda t: {k: v.astype(dtype) for k, v in t.items()})
  wide = models.load(folder)
  assert {str(x.dtype) for x in jax.tree.leaves(wide.variables)} == {'float32'}
  narrow = models.load(folder, param_dtype=np.dtype(dtype).name)
  same(jax.tree.map(lambda x: x.astype('float32'), narrow.variables), wide.variables)
  models.save_pretrained(tmp_path, narrow.model, narrow.variables, narrow.config)
  same(tensors(tmp_path), tensors(folder))


def test_old_names_and_spare_keys_are_accepted(tmp_path):
  def old(t):
    names = {
      k: k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
        'LayerNorm.bias', 'LayerNorm.beta'
      )
      for k in t
    }
    spare = {
      'bert.embeddings.position_ids': np.arange(24)[None],
      'cls.seq_relationship.bias': np.zeros(2),
    }
    return {names[k]: v for k, v in t.items()} | spare

  folder = changed('bert', tmp_path, old)
  assert any(k.endswith('gamma') for k in tensors(folder))
  same(models.load(folder).variables, models.load(GOLDEN / 'bert').variables)


def test_one_error_names_all_that_does_not_fit(tmp_path):
  def spoil(t):
    key = 'bert.encoder.layer.1.intermediate.dense.weight'
    t[key.replace('weight', 'wieght')] = t.pop(key)
    t['classifier.weight'] = np.zeros((3, 23), np.float32)
    return t

  with pytest.raises(ValueError) as error:
    models.load(changed('bert', tmp_path, spoil))
  text = str(error.value)
  assert str(tmp_path) in text and text.count('\n') == 3
  assert (
    "missing 'encoder.layer.1.intermediate.dense.weight', [40, 24] for "
    'encoder/block_1/mlp/fc1/kernel; the nearest in the file: '
    "'bert.encoder.layer.1.intermediate.dense.wieght' of shape [40, 24]"
  ) in text
  assert (
    "'classifier.weight' has the shape [3, 23], the model needs [3, 24] for head/kernel" in text
  )
  assert "unexpected 'bert.encoder.layer.1.intermediate.dense.wieght'" in text


def _short(data):
  return data[:-7]


def _lying(data):
  return data.replace(b'[40,24]', b'[40,25]', 1)


def _empty(data):
  return b''


def _huge(data):
  return (2**62).to_bytes(8, 'little') + data[8:]


@pytest.mark.parametrize('damage', (_short, _lying, _huge, _empty))
def test_damaged_files_are_named(damage, tmp_path):
  folder = changed('bert', tmp_path, lambda t: t)
  file = folder / 'model.safetensors'
  data = file.read_bytes()
  file.write_bytes(damage(data))
  assert file.read_bytes() != data
  with pytest.raises(ValueError, match='model.safetensors is no readable safetensors file'):
    models.load(folder)


def test_pickles_are_refused(tmp_path):
  shutil.copy(GOLDEN / 'bert' / 'config.json', tmp_path)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(ValueError, match='pytorch_model.bin but no model.safetensors.*convert it'):
    models.load(tmp_path)
