"""The towers of images of CLIP and SigLIP: configs, what a head reads, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import models
from jpeft.core import sites_of
from tests.models.goldens import GOLDEN, close, golden, outputs

IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@pytest.mark.parametrize(
  'kind,count', (('clip', 87_456_000), ('siglip', 92_884_224)), ids=('clip', 'siglip')
)
def test_configs_may_leave_out_what_is_the_default(kind, count):
  for config in (
    {'model_type': kind, 'vision_config': {}},
    {'model_type': f'{kind}_vision_model'},
  ):
    model = models.from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize('name,pool', (('clip', 'cls'), ('siglip', 'attention')))
def test_a_fresh_head_reads_what_the_tower_returns(name, pool, tmp_path):
  inputs, arrays = golden(name)
  loaded = models.load(GOLDEN / name, num_classes=3)
  assert loaded.model.pool == pool
  kernel = np.random.default_rng(0).normal(size=(12, 3)).astype('f')
  loaded.variables['params']['head']['kernel'] = jnp.asarray(kernel)
  close(outputs(loaded, inputs), arrays['logits'] @ kernel)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path)
  assert again.model == loaded.model and again.config['model_type'] == name
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
  told = f"the classes of transformers read pool='mean', and this run '{pool}'"
  assert models.departure(again) == told
  by_mean = models.load(GOLDEN / name, num_classes=3, pool='mean')
  assert models.departure(by_mean) is None


def test_the_mean_of_a_clip_is_not_normalised():
  inputs, _ = golden('clip')
  tokens = outputs(models.load(GOLDEN / 'clip', pool='tokens'), inputs)
  got = outputs(models.load(GOLDEN / 'clip', pool='mean'), inputs)
  np.testing.assert_allclose(got, tokens[:, 1:].mean(1), atol=1e-5)


def test_naming_schemes_know_the_tokens_before_the_patches():
  for name, lead in (('clip', 1), ('siglip', 0)):
    loaded = models.load(GOLDEN / name, pool='mean')
    sites = sites_of(loaded.model, loaded.variables, golden(name)[0]['images'])
    assert sites[''].model.lead == lead, name


@pytest.mark.parametrize(
  'change,options,message',
  (
    ({}, {'pool': 'cls'}, "pool 'cls' reads a class token, and there is none: choose 'mean'"),
    ({'vision_use_head': False}, {'pool': 'attention'}, "pool 'attention' reads a layer that this"),
    ({'patch_size': 0}, {}, 'vision_config: patch_size must be from 1 to'),
    (None, {}, "the config of a siglip model needs 'vision_config'"),
  ),
)
def test_what_is_not_supported_is_named(change, options, message, tmp_path):
  config = json.loads((GOLDEN / 'siglip_labels' / 'config.json').read_text())
  if change is None:
    del config['vision_config']
  else:
    config['vision_config'] |= change
  (tmp_path / 'config.json').write_text(json.dumps(config))
  tensors = models.read_tensors(GOLDEN / 'siglip_labels' / 'model.safetensors')
  models.write_tensors(tmp_path / 'model.safetensors', tensors)
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path, num_classes=3, **options)


def test_a_saved_bare_tower_keeps_its_config(tmp_path):
  loaded = models.load(GOLDEN / 'siglip', image_size=42, layers=1)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path)
  assert again.model == loaded.model
  assert again.config['model_type'] == 'siglip_vision_model'
  assert again.config['num_hidden_layers'] == 1 and again.config['image_size'] == 42
