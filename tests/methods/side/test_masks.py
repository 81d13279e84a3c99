"""Which inputs of a block are masks, and of which sequence: one answer for all side networks."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.masks import mask_names, masks
from jpeft.methods.side.blocks import lean_block
from tests.fixtures import noisy


@pytest.mark.parametrize(
  ('name', 'kind'),
  (
    ('mask', 'mask'),
    ('attention_mask', 'mask'),
    ('context_mask', 'context_mask'),
    ('encoder_attention_mask', 'context_mask'),
    ('memory_mask', 'context_mask'),
  ),
)
def test_the_sequence_of_a_mask_follows_from_its_name(name, kind):
  stream, context = jnp.ones((2, 3, 8)), jnp.ones((2, 4, 8))
  inputs = {'x': stream, 'context': context, name: jnp.ones((2, 3), jnp.int32)}
  assert mask_names(inputs) == {name: kind}
  assert set(masks(inputs)) == {kind}
  # A block that reads no other sequence has no mask of one.
  del inputs['context']
  assert mask_names(inputs) == {name: 'mask'}


@pytest.mark.parametrize('name', ('memory_mask', 'context_mask'))
def test_a_lean_block_masks_the_other_sequence(name):
  s, context = jnp.ones((1, 3, 8)), jax.random.normal(jax.random.key(0), (1, 4, 8))
  inputs = {'context': context, name: jnp.array([[1, 1, 0, 1]])}
  site = types.SimpleNamespace(inputs={'x': s, **inputs})
  block = lean_block(site, heads=2, width=8, causal=False)
  params = block.init(jax.random.key(1), s, inputs)

  def output(context):
    return block.run(params, s, {**inputs, 'context': context}, False, None)[0]

  seen, unseen = context.at[:, 1].add(1.0), context.at[:, 2].add(1.0)
  np.testing.assert_array_equal(output(unseen), output(context))
  assert np.abs(output(seen) - output(context)).max() > 1e-4


class Full(nn.Module):
  """Attention with a mask [B, N, N] of its own."""

  @nn.compact
  def __call__(self, x, attn_mask):
    scores = jnp.where(attn_mask, x @ x.swapaxes(1, 2), -1e9)
    return x + nn.Dense(x.shape[-1], name='o')(jax.nn.softmax(scores) @ x)


class HeadMask(nn.Module):
  @nn.compact
  def __call__(self, x, layer_head_mask):
    return x + nn.MultiHeadDotProductAttention(4, name='attention')(x) * layer_head_mask.mean()


class EncoderMask(nn.Module):
  @nn.compact
  def __call__(self, x, encoder_mask):
    return x + nn.MultiHeadDotProductAttention(4, name='attention')(x, mask=encoder_mask)


class Model(nn.Module):
  block: type

  @nn.compact
  def __call__(self, x, extra):
    for i in range(2):
      x = self.block(name=f'block_{i}')(x, extra)
    return nn.Dense(3, name='head')(nn.LayerNorm(name='final_norm')(x))


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
WHERE = {'blocks': r'block_\d', 'exit': 'final_norm'}


def attached(block, extra, method):
  model = Model(block)
  held = noisy(model.init(jax.random.key(0), X, extra))
  tuned = jpeft.attach(model, method, held, X, extra)
  return tuned, noisy(tuned.init(jax.random.key(1), held)), held


@pytest.mark.parametrize('dtype', (bool, np.float32))  # Flax makes masks of floats
@pytest.mark.parametrize('heads', (1, 2))
def test_a_mask_of_examples_is_not_one_of_heads(heads, dtype):
  """With as many heads as examples too."""
  mask = np.ones((2, 5, 5), dtype)
  mask[1, :, 4] = 0  # the last token of the second example is seen by nobody
  mask[1, 4, 4] = 1
  tuned, theta, held = attached(Full, mask, jpeft.lst(2, block='attention', heads=heads, **WHERE))
  out = tuned.apply(theta, held, X, mask)
  moved = tuned.apply(theta, held, X.at[:, 4].add(1.0), mask)
  np.testing.assert_allclose(out[1, :4], moved[1, :4], rtol=1e-5)
  assert np.abs(out[0, :4] - moved[0, :4]).max() > 1e-3


@pytest.mark.parametrize(
  'method', (jpeft.lst(2, block='attention', **WHERE), jpeft.unipt(2, **WHERE))
)
def test_a_mask_of_heads_is_no_attention_mask(method):
  tuned, theta, held = attached(HeadMask, np.ones(4, np.float32), method)
  assert tuned.apply(theta, held, X, np.ones(4, np.float32)).shape == (2, 5, 3)


def test_the_mask_of_an_encoders_own_block():
  mask = np.ones((2, 1, 5, 5), bool)
  method = jpeft.vpt_deep(3, blocks=WHERE['blocks'])
  tuned, theta, held = attached(EncoderMask, mask, method)
  out = tuned.apply(theta, held, X, mask)
  assert out.shape == (2, 5, 3)
  assert np.abs(out - tuned.model.apply(held, X, mask)).max() > 1e-3
