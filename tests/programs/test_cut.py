"""A program in two halves: the same numbers and gradients, and no backbone in the second."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.contract.anatomies import described
from tests.core.small import WIDTH, Blocks, NnxBlocks, X, backbone, low_rank, train
from tests.fixtures import BACKBONES, flops
from tests.params import fast_if

LAST = {'linen': (lambda: Blocks(6), 'block_5/fc'), 'nnx': (lambda: NnxBlocks(6), 'blocks/5/fc')}
SIDE = fast_if(
  lambda name: name in ('linen_vit_scan', 'linen_bert', 'nnx_raw'),
  ['linen_vit', 'linen_vit_scan', 'linen_bert', 'nnx_vit_scan', 'nnx_llama', 'nnx_raw'],
)


def halves(model, method, held, args, kwargs=None):
  """(fn(theta, held, batch), theta, the halves of fn, batch): batch holds the arrays of the
  call.
  """
  kwargs = kwargs or {}
  tuned = jpeft.attach(model, method, held, *args, **kwargs)
  theta = jax.tree.map(lambda a: a + 0.1, jax.jit(tuned.init)(jax.random.key(0), held))
  arrays = {k: v for k, v in kwargs.items() if hasattr(v, 'shape')}
  fn = lambda theta, held, batch: tuned.apply(theta, held, *batch[0], **{**kwargs, **batch[1]})
  return fn, theta, jpeft.cut(fn, theta, held, (args, arrays)), (args, arrays)


@pytest.mark.parametrize('name', LAST)
def test_late_layers_get_what_the_early_ones_give(name):
  make, path = LAST[name]
  model = make()
  held = backbone(model)
  fn, theta, cut, batch = halves(model, low_rank(path), held, (X,))
  features = cut.first(held, batch)
  assert [f.shape for f in features] == [(4, WIDTH)] * len(features) and 0 < len(features) <= 2
  out, grad = jax.value_and_grad(lambda t: jnp.sum(fn(t, held, batch) ** 2))(theta)
  new, again = jax.value_and_grad(lambda t: jnp.sum(cut.second(t, held, features) ** 2))(theta)
  np.testing.assert_allclose(new, out, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, grad)
  whole, late = flops(fn, theta, held, batch), flops(cut.second, theta, held, features)
  assert late < whole / 2


@pytest.mark.parametrize('name', SIDE)
def test_a_side_network_never_sees_the_backbone_again(name):
  fixture = BACKBONES[name]
  held = fixture.backbone
  with described(fixture):
    fn, theta, cut, batch = halves(
      fixture.model, jpeft.lst(reduction=4), held, fixture.args, fixture.kwargs
    )
  first = jax.jit(cut.first)
  features = first(held, batch)
  assert cut.nbytes * len(features[0]) == sum(f.nbytes for f in features)
  out = jax.jit(fn)(theta, held, batch)
  np.testing.assert_allclose(jax.jit(cut.second)(theta, held, features), out, rtol=2e-4, atol=2e-4)
  assert flops(cut.second, theta, held, features) < flops(fn, theta, held, batch) / 2
  one = first(held, jax.tree.map(lambda x: x[1:2], batch))
  for a, b in zip(one, features, strict=True):
    np.testing.assert_allclose(a[0], b[1], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(jax.jit(cut.second)(theta, held, one), out[1:2], rtol=2e-3, atol=2e-4)


def test_what_changes_from_step_to_step_belongs_to_the_second_half():
  def fn(theta, held, x, key):
    noise = jax.random.normal(key, x.shape)
    return jnp.tanh(x @ held) @ theta + noise

  theta, held, key = jnp.ones((WIDTH, WIDTH)), jnp.ones((WIDTH, WIDTH)), jax.random.key(3)
  cut = jpeft.cut(fn, theta, held, X, key)
  (feature,) = cut.first(held, X)
  np.testing.assert_allclose(feature, np.tanh(np.asarray(X) @ held), rtol=1e-6)
  for i in (3, 4):
    np.testing.assert_allclose(
      cut.second(theta, held, cut.first(held, X), jax.random.key(i)),
      fn(theta, held, X, jax.random.key(i)),
      rtol=1e-6,
    )


def test_what_is_cheap_to_make_again_is_not_stored():
  def fn(theta, held, x):
    mask = jnp.broadcast_to((x[:, 0] > 0)[:, None, None], (len(x), 50, WIDTH))
    return (mask * (x[:, None] * theta)).sum(1)

  cut = jpeft.cut(fn, jnp.ones((50, WIDTH)), {}, X)
  assert cut.nbytes <= 4 * WIDTH + 4
  np.testing.assert_allclose(
    cut.second(jnp.ones((50, WIDTH)), {}, cut.first({}, X)), fn(jnp.ones((50, WIDTH)), {}, X)
  )


def test_statistics_over_the_batch_cannot_be_kept():
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(2, name='head')(x) + x.mean()

  model = Normed()
  held = backbone(model)
  with pytest.raises(
    ValueError, match=r'shape \[\], computed before theta comes in from a batch of 4, has no axis'
  ):
    halves(model, train('head'), held, (X,))
