"""Which inputs of a block are masks, and of which sequence: one answer for all side networks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.methods.masks import mask_names, masks
from jpeft.methods.side.blocks import lean_block


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
  assert mask_names([name, 'x']) == {name: kind}
  assert set(masks({name: jnp.ones((2, 3), jnp.int32)})) == {kind}


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
