"""BEiT and DINOv3: positions by definition, heads of other files, and what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy as st

import jpeft
from jpeft import models
from jpeft.methods.registry import make
from jpeft.models.nn import GridBias, GridRope
from jpeft.models.nn.positions import grid_distances
from tests.models.goldens import GOLDEN, golden, outputs


def config_of(name, **changes):
  return json.loads((GOLDEN / name / 'config.json').read_text()) | changes


def test_pairs_as_far_apart_read_the_same_row():
  rows, columns = 2, 3
  index = grid_distances((rows, columns))
  places = [divmod(i, columns) for i in range(rows * columns)]
  rows_of = {}
  for i, (r, c) in enumerate(places):
    for j, (s, d) in enumerate(places):
      rows_of.setdefault((r - s, c - d), set()).add(int(index[1 + i, 1 + j]))
  assert len(rows_of) == 15 and all(len(found) == 1 for found in rows_of.values())
  # From the furthest above and left, in order; then those of the class token.
  assert [min(rows_of[key]) for key in sorted(rows_of)] == list(range(15))
  assert set(index[0, 1:]) == {15} and set(index[1:, 0]) == {16} and index[0, 0] == 17


def test_tokens_between_class_token_and_patches_have_no_bias():
  bias = GridBias(2, (2, 2))
  table = np.random.default_rng(0).normal(size=(12, 2)).astype('f')
  plain = bias.apply({'params': {'embedding': table}}, 5)
  wide = np.array(bias.apply({'params': {'embedding': table}}, 8))
  own = [0, 4, 5, 6, 7]
  np.testing.assert_array_equal(wide[:, :, own][..., own], plain)
  assert not wide[:, :, 1:4].any() and not wide[..., 1:4].any()
  with pytest.raises(ValueError, match='2 x 2 patches, and its sequence of 3 tokens'):
    bias.apply({'params': {'embedding': table}}, 3)


def test_patches_turn_by_row_and_column_and_others_do_not():
  rope = GridRope((2, 3), theta=10.0)
  x = np.random.default_rng(0).normal(size=(1, 8, 2, 8)).astype('f')  # two tokens before 6 patches
  got = np.array(rope.rotate(x))
  np.testing.assert_array_equal(got[:, :2], x[:, :2])
  for patch in range(6):
    row, column = divmod(patch, 3)
    places = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 3 - 1
    for i in range(4):  # pairs of features: rows with two frequencies, then columns
      turn = np.exp(2j * np.pi * places[i // 2] * 10.0 ** (-(i % 2) / 2))
      pair = (x[0, 2 + patch, :, i] + 1j * x[0, 2 + patch, :, i + 4]) * turn
      np.testing.assert_allclose(got[0, 2 + patch, :, i], pair.real, atol=1e-6)
      np.testing.assert_allclose(got[0, 2 + patch, :, i + 4], pair.imag, atol=1e-6)
  with pytest.raises(ValueError, match='a head size of 6 is no multiple of 4'):
    rope.rotate(x[..., :6])


@pytest.mark.parametrize('name', ('beit', 'dinov3'))
def test_methods_that_add_tokens_and_those_that_need_places(name):
  loaded = models.load(GOLDEN / name, num_classes=3, scan=True)
  images = golden(name)[0]['images']
  with pytest.raises(ValueError, match='a method that runs tokens of its own through a block'):
    tuned = jpeft.attach(loaded.model, make('vqt'), loaded.variables, images)
    theta = jax.eval_shape(tuned.init, jax.random.key(0), loaded.variables)
    jax.eval_shape(tuned.apply, theta, loaded.variables, images)
  for method in ('vpt_shallow', 'vpt_deep', 'prefix', 'unipt', 'meft'):
    tuned = jpeft.attach(loaded.model, make(method), loaded.variables, images)
    theta = jax.jit(tuned.init)(jax.random.key(0), loaded.variables)
    square = lambda theta: (tuned.apply(theta, loaded.variables, images) ** 2).mean()  # noqa: B023
    gradient = jax.jit(jax.grad(square))(theta)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient['head']))


def test_heads_of_patches_are_left_out_on_request(tmp_path):
  """Files of masked images have a norm of all tokens beside the head, those of segments have
  layers before it, and neither a pooler.
  """
  arrays = st.load_file(GOLDEN / 'beit' / 'model.safetensors')
  kept = {k: x for k, x in arrays.items() if 'pooler' not in k and 'classifier' not in k}
  norm = {'layernorm.weight': np.full(12, 7, 'f'), 'layernorm.bias': np.zeros(12, 'f')}
  head = {'lm_head.weight': np.ones((5, 12), 'f'), 'lm_head.bias': np.ones(5, 'f')}
  st.save_file({**kept, **norm, **head}, tmp_path / 'model.safetensors')
  config = config_of('beit', architectures=['BeitForMaskedImageModeling'])
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match='BeitForMaskedImageModeling, whose head jpeft does not have'
  ):
    models.load(tmp_path)
  with pytest.raises(ValueError, match="missing 'pooler.layernorm.weight'"):
    models.load(tmp_path, head=None)
  images = golden('beit')[0]
  tokens = outputs(models.load(tmp_path, head=None, pool='tokens'), images)
  np.testing.assert_array_equal(
    tokens, outputs(models.load(GOLDEN / 'beit', head=None, pool='tokens'), images)
  )
  kept['decode_head.classifier.weight'] = np.ones((5, 12, 1, 1), 'f')
  kept['fpn1.0.weight'] = np.ones((12, 12, 2, 2), 'f')
  st.save_file(kept, tmp_path / 'model.safetensors')
  loaded = models.load(tmp_path, head=None, pool='tokens')
  np.testing.assert_array_equal(tokens, outputs(loaded, images))
  fresh = models.load(tmp_path, num_classes=4)
  assert (np.array(fresh.variables['params']['pool_norm']['scale']) == 1).all()
  assert outputs(fresh, images).shape == (2, 4)


def test_the_norm_of_the_base_model_is_read_where_a_head_has_one_too(tmp_path):
  arrays = st.load_file(GOLDEN / 'beit_shared' / 'model.safetensors')
  more = {'layernorm.weight': np.full(12, 7, 'f'), 'layernorm.bias': np.zeros(12, 'f')}
  st.save_file({**arrays, **more}, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config_of('beit_shared')))
  got = models.load(tmp_path).variables['params']['final_norm']['scale']
  np.testing.assert_array_equal(got, arrays['beit.layernorm.weight'])


@pytest.mark.parametrize(
  'name,change,message',
  (
    (
      'beit',
      {'use_shared_relative_position_bias': True},
      'use_relative_position_bias with use_sha',
    ),
    ('beit', {'num_channels': 1}, 'num_channels=1: images have three colours'),
    ('dinov3', {'patch_size': [7, 14]}, r'patch_size=\[7, 14\]: patches that are no squares'),
    ('dinov3', {'num_attention_heads': 4}, 'a head size of 6 is no multiple of 4'),
    ('dinov3', {'num_register_tokens': 2}, 'num_register_tokens=2, and .* has 3 register tokens'),
    ('dinov3', {'hidden_act': 'tanh'}, "the activation 'tanh' is none of"),
    ('beit', {'architectures': ['BeitForSemanticSegmentation']}, 'BeitForSemanticSegmentation'),
  ),
)
def test_what_is_not_supported_is_named(name, change, message, tmp_path):
  arrays = st.load_file(GOLDEN / name / 'model.safetensors')
  if 'architectures' in change:
    arrays = {k: x for k, x in arrays.items() if 'classifier' not in k}
    arrays['decode_head.classifier.weight'] = np.zeros((3, 12, 1, 1), 'f')
  st.save_file(arrays, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config_of(name, **change)))
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path)


def test_a_dinov3_without_registers_has_an_empty_array_of_them(tmp_path):
  arrays = st.load_file(GOLDEN / 'dinov3' / 'model.safetensors')
  arrays['embeddings.register_tokens'] = np.zeros((1, 0, 24), 'f')
  st.save_file(arrays, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(config_of('dinov3', num_register_tokens=0)))
  loaded = models.load(tmp_path, pool='tokens')
  assert outputs(loaded, golden('dinov3')[0]).shape == (2, 17, 24)


def test_a_dinov3_with_a_head_is_saved_with_it(tmp_path):
  loaded = models.load(GOLDEN / 'dinov3', num_classes=5)
  assert loaded.model.pool == 'cls_mean'
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path)
  assert again.model == loaded.model
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
