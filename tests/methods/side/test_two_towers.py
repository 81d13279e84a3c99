"""Two stacks that do not read each other, as of image and text: each has a side network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.fixtures import leaf_paths, noisy


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, context=None):
    attend = nn.MultiHeadDotProductAttention
    x = x + attend(2, name='attention')(nn.LayerNorm(name='norm1')(x))
    if context is not None:
      x = x + attend(2, name='cross')(x, context)
    hidden = nn.gelu(nn.Dense(16, name='fc1')(nn.LayerNorm(name='norm2')(x)))
    return x + nn.Dense(8, name='fc2')(hidden)


class Tower(nn.Module):
  @nn.compact
  def __call__(self, x, context=None):
    for i in range(2):
      x = Block(name=f'block_{i}')(x, context)
    return nn.LayerNorm(name='final_norm')(x)


class Pair(nn.Module):
  """Two towers that meet in a similarity."""

  @nn.compact
  def __call__(self, a, b):
    return Tower(name='left')(a).mean(1) @ Tower(name='right')(b).mean(1).T


class Reader(nn.Module):
  """An encoder and a decoder that attends to it."""

  @nn.compact
  def __call__(self, a, b):
    encoded = Tower(name='left')(a)
    return Tower(name='right')(b, encoded)


A = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 8)), jnp.float32)
B = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, 8)), jnp.float32)
WHERE = {'blocks': r'.*/block_\d', 'exit': '.*/final_norm'}


def attached(model, method):
  held = noisy(model.init(jax.random.key(0), A, B))
  return jpeft.attach(model, method, held, A, B), held


@pytest.mark.parametrize(
  'method',
  (
    jpeft.lst(2, block='attention', **WHERE),
    jpeft.lst(2, block='mlp', **WHERE),
    jpeft.unipt(2, **WHERE),
    jpeft.sherl(reduction=2, **WHERE),
  ),
  ids=lambda method: method.names[0],
)
def test_a_ladder_beside_each_tower_reaches_the_output(method):
  tuned, held = attached(Pair(), method)
  assert tuned.unused == []
  theta = noisy(tuned.init(jax.random.key(1), held))
  loss = lambda theta: jnp.sum(tuned.apply(theta, held, A, B) ** 2)
  grads = leaf_paths(jax.grad(loss)(theta))
  assert {path.split('/')[1] for path in grads} == {'left', 'right'}
  assert all(np.abs(g).max() > 0 for g in grads.values())


def test_a_decoder_reads_its_encoder():
  tuned, held = attached(Reader(), jpeft.lst(2, block='attention', **WHERE))
  theta = noisy(tuned.init(jax.random.key(1), held))
  assert 'up' in theta['lst']['right/final_norm'] and 'up' not in theta['lst']['left/final_norm']
  assert tuned.unused == [] and tuned.memory == 'no backbone backprop'
  with pytest.raises(ValueError, match="never reads the side encoder; use block='attention'"):
    attached(Reader(), jpeft.lst(2, block='mlp', **WHERE))


def test_where_an_input_comes_from_is_seen():
  tuned, _ = attached(Reader(), jpeft.lst(2, block='attention', **WHERE))
  block = tuned.sites['right/block_1']
  assert block.sources == {'x': 'right/block_0', 'context': 'left'}
