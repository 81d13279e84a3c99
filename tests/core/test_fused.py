"""A product fused into a layer is the same function as changed weights, and forms no dense
gradient.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex

import jpeft
from tests.core.small import backbone, low_rank, noisy

RNGS = lambda: nnx.Rngs(0)
# name: (model, shape of the input, elements of the kernel, which no activation has)
LAYERS = {
  'Dense': (lambda: nn.Dense(11), (2, 3, 5), 55),
  'Dense without bias': (lambda: nn.Dense(11, use_bias=False), (5,), 55),
  'DenseGeneral out': (lambda: nn.DenseGeneral((3, 7)), (2, 5), 105),
  'DenseGeneral in': (lambda: nn.DenseGeneral(11, axis=(-2, -1)), (2, 3, 5), 165),
  'DenseGeneral in, other order': (lambda: nn.DenseGeneral(11, axis=(-1, -2)), (2, 3, 5), 165),
  'DenseGeneral in, first axis': (lambda: nn.DenseGeneral(11, axis=(1,)), (2, 3, 5), 33),
  'Einsum': (lambda: nn.Einsum((5, 3, 7), 'BND,DHK->BNHK'), (2, 4, 5), 105),
  'Einsum, outputs first': (lambda: nn.Einsum((7, 3, 5), 'BND,KHD->BHNK'), (2, 4, 5), 105),
  'Einsum in': (lambda: nn.Einsum((3, 7, 5), 'BNHK,HKD->BND'), (2, 4, 3, 7), 105),
  'Conv': (lambda: nn.Conv(7, (3, 3)), (2, 6, 6, 5), 315),
  'Conv, strides': (lambda: nn.Conv(7, (2, 2), strides=2, padding='VALID'), (2, 6, 6, 5), 140),
  'Conv, dilation': (lambda: nn.Conv(7, (3,), kernel_dilation=2), (2, 9, 5), 105),
  'nnx.Linear': (lambda: nnx.Linear(5, 11, rngs=RNGS()), (2, 3, 5), 55),
  'nnx.LinearGeneral out': (lambda: nnx.LinearGeneral(5, (3, 7), rngs=RNGS()), (2, 5), 105),
  'nnx.LinearGeneral in': (
    lambda: nnx.LinearGeneral((3, 5), 11, axis=(-2, -1), rngs=RNGS()),
    (2, 3, 5),
    165,
  ),
  'nnx.Einsum': (lambda: nnx.Einsum('BND,DHK->BNHK', (5, 3, 7), rngs=RNGS()), (2, 4, 5), 105),
  'nnx.Einsum, bias': (
    lambda: nnx.Einsum('BND,DHK->BNHK', (5, 3, 7), (3, 7), rngs=RNGS()),
    (2, 4, 5),
    105,
  ),
  'nnx.Conv': (lambda: nnx.Conv(5, 7, (3, 3), rngs=RNGS()), (2, 6, 6, 5), 315),
}


def attached(name, dot, dtype=jnp.float32):
  make, shape, _ = LAYERS[name]
  model, x = make(), jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
  held = jax.tree.map(
    lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, backbone(model, x)
  )
  tuned = jpeft.attach(model, low_rank('', dot=dot), held, x)
  return tuned, noisy(tuned.init(jax.random.key(0), held)), held, x


def loss(tuned, held, x):
  def fn(theta):
    y = tuned.apply(theta, held, x)
    return jnp.sum(y.astype(jnp.float32) ** 2), y

  return jax.value_and_grad(fn, has_aux=True)


def sizes(jaxpr):
  """The sizes of all that a jaxpr computes: what its multiplications and additions give."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in (
      'dot_general',
      'conv_general_dilated',
      'add',
      'add_any',
      'mul',
      'sub',
    ):
      yield from (v.aval.size for v in eqn.outvars)
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda p: isinstance(p, jex.Jaxpr)
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if isinstance(inner, jex.Jaxpr):
        yield from sizes(inner)


@pytest.mark.parametrize('name', LAYERS)
def test_fused_equals_changed_weights(name):
  (a, theta, held, x), (b, same, _, _) = attached(name, True), attached(name, False)
  assert jax.tree.all(jax.tree.map(np.array_equal, theta, same))
  (_, y), grads = jax.jit(loss(a, held, x))(theta)
  (_, want), wanted = jax.jit(loss(b, held, x))(theta)
  start = a.apply(a.init(jax.random.key(0), held), held, x)
  assert not np.allclose(y, start, atol=0.1)
  np.testing.assert_allclose(y, want, atol=1e-5)
  for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize('name', [n for n in LAYERS if n[:6] != 'Einsum'])
def test_fused_forms_nothing_as_large_as_the_kernel(name):
  computed = []
  for dot in (True, False):
    tuned, theta, held, x = attached(name, dot)
    assert LAYERS[name][2] in {a.size for a in jax.tree.leaves(held)}
    computed.append(set(sizes(jax.make_jaxpr(loss(tuned, held, x))(theta).jaxpr)))
  assert LAYERS[name][2] not in computed[0]
  assert LAYERS[name][2] in computed[1]


@pytest.mark.parametrize('name', ['Dense', 'Einsum', 'Conv', 'nnx.LinearGeneral in'])
def test_fused_keeps_half_precision(name):
  tuned, theta, held, x = attached(name, True, jnp.bfloat16)
  assert {t.dtype for t in jax.tree.leaves(tuned.shapes)} == {jnp.dtype('float32')}
  (_, y), grads = jax.jit(loss(tuned, held, x))(theta)
  assert y.dtype == jnp.bfloat16 and {g.dtype for g in jax.tree.leaves(grads)} == {
    jnp.dtype('float32')
  }
  exact, _, held, x = attached(name, True)
  want = exact.apply(theta, held, x)
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.05 * float(np.abs(want).max()))


def test_linen_einsum_offers_no_door():
  tuned, *_ = attached('Einsum', True)
  assert tuned.sites[''].fields == () and tuned.sites[''].leaves['kernel'].ins == (0,)


class Bare(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x @ self.param('kernel', nn.initializers.normal(1.0), (x.shape[-1], 3))


def test_a_rule_that_needs_the_layers_input_is_refused_where_no_layer_hands_it_over():
  x = jnp.ones((2, 5))
  held = backbone(Bare(), x)
  assert jpeft.attach(Bare(), low_rank(''), held, x).sites[''].matrices == ['kernel']
  with pytest.raises(ValueError, match='Bare offers no injection point for it; use dropout=0'):
    jpeft.attach(Bare(), low_rank('', requires='input in training'), held, x)
  with pytest.raises(ValueError, match="low at '': the rule acts on the input of a layer"):
    jpeft.attach(Bare(), low_rank('', requires='input'), held, x)


def test_a_boxed_rule_behind_it_takes_the_input_away():
  model, x = nn.Dense(3), jnp.ones((2, 5))
  held = backbone(model, x)
  needs, boxed = low_rank('', requires='input in training'), low_rank('', 'after', dot=False)
  jpeft.attach(model, jpeft.chain(boxed, needs), held, x)
  with pytest.raises(ValueError, match='use dropout=0'):
    jpeft.attach(model, jpeft.chain(needs, boxed), held, x)


def test_a_depthwise_convolution_is_boxed():
  model, x = nn.Conv(4, (3,), feature_group_count=4), jnp.ones((2, 5, 4))
  held = backbone(model, x)
  tuned = jpeft.attach(model, low_rank(''), held, x)
  assert tuned.sites[''].fields == () and tuned.sites[''].leaves['kernel'].fan_in == 3
  theta = noisy(tuned.init(jax.random.key(0), held))
  np.testing.assert_allclose(
    tuned.apply(theta, held, x), model.apply(tuned.merge(theta, held), x), atol=1e-6
  )
