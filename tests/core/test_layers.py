"""What a rule may ask of the whole model: its layers as one stack of arrays, arguments that the
model does not have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import Call, at, chain
from tests.contract.anatomies import described
from tests.core.small import Blocks, X, backbone
from tests.fixtures import BACKBONES, plain


@pytest.mark.parametrize('name', ['linen_vit_scan', 'nnx_vit_scan', 'linen_gemma'])
def test_all_layers_of_a_stack_run_again_from_the_exit(name):
  b = BACKBONES[name]

  def record(t, call, x, *args, **kwargs):
    call.tap(**call.inputs(x, *args, **kwargs))
    return call(x, *args, **kwargs)

  def run(t, call, x, *args, **kwargs):
    (block,) = call.site.model.find('{block}')
    fn, arrays = call.layer(block, None)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(arrays)} == {b.depth}
    inputs = dict(call.taps()[block.path])
    stream = inputs.pop(next(iter(block.inputs)))
    body = lambda s, row: (jax.tree.leaves(fn(row[0], s, **row[1]))[0], None)
    s, _ = jax.lax.scan(body, stream[0], (arrays, inputs))
    np.testing.assert_allclose(s, x, rtol=1e-4, atol=1e-4)
    return call(2 * s, *args, **kwargs)

  with described(b):
    method = chain(
      at('{block}', Call('again', record, taps=True)), at('{exit}', Call('again', run, taps=True))
    )
    tuned = jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)
    got = tuned.apply({}, b.backbone, *b.args, **b.kwargs)
  np.testing.assert_allclose(
    got, plain(b), rtol=2e-3, atol=2e-3
  )  # the norm at the exit undoes the factor


def test_dropout_of_all_layers_differs_and_comes_again():
  b = BACKBONES['linen_vit_scan']

  def run(t, call, x, *args, **kwargs):
    (block,) = call.site.model.find('{block}')
    fn, arrays = call.layer(block, None)
    same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), arrays[0])
    outs = [
      jax.vmap(lambda row: jax.tree.leaves(fn(row, x))[0])((same, arrays[1])) for _ in range(2)
    ]
    np.testing.assert_array_equal(*outs)
    if call.training:
      assert np.abs(outs[0][0] - outs[0][1]).max() > 1e-3
    else:
      np.testing.assert_array_equal(outs[0][0], outs[0][1])
    return call(x, *args, **kwargs)

  with described(b):
    tuned = jpeft.attach(b.model, at('{exit}', Call('again', run)), b.backbone, *b.args, **b.kwargs)
  tuned.apply({}, b.backbone, *b.args, **b.kwargs)
  tuned.apply(
    {}, b.backbone, *b.args, **{**b.kwargs, **b.train_kwargs}, rngs={'dropout': jax.random.key(0)}
  )


def test_a_rule_at_the_model_takes_what_the_model_does_not():
  model, seen = Blocks(2), []
  held = backbone(model)

  def whole(t, call, x, *args, shift=0.0, **kwargs):
    seen.append(call.training)
    return call(x, *args, **kwargs) + shift

  tuned = jpeft.attach(model, at('', Call('shifted', whole, takes=('shift',))), held, X)
  one, two = tuned.apply({}, held, X), tuned.apply({}, held, X, shift=jnp.ones(()))
  np.testing.assert_allclose(two, one + 1, rtol=1e-6)
  b = BACKBONES['linen_vit']
  tuned = jpeft.attach(
    b.model, at('', Call('shifted', whole, takes=('shift',))), b.backbone, *b.args, **b.kwargs
  )
  seen.clear()
  tuned.apply({}, b.backbone, *b.args, shift=1.0, train=True, rngs={'dropout': jax.random.key(0)})
  tuned.apply({}, b.backbone, *b.args, shift=1.0, train=False, rngs={'dropout': jax.random.key(0)})
  assert seen == [True, False]
