"""What a rule reads and keeps beside its call: boxes as they are stored, and a cache from one call
to the next.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.quant import Quantized
from tests.core.small import Blocks, NnxBlocks, X, backbone


def test_a_weight_rule_reads_plain_arrays_and_by_stored_the_box():
  model = Blocks(2)
  held = backbone(model)
  small = jpeft.quantize(model, jpeft.nf4(32), held, X, targets='.*/fc')
  seen = {}

  def init(key, site, arrays):
    seen[site.path] = arrays['kernel'], arrays.stored('kernel'), arrays.stored('bias')
    return {'s': jnp.ones(())}

  def apply(t, site, arrays):
    assert isinstance(arrays.stored('kernel'), Quantized)
    return {'kernel': t['s'] * arrays['kernel']}

  jpeft.attach(model, jpeft.at('.*/fc', jpeft.Weight('w', init, apply)), small, X).init(
    jax.random.key(0), small
  )
  assert list(seen) == ['block_0/fc', 'block_1/fc']
  for plain, box, bias in seen.values():
    assert isinstance(box, Quantized) and isinstance(bias, jax.Array)
    np.testing.assert_array_equal(plain, box.unbox())


def counting(t, call, *args, **kwargs):
  """Adds how often it was called before, where that can be known."""
  before = call.read_cache()
  if before is None:
    return call(*args, **kwargs)
  count = before.get('count', jnp.zeros(()))
  call.write_cache({'count': count + 1})
  return call(*args, **kwargs) + count


def test_what_a_call_holds_is_there_in_the_next():
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.at('block_1/fc', jpeft.Call('count', counting)), held, X)
  plain = model.apply(held, X)
  np.testing.assert_array_equal(
    tuned.apply({}, held, X), plain
  )  # 'cache' is not mutable: nothing is kept
  kept = held
  for before in range(3):
    out, new = tuned.apply({}, kept, X, mutable=['cache'])
    assert bool(jnp.allclose(out, plain)) == (before == 0)
    kept = {**held, **new}
  assert [float(x) for x in jax.tree.leaves(kept['cache'])] == [3.0]


def test_a_framework_without_the_collection_keeps_nothing():
  model = NnxBlocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.at('blocks/1/fc', jpeft.Call('count', counting)), held, X)
  np.testing.assert_allclose(tuned.apply({}, held, X), tuned.only().apply({}, held, X))
