"""State, layers and frozen parts on a mesh of 2 x 4 devices, with a sharded backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from tests.contract.anatomies import described
from tests.core.small import shared_factor
from tests.fixtures import BACKBONES, noisy


def counted(name='counted'):
  """Scales the stream by a trained number, and counts its calls."""

  def init(key, site, arrays):
    return {'calls': jnp.zeros((), jnp.int32), 'scale': jnp.ones(())}

  def apply(t, call, *args, **kwargs):
    call.write(calls=t['calls'] + 1)
    call.aux(scale=t['scale'])
    return call.site.map_stream(call(*args, **kwargs), lambda x: x * t['scale'])

  return jpeft.at('{block}', jpeft.Call(name, apply, init), layers=0)


def by_example(name='by_example'):
  """A low-rank product that each example takes in its own share."""

  def root(t, call, x, *args, **kwargs):
    call.local['share'] = jnp.linspace(0, 1, len(x))[:, None, None]
    return call(x, *args, **kwargs)

  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], 2)), 'b': jnp.zeros((2, w.shape[1]))}

  def dot(t, x, y, w, key):
    return y + t['share'] * ((x @ t['a']) @ t['b'])

  product = jpeft.matrix(
    name, init, lambda t, w: w + t['share'] * t['a'] @ t['b'], dot, outer=('share',)
  )
  return jpeft.chain(jpeft.at('', jpeft.Call(name, root)), jpeft.at('{q}', product))


def edited():
  """LoRA that takes a step more, from gradients and moments."""

  def edit(state, grads, step, key):
    mean, variance = state.moments
    further = lambda t, m, g: t - 0.1 * m / step + 0.01 * jnp.sign(g)
    theta = jax.tree.map(further, state.theta, mean, grads)
    return state._replace(theta=theta, moments=(jax.tree.map(jnp.zeros_like, mean), variance))

  return jpeft.Method(
    (pattern, dataclasses.replace(rule, edit=edit)) for pattern, rule in jpeft.lora(2)
  )


def method_of(kind, b):
  if kind == 'layers':
    return jpeft.in_layers(jpeft.lora(2), '-1:')
  if kind == 'state':
    return counted()
  if kind == 'generated':
    return shared_factor(jpeft.lora(2, targets='{q}'))
  if kind == 'outer':
    return by_example()
  if kind == 'edit':
    return edited()
  trained = jpeft.attach(b.model, jpeft.lora(2), b.backbone, *b.args, **b.kwargs)
  theta = noisy(trained.init(jax.random.key(0), b.backbone))
  return jpeft.chain(jpeft.frozen(jpeft.lora(2), theta), jpeft.pfeiffer(8))


@pytest.mark.parametrize('name', ('linen_vit', 'linen_vit_scan', 'nnx_vit_scan'))
@pytest.mark.parametrize('kind', ('layers', 'state', 'frozen', 'generated', 'outer', 'edit'))
def test_the_same_numbers_as_on_one_device(kind, name):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, method_of(kind, b), b.backbone, *b.args, **b.kwargs)
  theta = noisy(tuned.init(jax.random.key(0), b.backbone))

  @jax.jit
  def step(theta, backbone, args):
    trained, held = tuned.split(theta)

    def loss(trained):
      out, aux = tuned.apply(tuned.join(trained, held), backbone, *args, aux=True, **b.kwargs)
      return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(out)), (out, aux)

    grads, (out, aux) = jax.grad(loss, has_aux=True)(trained)
    tx = optax.adam(1e-2)
    updates, optimizer = tx.update(grads, tx.init(trained), trained)
    new = tuned.join(optax.apply_updates(trained, updates), held)
    if tuned.edits:
      new, optimizer = tuned.edit(theta, new, optimizer, grads, 1, jax.random.key(0))
    else:
      new = tuned.join(trained, held)  # Adam's first step is the sign of a gradient, noise and all
    return out, grads, optimizer, tuned.write_back(new, aux)

  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def sharded(x):
    if x.ndim < 2 or x.shape[-1] % 4:
      return jax.device_put(x, NamedSharding(mesh, P()))
    return jax.device_put(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), 'model')))

  one = step(theta, b.backbone, b.args)
  many = step(
    jax.device_put(theta, NamedSharding(mesh, P())),
    jax.tree.map(sharded, b.backbone),
    jax.device_put(b.args, NamedSharding(mesh, P('data'))),
  )
  assert len(jax.tree.leaves(many[0])[0].sharding.device_set) == 8
  for alone, spread in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
