"""Long attention on a mesh: cut by tokens, and by query heads that share their key heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import programs, training
from jpeft.core import TokenMask, dot_product, dot_product_attention, heads_over
from tests.params import fast_if

BATCH, LENGTH, SIZE = 2, 16, 4
TEXTS = jnp.array([[1] * 5 + [2] * 9 + [0] * 2, [0] * 3 + [1] * 13])
OF_TEXTS = TokenMask.of_row(LENGTH, TEXTS, window=6)
# mesh (data, model, sequence), query heads, key heads, mask, bias and keys in front of the others.
CASES = {
  'window and texts': ((2, 2, 2), 4, 2, OF_TEXTS, None, 0),
  'causal': ((1, 1, 8), 2, 2, TokenMask.of_row(LENGTH, None), None, 0),
  'both ways': ((1, 2, 4), 2, 2, TokenMask.of_row(LENGTH, TEXTS, causal=False), None, 0),
  'bias of heads': ((2, 2, 2), 4, 4, None, (1, 4, LENGTH, LENGTH), 0),
  'bias of keys': ((1, 1, 4), 2, 1, None, (BATCH, 1, 1, LENGTH), 0),
  'keys that do not divide': ((2, 1, 4), 2, 2, OF_TEXTS, None, 3),
  'one key head': ((1, 4, 2), 4, 1, OF_TEXTS, None, 0),
  'key heads of several devices': ((1, 4, 1), 8, 2, OF_TEXTS, (1, 8, LENGTH, LENGTH), 0),
  'key heads in two devices': ((1, 2, 2), 12, 3, OF_TEXTS, None, 0),
}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(autouse=True)
def by_rows(monkeypatch):
  """Every context is long, and no piece has all rows."""
  monkeypatch.setattr(dot_product, 'LONG', 0)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 100)


def compiled(sizes, heads, key_heads, mask, bias, before):
  """(value and gradients on one device, the same on a mesh, program there, mesh)."""
  arrays = {
    'query': normal(0, BATCH, LENGTH, heads, SIZE),
    'key': normal(1, BATCH, LENGTH + before, key_heads, SIZE),
    'value': normal(2, BATCH, LENGTH + before, key_heads, SIZE),
  }
  if bias is not None:
    arrays['bias'] = normal(3, *bias)
  if before:
    mask = mask.with_more(before)
  slope = normal(5, BATCH, LENGTH, heads, SIZE)
  mesh = training.mesh(*sizes)

  def loss(arrays, slope):
    return (dot_product_attention(**arrays, mask=mask) * slope).sum()

  def on_mesh(arrays, slope):
    with heads_over(mesh, 'data', 'model', 'sequence'):
      return loss(arrays, slope)

  want = jax.jit(jax.value_and_grad(loss))(arrays, slope)

  def placed(x):
    cut = PartitionSpec('data' if x.shape[0] == BATCH else None)
    if x.shape[1] == LENGTH:
      cut = PartitionSpec('data', 'sequence')
    return jax.device_put(x, NamedSharding(mesh, cut))

  arrays, slope = jax.tree.map(placed, (arrays, slope))
  program = jax.jit(jax.value_and_grad(on_mesh)).lower(arrays, slope).compile()
  return want, program(arrays, slope), program, mesh


QUICK = ('window and texts', 'causal', 'keys that do not divide', 'key heads in two devices')


@pytest.mark.parametrize('case', fast_if(lambda case: case in QUICK, CASES))
def test_the_numbers_of_one_device(case):
  """Value and gradients; nothing is sent in the loops of attention."""
  want, found, program, mesh = compiled(*CASES[case])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, want)
  sent = programs.collectives(program, mesh.shape)
  assert not any(one.loops for one in sent), sent


def test_keys_and_values_alone_are_gathered():
  """Those of an example, in both passes; their gradients are scattered."""
  _, _, program, mesh = compiled(*CASES['causal'])
  keys = BATCH * LENGTH * 2 * SIZE * 4
  sent = [one for one in programs.collectives(program, mesh.shape) if one.bytes >= keys]
  assert {one.axes for one in sent} == {('sequence',)}
  moved = {}
  for one in sent:
    moved[one.kind] = moved.get(one.kind, 0) + one.bytes
  assert moved['all-gather'] in (2 * keys, 4 * keys)
  assert sum(moved.values()) - moved['all-gather'] == 2 * keys, moved
