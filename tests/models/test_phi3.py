"""Phi-3: tensors that several layers share, and heads that turn in part, by LongRoPE."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.decoding import generate
from jpeft.models.io import Checkpoint
from jpeft.models.nn.rope import Rope
from jpeft.quant import Quantized
from tests.models.goldens import GOLDEN, close, golden, outputs

CONFIG = json.loads((GOLDEN / 'phi3_longrope' / 'config.json').read_text())
PHI3_MINI = {
  'model_type': 'phi3',
  'hidden_size': 3072,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'intermediate_size': 8192,
  'vocab_size': 32064,
  'sliding_window': 2047,
  'tie_word_embeddings': False,
}


def test_a_phi3_has_the_published_size():
  model = models.from_config(PHI3_MINI, scan=True)
  assert model.window == 2047 and model.eps == 1e-5
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert sum(x.size for x in jax.tree.leaves(tree)) == 3_821_079_552


@pytest.mark.parametrize('name,scan', [('phi3', True), ('gpt2', False)])
def test_layers_of_one_tensor_are_written_as_they_were_read(name, scan, tmp_path, monkeypatch):
  read = Checkpoint.read
  sizes = []

  def counted(self, key, part=None):
    array = read(self, key, part)
    sizes.append(array.size)
    return array

  with monkeypatch.context() as patched:
    patched.setattr(Checkpoint, 'read', counted)
    loaded = models.load(GOLDEN / name, scan=scan)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  old, new = (
    models.read_tensors(folder / 'model.safetensors') for folder in (GOLDEN / name, tmp_path)
  )
  assert any('qkv_proj' in key or 'c_attn' in key for key in old)
  assert old.keys() == new.keys()
  for key, tensor in old.items():
    np.testing.assert_array_equal(new[key], tensor)
  assert sum(sizes) == sum(tensor.size for tensor in old.values())  # each number once


def test_tensors_are_read_from_several_files(tmp_path):
  tensors = models.read_tensors(GOLDEN / 'phi3' / 'model.safetensors')
  weight_map = {}
  for number, keys in enumerate(np.array_split(sorted(tensors), 2)):
    file = f'model-{number}.safetensors'
    models.write_tensors(tmp_path / file, {key: tensors[key] for key in keys})
    weight_map |= dict.fromkeys(keys.tolist(), file)
  index = json.dumps({'weight_map': weight_map})
  (tmp_path / 'model.safetensors.index.json').write_text(index)
  shutil.copy(GOLDEN / 'phi3' / 'config.json', tmp_path)
  inputs, arrays = golden('phi3')
  close(outputs(models.load(tmp_path, scan=True), inputs), arrays['logits'])


def test_a_tensor_of_another_size_is_refused_whole(tmp_path):
  shutil.copytree(GOLDEN / 'phi3', tmp_path / 'phi3')
  config = json.loads((tmp_path / 'phi3' / 'config.json').read_text())
  config['num_key_value_heads'] = 2
  (tmp_path / 'phi3' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'qkv_proj.* has the shape \[32, 16\], .* needs \[48, 16\]'):
    models.load(tmp_path / 'phi3')


def test_kernels_are_stored_in_4_bits_while_they_are_read():
  inputs, _ = golden('phi3')
  whole = models.load(GOLDEN / 'phi3', scan=True)
  small = jpeft.quantize(whole.model, jpeft.nf4(), whole.variables, inputs['tokens'])
  read = models.load(GOLDEN / 'phi3', scan=True, quantize=jpeft.nf4())
  is_box = lambda x: isinstance(x, Quantized)
  boxes = [x for x in jax.tree.leaves(read.variables, is_leaf=is_box) if is_box(x)]
  assert len(boxes) == 7
  jax.tree.map(np.testing.assert_array_equal, read.variables, small)


def test_longrope_turns_by_the_length_of_the_row():
  """By the words of the rule: angles over factors, short ones up to the original context."""
  model = models.from_config(CONFIG)
  rope = model.rope
  assert rope.original == 16 and rope.part == 1.0
  assert rope.magnitude == pytest.approx((1 + np.log(64 / 16) / np.log(16)) ** 0.5)
  plain = 100.0 ** (-np.arange(4) / 4)
  np.testing.assert_allclose(rope.frequencies(8, 16), plain / [1.0, 1.1, 1.2, 1.4], rtol=1e-6)
  np.testing.assert_allclose(rope.frequencies(8, 17), plain / [1.5, 2.0, 3.0, 4.0], rtol=1e-6)
  with pytest.raises(ValueError, match='longrope has 4 factors, and 3 pairs of features turn'):
    rope.frequencies(6)


@pytest.mark.slow
def test_longrope_makes_one_choice_for_a_text_that_is_written():
  """Prompts of 12 tokens and 8 new ones have rows of 20, with a cache or without."""
  loaded = models.load(GOLDEN / 'phi3_longrope')
  tokens = jnp.asarray(golden('phi3_longrope')[0]['tokens'][:2, :12])
  one, other = (
    generate(loaded.model, loaded.variables, tokens, new_tokens=8, cache=cache).tokens
    for cache in (True, False)
  )
  np.testing.assert_array_equal(one, other)


def test_a_part_of_a_head_turns():
  x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
  turned = Rope(part=0.5).rotate(x, jnp.arange(5))
  np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
  np.testing.assert_array_equal(turned[..., :4], Rope().rotate(x[..., :4], jnp.arange(5)))


def test_configs_of_older_files_are_the_same_model():
  rope = CONFIG['rope_parameters']
  old = {key: value for key, value in CONFIG.items() if key != 'rope_parameters'}
  old |= {
    'rope_theta': 100.0,
    'rope_scaling': {
      'type': 'su',
      **{key: rope[key] for key in ('short_factor', 'long_factor')},
    },
  }
  assert models.from_config(old) == models.from_config(CONFIG)
  with pytest.raises(ValueError, match="rope type 'linear' of a phi3 is none of"):
    models.from_config({**CONFIG, 'rope_parameters': {'rope_type': 'linear', 'factor': 2.0}})


def test_adapter_folders_hold_no_part_of_a_tensor(tmp_path):
  loaded = models.load(GOLDEN / 'phi3')
  tokens = golden('phi3')[0]['tokens']
  tuned = jpeft.attach(loaded.model, jpeft.lora(2), loaded.variables, tokens)
  theta = tuned.init(jax.random.key(0), loaded.variables)
  with pytest.raises(ValueError, match=r"is a part of 'model.layers.0.self_attn.qkv_proj.weight'"):
    jpeft.save_adapter(tmp_path, loaded, theta, 4, tuned=tuned)
