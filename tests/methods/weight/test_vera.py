"""VeRA: Hugging Face peft's numbers, the paper's count, and a pair of projections that no layer
holds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import attach
from jpeft.methods.weight.vera import vera
from tests.methods.golden import full_size, peft


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  return peft.bert(tmp_path_factory.mktemp('bert'))


def test_a_model_equals_peft(bert):
  model, variables, tokens = bert
  held, base = peft.read('peft_models', 'bert_vera'), peft.read('peft_models', 'bert')
  pair = tuple(held['adapter'][f'base_model.vera_{name}'].T for name in 'AB')
  tuned = attach(model, vera(3, '{q}|{fc1}', projections=pair), variables, *tokens)
  theta = {'vera': peft.scales(held['adapter'], peft.BERT)}
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, tuned.shapes)
  assert np.abs(held['logits'] - base['logits']).max() > 0.05
  np.testing.assert_allclose(tuned.apply(theta, variables, *tokens), held['logits'], atol=5e-6)
  np.testing.assert_allclose(
    model.apply(tuned.merge(theta, variables), *tokens), held['merged'], atol=5e-6
  )


def test_it_starts_unchanged_merges_and_shares_its_pair(bert):
  model, variables, tokens = bert
  tuned, y = attach(model, vera(4), variables, *tokens), model.apply(variables, *tokens)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  np.testing.assert_array_equal(tuned.apply(theta, variables, *tokens), y)
  assert all(
    (t['kernel']['d'] == 0.1).all() and not t['kernel']['e'].any() for t in theta['vera'].values()
  )

  theta = jax.tree.map(lambda x: x + 0.3, theta)
  merged = tuned.merge(theta, variables)
  found = tuned.apply(theta, variables, *tokens)
  assert np.abs(found - y).max() > 0.05
  np.testing.assert_allclose(model.apply(merged, *tokens), found, atol=5e-6)

  delta = jax.tree.map(jnp.subtract, merged, variables)['params']['encoder']
  kernel = lambda block, name: delta[block]['attention'][name]['kernel']
  for block, name in (('block_0', 'value'), ('block_1', 'query')):
    np.testing.assert_allclose(kernel('block_0', 'query'), kernel(block, name), atol=1e-6)
  # var(a) = 2 / fan_in and var(b) = 2 / r, so var(a diag(d) b e) = r (2 / fan_in) (2 / r) (d e)^2
  expected = np.sqrt(4 / 16) * 0.4 * 0.3
  np.testing.assert_allclose(kernel('block_0', 'query').std(), expected, rtol=0.3)


def test_another_seed_draws_another_pair(bert):
  model, variables, tokens = bert

  def output(seed):
    tuned = attach(model, vera(4, seed=seed), variables, *tokens)
    theta = jax.tree.map(lambda x: x + 0.3, jax.jit(tuned.init)(jax.random.key(0), variables))
    return tuned.apply(theta, variables, *tokens)

  assert np.abs(output(0) - output(1)).max() > 0.05


def test_dropout_thins_the_adapters_input_alone(bert):
  model, variables, tokens = bert
  model = model.clone(dropout=0.0, attention_dropout=0.0)
  tuned = attach(model, vera(4, dropout=1.0), variables, *tokens)
  theta = jax.tree.map(lambda x: x + 0.3, jax.jit(tuned.init)(jax.random.key(0), variables))
  y = model.apply(variables, *tokens)
  assert np.abs(tuned.apply(theta, variables, *tokens) - y).max() > 0.05
  dropped = tuned.apply(
    theta, variables, *tokens, deterministic=False, rngs={'dropout': jax.random.key(0)}
  )
  np.testing.assert_allclose(dropped, y, atol=1e-6)


@pytest.mark.parametrize('targets', ['embed/word', '{q}|embed/word'])
def test_a_table_is_refused_as_in_peft(bert, targets):
  model, variables, tokens = bert
  with pytest.raises(
    ValueError, match="vera: 'embed/word' is an embedding table, .* adapt it by lora or dora"
  ):
    attach(model, vera(4, targets), variables, *tokens)


def test_the_count_on_roberta_base():
  roberta = full_size.roberta_base()
  assert jpeft.summary(attach(roberta.model, vera(1024), *roberta.shapes)).trainable == 43_008


def test_hyperparameters_are_checked(bert):
  model, variables, tokens = bert
  with pytest.raises(ValueError, match='rank.*at least 1'):
    vera(0)
  pair = np.zeros((16, 3)), np.zeros((3, 16))
  with pytest.raises(
    ValueError, match=r'\[fan_in, 2\] and \[2, fan_out\], not \[16, 3\] and \[3, 16\]'
  ):
    vera(2, projections=pair)
  short = vera(3, '{fc1}', projections=pair)
  with pytest.raises(
    ValueError, match=r'16 inputs and 16 outputs do not reach for a matrix \[16, 24\]'
  ):
    attach(model, short, variables, *tokens)
