"""Gemma, Gemma 2 and 3: configs, windows by block, soft caps, caches, methods, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.core import dot_product
from jpeft.decoding import generate
from tests.models.goldens import GOLDEN, close, golden, outputs

CONFIG = json.loads((GOLDEN / 'gemma3' / 'config.json').read_text())


def test_blocks_have_windows_and_rotations_of_their_own():
  model = models.from_config(CONFIG)
  assert model.window == (5, None, 5)
  assert model.rope.factor == 8 and model.rope.theta == 1000
  assert model.window_rope.theta == 100 and model.window_rope.scaling == 'default'
  assert model.query_scale == pytest.approx(1 / 3)
  assert model.embed_scale == pytest.approx(24**0.5)


def test_configs_of_older_files_are_the_same_model():
  new = {**CONFIG, 'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention']}
  old = {k: v for k, v in new.items() if k not in ('layer_types', 'rope_parameters')}
  old |= {
    'sliding_window_pattern': 2,
    'rope_theta': 1000.0,
    'rope_local_base_freq': 100.0,
    'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
  }
  assert models.from_config(old) == models.from_config(new)
  first = models.from_config({**old, 'sliding_window_pattern': 6})
  assert first.window == 5  # no block of these three is the sixth


def test_the_first_blocks_keep_their_windows(tmp_path):
  loaded = models.load(GOLDEN / 'gemma3', layers=2)
  assert loaded.model.window == (5, None)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  assert models.load(tmp_path).model == loaded.model


def test_the_first_gemma_says_gelu_and_means_the_approximation():
  config = json.loads((GOLDEN / 'gemma' / 'config.json').read_text())
  plain = models.from_config(config)
  assert models.from_config({**config, 'hidden_act': 'gelu'}) == plain


@pytest.mark.parametrize('name', ['gemma', 'gemma3', 'gemma2'])
def test_a_cache_changes_no_word(name):
  loaded = models.load(GOLDEN / name)
  inputs, _ = golden(name)
  tokens = jnp.asarray(inputs['tokens'][:2, :6])
  found = generate(loaded.model, loaded.variables, tokens, new_tokens=8).tokens
  longer = tokens
  for _ in range(8):
    logits = loaded.model.apply(loaded.variables, longer)
    longer = jnp.concatenate([longer, logits[:, -1:].argmax(-1)], 1)
  np.testing.assert_array_equal(np.asarray(found)[:, -8:], longer[:, -8:])


@pytest.mark.parametrize(
  'method',
  [
    jpeft.lora(2, targets='{linear}'),
    jpeft.norm(),
    jpeft.qst(reduction=2),
    jpeft.lst(reduction=1, block='own'),
    jpeft.pfeiffer(2),
  ],
  ids=['lora', 'norm', 'qst', 'lst', 'pfeiffer'],
)
def test_methods_attach_and_train(method):
  loaded = models.load(GOLDEN / 'gemma3')
  inputs, _ = golden('gemma3')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = jax.jit(tuned.init)(jax.random.key(0), loaded.variables)
  grads = jax.jit(
    jax.grad(lambda t: jnp.square(tuned.apply(t, loaded.variables, **inputs)).mean())
  )(theta)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if method.names == ('norm',):
    assert sum('branch_norm' in path for path in theta['norm']) == 6


@pytest.mark.parametrize(
  'change, message',
  [
    ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0 is not supported'),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0 is not supported'),
    ({'use_bidirectional_attention': True}, 'use_bidirectional_attention=True is not supported'),
  ],
)
def test_what_is_not_supported_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    models.from_config({**CONFIG, **change})


@pytest.mark.parametrize('name', ['gemma3', 'gemma2'])
def test_blocks_of_several_kinds_are_not_scanned(name):
  with pytest.raises(ValueError, match='differ in their sizes or windows: use scan=False'):
    models.load(GOLDEN / name, scan=True)


GEMMA2_2B = {
  'model_type': 'gemma2',
  'hidden_size': 2304,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'intermediate_size': 9216,
  'vocab_size': 256000,
}


def test_a_gemma2_is_that_of_its_defaults_and_has_the_published_size():
  model = models.from_config(GEMMA2_2B)
  assert (model.logit_cap, model.final_cap, model.query_scale) == (50.0, 30.0, 1 / 16)
  assert model.window == (4096, None) * 13 and model.tied and not model.qk_norm
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert sum(x.size for x in jax.tree.leaves(tree)) == 2_614_341_888
  plain = {'attn_logit_softcapping': None, 'final_logit_softcapping': None}
  model = models.from_config({**GEMMA2_2B, **plain})
  assert model.logit_cap is None and model.final_cap is None
  with pytest.raises(ValueError, match='attn_logit_softcapping must be from 0.001'):
    models.from_config({**GEMMA2_2B, 'attn_logit_softcapping': 0.0})


def test_both_caps_bend_what_they_cap():
  loaded = models.load(GOLDEN / 'gemma2')
  tokens = golden('gemma2')[0]['tokens']
  model = loaded.model
  assert (model.logit_cap, model.final_cap) == (2.0, 3.0)
  logits, straight, wild = (
    model.clone(**change).apply(loaded.variables, tokens)
    for change in ({}, {'final_cap': None}, {'logit_cap': None})
  )
  np.testing.assert_allclose(logits, 3 * np.tanh(straight / 3), atol=1e-6)
  assert np.abs(logits - straight).max() > 1e-2
  assert np.abs(logits - wild).max() > 1e-4


def test_a_gemma2_of_long_contexts_equals_transformers(monkeypatch):
  """Scores are never whole, and are capped all the same."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 100)
  inputs, arrays = golden('gemma2')
  close(outputs(models.load(GOLDEN / 'gemma2'), inputs), arrays['logits'])


def test_an_attention_that_has_no_cap_is_refused():
  loaded = models.load(GOLDEN / 'gemma2')
  model = loaded.model.clone(attention_fn=jpeft.residuals.attention)
  with pytest.raises(ValueError, match='residuals.attention has no logit_cap'):
    jax.eval_shape(model.apply, loaded.variables, jnp.ones((1, 4), jnp.int32))
