"""ModernBERT: windows and rotary positions by block, packed rows, adapters, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from tests.fixtures import noisy
from tests.models.goldens import GOLDEN, golden

# As published: answerdotai/ModernBERT-base.
BASE = {
  'model_type': 'modernbert',
  'hidden_size': 768,
  'intermediate_size': 1152,
  'num_hidden_layers': 22,
  'num_attention_heads': 12,
  'vocab_size': 50368,
  'local_attention': 128,
  'global_attn_every_n_layers': 3,
  'global_rope_theta': 160000.0,
  'local_rope_theta': 10000.0,
}


def test_every_third_block_sees_all():
  model = models.from_config(BASE)
  assert model.window == ((None, 65, 65) * 8)[:22]
  assert (model.rope.theta, model.window_rope.theta) == (160000, 10000)


def test_configs_of_two_ages_are_the_same_model():
  new = {key: value for key, value in BASE.items() if 'rope' not in key and 'every' not in key}
  new['layer_types'] = [
    'sliding_attention' if i % 3 else 'full_attention' for i in range(BASE['num_hidden_layers'])
  ]
  new['rope_parameters'] = {
    'full_attention': {'rope_type': 'default', 'rope_theta': 160000.0},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 10000.0},
  }
  assert models.from_config(new) == models.from_config(BASE)


def test_lora_of_a_whole_base_model(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(BASE))
  described = models.describe(tmp_path, num_classes=2)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  tuned = jpeft.attach(described.model, jpeft.lora(8), described.variables, tokens)
  count = sum(x.size for x in jax.tree.leaves(tuned.shapes['lora']))
  assert count == 22 * 2 * 8 * (768 + 768) == 540_672


def test_packed_texts_see_themselves_alone():
  loaded = models.load(GOLDEN / 'modernbert_masked')
  tokens = jnp.asarray(golden('modernbert_masked')[0]['tokens'][:1, :12])
  texts = jnp.array([[1] * 7 + [2] * 5])
  packed = jax.jit(loaded.model.apply)(loaded.variables, tokens, texts)
  alone = jax.jit(loaded.model.apply)(loaded.variables, tokens[:, 7:])
  np.testing.assert_allclose(packed[:, 7:], alone, atol=1e-5)


@pytest.mark.parametrize('coded', [False, True])
def test_lora_merges_into_parts_of_one_tensor(coded, tmp_path):
  loaded = models.load(GOLDEN / 'modernbert_masked', quantize=jpeft.nf4() if coded else None)
  tokens = jnp.asarray(golden('modernbert_masked')[0]['tokens'][:1])
  method = jpeft.lora(2, targets='{linear}')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, tokens)
  theta = noisy(tuned.init(jax.random.key(0), loaded.variables), 0.2)
  got = jax.jit(tuned.apply)(theta, loaded.variables, tokens)
  merged = tuned.merge(theta, loaded.variables)
  models.save_pretrained(tmp_path, loaded.model, merged, loaded.config)
  again = models.load(tmp_path)
  want = jax.jit(again.model.apply)(again.variables, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
  'change,options,message',
  [
    ({'decoder_bias': False}, {'head': 'masked'}, 'decoder_bias=False is not supported'),
    ({'tie_word_embeddings': False}, {'head': 'masked'}, 'has a table of its own'),
    ({'local_attention': 0}, {}, 'local_attention must be from 1'),
    ({'classifier_pooling': 'max'}, {'num_classes': 2}, "pool 'max' is none of"),
  ],
)
def test_what_is_refused(change, options, message):
  with pytest.raises(ValueError, match=message):
    model = models.from_config({**BASE, **change}, **options)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))


def test_a_scan_and_too_many_tokens_are_refused():
  model = models.from_config({**BASE, 'max_position_embeddings': 8})
  with pytest.raises(ValueError, match='9 tokens are more than the 8 positions'):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
  with pytest.raises(ValueError, match='scan=True runs one program for all blocks'):
    model.clone(scan=True).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
