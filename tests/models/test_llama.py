"""What is peculiar to decoders: sizes, masks, packed texts, rotary positions, roles, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.models.nn.rope import Rope
from tests.models.goldens import GOLDEN, golden, outputs

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
LLAMA_2_7B = {
  'model_type': 'llama',
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'intermediate_size': 11008,
  'vocab_size': 32000,
}
LLAMA_3_1B = {
  'model_type': 'llama',
  'hidden_size': 2048,
  'num_hidden_layers': 16,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'intermediate_size': 8192,
  'vocab_size': 128256,
  'tie_word_embeddings': True,
}
QWEN3_600M = {
  'model_type': 'qwen3',
  'hidden_size': 1024,
  'num_hidden_layers': 28,
  'num_attention_heads': 16,
  'num_key_value_heads': 8,
  'head_dim': 128,
  'intermediate_size': 3072,
  'vocab_size': 151936,
  'tie_word_embeddings': True,
}


@pytest.mark.parametrize(
  'config,size',
  ((LLAMA_2_7B, 6_738_415_616), (LLAMA_3_1B, 1_235_814_400), (QWEN3_600M, 596_049_920)),
)
def test_models_have_the_published_size(config, size):
  model = models.from_config(config, scan=True, remat=True)
  tree = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert set(tree) == {'params'}
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) == size


@pytest.mark.parametrize('scan', (False, True))
@pytest.mark.parametrize('tied', (False, True))
def test_roles_find_their_parts(scan, tied):
  small = LLAMA_2_7B | {
    'hidden_size': 8,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'intermediate_size': 12,
    'vocab_size': 20,
    'tie_word_embeddings': tied,
  }
  model = models.from_config(small, scan=scan)
  sites = jpeft.sites_of(model, jax.eval_shape(model.init, jax.random.key(0), TOKENS), TOKENS)
  assert sites.anatomy.name == 'llama' and sites.anatomy.causal
  stack = 1 if scan else 2
  counts = {
    'q': 1,
    'k': 1,
    'v': 1,
    'o': 1,
    'fc1': 2,
    'fc2': 1,
    'linear': 7,
    'norm': 2,
    'block': 1,
    'attention': 1,
    'mlp': 1,
    'norm1': 1,
    'norm2': 1,
  }
  assert {role: len(sites.find(f'{{{role}}}')) for role in counts} == {
    r: n * stack for r, n in counts.items()
  }
  ones = {'embed': 1, 'final_norm': 1, 'encoder': 1, 'stack': 1, 'head': 0 if tied else 1}
  assert {role: len(sites.find(f'{{{role}}}')) for role in ones} == ones
  assert sites.find('{attention}')[0].heads == (2, 4)


RUN = jax.jit(
  lambda model, variables, tokens, **kwargs: model.apply(variables, tokens, **kwargs),
  static_argnums=0,
)


def logits(name, tokens, **kwargs):
  loaded = models.load(GOLDEN / name, scan=True)
  return np.asarray(RUN(loaded.model, loaded.variables, np.asarray(tokens), **kwargs))


def test_no_token_sees_those_after_it_or_before_its_window():
  tokens = golden('mistral')[0]['tokens'][:1]
  before = logits('mistral', tokens)[0]
  changed = tokens.copy()
  changed[0, 9] = 3 if tokens[0, 9] != 3 else 4
  moved = np.abs(logits('mistral', changed)[0] - before).max(-1) > 1e-5
  # A window of 5 reaches 4 tokens back a layer, and there are two layers.
  np.testing.assert_array_equal(np.flatnonzero(moved), np.arange(9, 18))
  changed = np.concatenate([tokens, tokens], 1)
  changed[0, 0] = 3 if tokens[0, 0] != 3 else 4
  moved = np.abs(
    logits('mistral', changed)[0] - logits('mistral', np.concatenate([tokens, tokens], 1))[0]
  ).max(-1)
  np.testing.assert_array_equal(np.flatnonzero(moved > 1e-6), np.arange(9))


@pytest.mark.parametrize('name', ('llama', 'mistral'))
def test_packed_texts_do_not_see_each_other(name):
  tokens = golden(name)[0]['tokens'][0]
  one, two = tokens[:7], tokens[7:16]
  packed = logits(name, tokens[None], mask=np.array([[1] * 7 + [2] * 9 + [0] * 2]))[0]
  np.testing.assert_allclose(packed[:7], logits(name, one[None])[0], atol=1e-5)
  np.testing.assert_allclose(packed[7:16], logits(name, two[None])[0], atol=1e-5)
  assert np.abs(packed[7:16] - logits(name, tokens[None])[0, 7:16]).max() > 1e-2


def test_llama3_frequencies_are_slow_fast_and_between():
  """By the words of the rule, feature by feature, at the values of Llama 3.2 1B."""
  rope = Rope(500000.0, 'llama3', 32.0, 1.0, 4.0, 8192)
  got = rope.frequencies(64)
  kinds = []
  for i, frequency in enumerate(got):
    plain = 500000.0 ** (-2 * i / 64)
    length = 2 * math.pi / plain
    if length > 8192:
      kinds.append('slow')
      assert abs(frequency * 32 / plain - 1) < 1e-6
    elif length < 2048:
      kinds.append('fast')
      assert abs(frequency / plain - 1) < 1e-6
    else:
      kinds.append('between')
      mix = (8192 / length - 1) / 3
      assert abs(frequency / ((1 - mix) * plain / 32 + mix * plain) - 1) < 1e-6
  assert kinds == sorted(kinds, key=('fast', 'between', 'slow').index) and len(set(kinds)) == 3


def test_rotation_turns_pairs_and_keeps_distances():
  x = np.random.default_rng(0).normal(size=(1, 1, 1, 8)).astype('float32')
  rope = Rope(100.0)
  turned = np.asarray(rope.rotate(jnp.asarray(x), jnp.array([[3]])))
  pairs = lambda y: y[..., :4] + 1j * y[..., 4:]
  np.testing.assert_allclose(
    pairs(turned), pairs(x) * np.exp(3j * 100.0 ** (-np.arange(4) / 4)), rtol=1e-5
  )
  with pytest.raises(ValueError, match='a head size of 7 is odd'):
    rope.frequencies(7)


@pytest.mark.parametrize(
  'change,message',
  (
    (
      {'rope_scaling': {'rope_type': 'longrope', 'factor': 2.0}},
      "rope type 'longrope' is none of default, linear, llama3, yarn",
    ),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor 0.5 is not supported'),
    (
      {
        'model_type': 'qwen2',
        'use_sliding_window': True,
        'sliding_window': 4,
        'max_window_layers': 1,
      },
      'mixes full and sliding attention',
    ),
  ),
)
def test_variants_that_are_not_supported_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    models.from_config(LLAMA_2_7B | change)


def test_windows_are_read_as_each_family_writes_them():
  window = lambda **change: models.from_config(LLAMA_2_7B | change).window
  assert window(sliding_window=4) is None and window(model_type='mistral', sliding_window=4) == 4
  qwen = {'model_type': 'qwen2', 'sliding_window': 4}
  assert window(**qwen) is None
  assert window(**qwen, use_sliding_window=True, max_window_layers=32) is None
  assert window(**qwen, use_sliding_window=True, max_window_layers=0) == 4


def test_old_configs_tell_the_rotation_elsewhere():
  old = models.from_config(
    LLAMA_2_7B | {'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}
  )
  assert old.rope == Rope(5e5, 'linear', 2.0)


def test_attention_dropout_follows_its_key():
  inputs, _ = golden('qwen3')
  loaded = models.load(GOLDEN / 'qwen3', scan=True)
  model = loaded.model.clone(attention_dropout=0.5, dropout=0.1)
  train = jax.jit(
    lambda key: model.apply(loaded.variables, **inputs, deterministic=False, rngs={'dropout': key})
  )
  run = lambda seed: np.asarray(train(jax.random.key(seed)))
  np.testing.assert_array_equal(run(0), run(0))
  assert (
    np.abs(run(0) - run(1)).max() > 1e-3 and np.abs(run(0) - outputs(loaded, inputs)).max() > 1e-3
  )


def test_a_decoder_that_gives_labels_writes_no_text():
  loaded = models.load(GOLDEN / 'llama', num_classes=2)
  assert loaded.variables['params']['head']['kernel'].shape == (24, 2)
  with pytest.raises(ValueError, match="a llama model with the head 'classification' writes no"):
    models.check_decoder(loaded)
