"""SSF: the affine map behind every layer, what it may merge into, and the counts of the paper."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.weight.ssf import ssf
from tests.fixtures import flops, noisy
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)


def tune(model, x=X, init='identity', targets='', variables=None):
  """(tuned, variables) of a model with SSF at `targets`, its arrays off their initial values."""
  variables = noisy(model.init(jax.random.key(0), x), 0.5) if variables is None else variables
  return jpeft.attach(model, ssf(targets, init), variables, x), variables


def theta_of(tuned, **pair):
  """theta of a single site with one array."""
  ((path, arrays),) = tuned.shapes['ssf'].items()
  ((array, shapes),) = arrays.items()
  assert set(pair) == set(shapes)
  return {'ssf': {path: {array: {n: jnp.asarray(x, jnp.float32) for n, x in pair.items()}}}}


def test_the_worked_example():
  variables = {'params': {'kernel': jnp.array([[1.0, 3], [2, 4]]), 'bias': jnp.array([0.5, -1])}}
  x = jnp.array([[1.0, -1]])
  tuned, _ = tune(nn.Dense(2), x, variables=variables)
  theta = theta_of(tuned, scale=[2, 0.5], shift=[0.1, 0.2])
  np.testing.assert_allclose(tuned.apply(theta, variables, x), [[-0.9, -0.8]], atol=1e-6)
  merged = tuned.merge(theta, variables)['params']
  np.testing.assert_allclose(merged['kernel'].T, [[2, 4], [1.5, 2]])
  np.testing.assert_allclose(merged['bias'], [1.1, -0.3], atol=1e-6)


class OffsetNorm(nn.Module):
  """A norm that stores scale - 1."""

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.zeros, x.shape[-1:])
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * (1 + scale)


class BareEinsum(nn.Module):
  """Keys and values [2, B, N, G, K] from one kernel whose outputs are not the last axes."""

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.normal(1.0), (2, 3, x.shape[-1], 4))
    return jnp.einsum('BND,CGDK->CBNGK', x, w)


SHIFTED = {
  'dense': (nn.Dense(3), X, (3,)),
  'heads': (nn.DenseGeneral((2, 3)), X, (2, 3)),
  'out of heads': (nn.DenseGeneral(4, axis=(-2, -1)), X, (4,)),
  'convolution': (nn.Conv(4, (2, 3), (1, 2)), X[:, :, :, None], (4,)),
  'layer norm': (nn.LayerNorm(), X, (6,)),
}
SCALED = {
  'no bias': (nn.Dense(3, use_bias=False), X, (3,)),
  'no shift': (nn.RMSNorm(), X, (6,)),
  'offset': (OffsetNorm(), X, (6,)),
  'einsum': (BareEinsum(), X, (2, 1, 1, 3, 4)),
}


@pytest.mark.parametrize('name', [*SHIFTED, *SCALED])
def test_every_kind_of_layer_is_followed_by_the_affine_map_and_merges(name):
  model, x, channels = (SHIFTED | SCALED)[name]
  tuned, variables = tune(model, x)
  size = int(np.prod(channels))
  pair = {
    'scale': RNG.normal(1, 0.5, size),
    **({'shift': RNG.normal(0, 0.5, size)} if name in SHIFTED else {}),
  }
  theta = theta_of(tuned, **pair)
  y = np.asarray(model.apply(variables, x))
  want = y * pair['scale'].reshape(channels) + np.reshape(
    pair.get('shift', np.zeros(size)), channels
  )
  np.testing.assert_allclose(tuned.apply(theta, variables, x), want, atol=1e-5)
  np.testing.assert_allclose(model.apply(tuned.merge(theta, variables), x), want, atol=1e-5)


@pytest.mark.parametrize('name', [*SHIFTED, *SCALED])
def test_scale_one_and_shift_zero_change_no_bit(name):
  model, x, _ = (SHIFTED | SCALED)[name]
  tuned, variables = tune(model, x)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  np.testing.assert_array_equal(tuned.apply(theta, variables, x), model.apply(variables, x))


@pytest.mark.parametrize('name', ['dense', 'layer norm'])
def test_the_gradient_is_the_sum_over_tokens(name):
  model, x, channels = SHIFTED[name]
  tuned, variables = tune(model, x)
  theta = theta_of(tuned, scale=RNG.normal(1, 0.5, channels), shift=RNG.normal(0, 0.5, channels))
  y = np.asarray(model.apply(variables, x))
  upstream = RNG.normal(size=y.shape).astype(np.float32)
  grad = jax.grad(lambda t: jnp.sum(upstream * tuned.apply(t, variables, x)))(theta)
  scale, shift = (jax.tree.leaves(grad)[i] for i in (0, 1))
  np.testing.assert_allclose(scale, (upstream * y).sum((0, 1)), atol=1e-4)
  np.testing.assert_allclose(shift, upstream.sum((0, 1)), atol=1e-4)


def test_no_gradient_of_a_kernel_is_formed():
  x = jnp.ones((64, 256))
  model = nn.Dense(256)
  tuned, variables = tune(model, x)
  theta = jax.jit(tuned.init)(jax.random.key(0), variables)
  loss = lambda theta, x: jnp.sum(jnp.square(tuned.apply(theta, variables, x)))
  one = flops(model.apply, variables, x)
  assert one > 2 * 64 * 256 * 256 - 1
  assert flops(jax.grad(loss), theta, x) < 1.1 * one


def test_a_site_with_nothing_affine_is_refused():
  with pytest.raises(ValueError, match='none has what it adapts'):
    tune(nn.LayerNorm(use_scale=False, use_bias=False), variables={'params': {}})


def vit_base():
  config = {
    'model_type': 'vit',
    'hidden_size': 768,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'intermediate_size': 3072,
    'patch_size': 16,
    'image_size': 32,
    'qkv_bias': True,
  }
  return jpeft.models.from_config(config, num_classes=10, scan=True)


class FusedBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    q, k, v = jnp.split(nn.Dense(3 * 768, name='qkv')(nn.LayerNorm(name='norm1')(x)), 3, -1)
    x = x + nn.Dense(768, name='proj')(
      nn.dot_product_attention(*(t[:, :, None] for t in (q, k, v)))[:, :, 0]
    )
    return x + nn.Dense(768, name='fc2')(
      nn.gelu(nn.Dense(3072, name='fc1')(nn.LayerNorm(name='norm2')(x)))
    ), None


class FusedViT(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.Conv(768, (16, 16), (16, 16), name='patch')(images).reshape(len(images), -1, 768)
    blocks = nn.scan(
      FusedBlock, variable_axes={'params': 0}, split_rngs={'params': True}, length=12
    )
    return nn.Dense(10, name='head')(
      nn.LayerNorm(name='norm')(blocks(name='blocks')(x, None)[0]).mean(1)
    )


@pytest.mark.parametrize(
  'make, targets, pairs',
  [(vit_base, None, 12 * 8 + 2), (FusedViT, 'patch|norm|blocks/.*', 12 * 6 + 2)],
  ids=['q, k, v', 'fused'],
)
def test_count_on_vit_b16(make, targets, pairs):
  model, shapes = full_size.of(make(), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
  method = ssf(targets) if targets else ssf()
  tuned = jpeft.attach(model, method, *shapes)
  assert jpeft.count(tuned.shapes) == 205_824
  assert sum(site.layers for _, site in tuned.rules) == pairs
  assert all(
    set(p) == {'scale', 'shift'} for arrays in tuned.shapes['ssf'].values() for p in arrays.values()
  )


def test_the_papers_start():
  tuned, variables = tune(nn.Dense(102_912), jnp.zeros((1, 1)), 'normal')
  scale, shift = jax.tree.leaves(tuned.init(jax.random.key(0), variables))
  for x, mean in ((scale, 1), (shift, 0)):
    assert abs(x.mean() - mean) < 1e-3 and abs(x.std() - 0.02) < 5e-4
  assert abs(np.corrcoef(scale, shift)[0, 1]) < 0.02


def test_unknown_start():
  with pytest.raises(ValueError, match="init='zeros' must be 'normal' or 'identity'"):
    ssf(init='zeros')
