"""Numbers of a call of the model that a Weight reads, and a theta for each example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.contract.anatomies import described
from tests.core.small import (
  FC,
  Blocks,
  X,
  adapter,
  backbone,
  low_rank,
  noisy,
  plain,
  stacks,
)
from tests.fixtures import BACKBONES

MODELS = stacks(3)
QUALITY = jnp.array([0.1, 0.9, -0.3, 0.5])


def blended(targets=FC, dot=True, name='blended', **options):
  """Two low-rank products, weighted by a number of each example (2412.07771)."""

  def root(t, call, *args, quality=None, **kwargs):
    call.local['quality'] = quality
    return call(*args, **kwargs)

  def init(key, w):
    d1, d2, u1, u2 = (
      jax.random.normal(k, (w.shape[i // 2], 2)) for i, k in enumerate(jax.random.split(key, 4))
    )
    return {'d1': d1, 'd2': d2, 'u1': 0 * u1.T, 'u2': 0 * u2.T}

  def weight(t, w):
    a = t['quality']
    return w + (1 - a) * t['d1'] @ t['u1'] + a * t['d2'] @ t['u2']

  def through(t, x, y, w, key):
    a = jnp.expand_dims(t['quality'], range(t['quality'].ndim, y.ndim))
    return y + (1 - a) * ((x @ t['d1']) @ t['u1']) + a * ((x @ t['d2']) @ t['u2'])

  inner = jpeft.matrix(name, init, weight, through if dot else None, outer=('quality',), **options)
  outer = jpeft.Call(name, root, merge=lambda t, site, arrays: {}, takes=('quality',))
  return jpeft.chain(jpeft.at('', outer), jpeft.at(targets, inner))


@pytest.mark.parametrize('name', MODELS)
def test_each_example_reads_its_own_number(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, blended(), held, X, quality=QUALITY)
  theta = noisy(tuned.init(jax.random.key(0), held))
  run = jax.jit(lambda theta, x, q: tuned.apply(theta, held, x, quality=q))
  whole = run(theta, X, QUALITY)
  for i in range(len(X)):
    alone = run(theta, X[i : i + 1], QUALITY[i : i + 1])
    np.testing.assert_allclose(whole[i], alone[0], rtol=1e-5, atol=1e-6)
    merged = tuned.merge(theta, held, outer={'quality': QUALITY[i]})
    np.testing.assert_allclose(plain(model, merged, X)[i], whole[i], rtol=1e-4, atol=1e-5)
  grads = jax.grad(lambda q: jnp.sum(run(theta, X, q) ** 2))(QUALITY)
  assert np.all(np.abs(grads) > 0)
  step = jax.grad(lambda theta: jnp.sum(run(theta, X, QUALITY) ** 2))(theta)
  assert all(np.any(g) for g in jax.tree.leaves(step))


@pytest.mark.parametrize('name', MODELS)
def test_through_the_kernel_it_is_one_number(name):
  model = MODELS[name]()
  held = backbone(model)
  boxed = jpeft.attach(model, blended(dot=False), held, X, quality=0.3)
  fused = jpeft.attach(model, blended(), held, X, quality=0.3)
  theta = noisy(fused.init(jax.random.key(0), held))
  np.testing.assert_allclose(
    boxed.apply(theta, held, X, quality=0.3),
    fused.apply(theta, held, X, quality=jnp.full(len(X), 0.3)),
    rtol=1e-4,
    atol=1e-5,
  )
  with pytest.raises(ValueError, match=r"reads 'quality' of shape \(4,\), and here acts through"):
    boxed.apply(theta, held, X, quality=QUALITY)


def test_mistakes():
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, blended(), held, X, quality=0.0)
  theta = tuned.init(jax.random.key(0), held)
  with pytest.raises(ValueError, match="reads 'quality' of each call of the model"):
    tuned.merge(theta, held)
  with pytest.raises(ValueError, match='one kernel serves all examples'):
    tuned.merge(theta, held, outer={'quality': QUALITY})
  with pytest.raises(ValueError, match="outer='qualty' is read by no rule; did you mean 'quality'"):
    tuned.merge(theta, held, outer={'qualty': 1.0})
  with pytest.raises(ValueError, match='chain a Call called'):
    jpeft.attach(model, blended()[1:], held, X)
  reads_kernel = jpeft.chain(
    jpeft.at('', jpeft.Call('low', lambda t, call, *a, **k: call(*a, **k))),
    low_rank(FC, outer=('kernel',)),
  )
  with pytest.raises(ValueError, match="outer='kernel' is the name of an array of the site"):
    jpeft.attach(model, reads_kernel, held, X)
  silent = jpeft.chain(
    jpeft.at('', jpeft.Call('low', lambda t, call, *a, **k: call(*a, **k))),
    low_rank(FC, outer=('scale',)),
  )
  tuned = jpeft.attach(model, silent, held, X)
  with pytest.raises(ValueError, match="no Call called 'low' around it has put that"):
    tuned.apply(tuned.init(jax.random.key(0), held), held, X)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('make', (low_rank, lambda targets: adapter(targets[:-3])), ids=('w', 'c'))
def test_an_adapter_for_each_example(name, make):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, make(FC), held, X)
  thetas = [fixture_noise(tuned.init(jax.random.key(i), held), i) for i in range(3)]
  index = jnp.array([2, 0, 1, 2])
  stacked = jpeft.thetas.stack(thetas)
  together = jax.jit(tuned.apply_each)(stacked, index, held, X)
  for i, which in enumerate(index):
    alone = tuned.apply(thetas[which], held, X[i : i + 1])
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-6)


def fixture_noise(theta, i):
  return jax.tree.map(lambda x: x + 0.1 * i, noisy(theta))


@pytest.mark.parametrize('backbone_name', ('linen_vit_scan', 'linen_bert', 'nnx_vit_scan'))
@pytest.mark.parametrize('method', ('lora', 'vpt_deep', 'lst'))
def test_real_methods_for_each_example(backbone_name, method):
  b = BACKBONES[backbone_name]
  with described(b):
    small = {'lora': {'rank': 2}, 'vpt_deep': {'tokens': 2}, 'lst': {}}[method]
    tuned = jpeft.attach(b.model, jpeft.make(method, **small), b.backbone, *b.args, **b.kwargs)
    thetas = [fixture_noise(tuned.init(jax.random.key(i), b.backbone), i) for i in range(2)]
    each = jax.jit(
      lambda thetas, index: tuned.apply_each(thetas, index, b.backbone, *b.args, **b.kwargs)
    )
    together = each(jpeft.thetas.stack(thetas), jnp.array([1, 0]))
    whole = [jax.jit(lambda t: tuned.apply(t, b.backbone, *b.args, **b.kwargs))(t) for t in thetas]
  for i, which in enumerate((1, 0)):
    got = jax.tree.leaves(together)[0][i]
    np.testing.assert_allclose(got, jax.tree.leaves(whole[which])[0][i], rtol=2e-4, atol=2e-5)


def test_what_apply_each_refuses():
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank(FC), held, X)
  theta = jpeft.thetas.stack([tuned.init(jax.random.key(0), held)])
  index = jnp.zeros(4, int)
  with pytest.raises(ValueError, match='aux= is not taken'):
    tuned.apply_each(theta, index, held, X, aux=True)
  with pytest.raises(ValueError, match='index names 3 examples'):
    tuned.apply_each(theta, index[:3], held, X)
  with pytest.raises(ValueError, match='no theta is given'):
    jpeft.thetas.stack([])
