"""Schedules, factors and decay against numbers worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.training import optim


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + nn.Dense(4, name='fc1')(x)


class Net(nn.Module):
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name='embed')(x)
    if self.scan:
      body = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
      )
      x, _ = body(Block(name='blocks'), x, None)
    else:
      for i in range(3):
        x = Block(name=f'block_{i}')(x)
    return nn.Dense(2, name='head')(x)


def tuned_of(method, scan=False):
  model, x = Net(scan), jnp.ones((2, 4))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  tuned = jpeft.attach(model, method, variables, x)
  return tuned, jax.jit(tuned.init)(jax.random.key(1), variables)


def test_schedules():
  cosine = optim.schedule('cosine', 2.0, 10, warmup_steps=4, final=0.1)
  np.testing.assert_allclose([cosine(i) for i in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
  np.testing.assert_allclose([cosine(7), cosine(10)], [1.1, 0.2], rtol=1e-6)
  linear = optim.schedule('linear', 1.0, 10, warmup_fraction=0.2)
  np.testing.assert_allclose([linear(2), linear(6), linear(10)], [1.0, 0.5, 0.0], atol=1e-7)
  assert optim.schedule('constant', 0.3, 10)(9) == pytest.approx(0.3)
  with pytest.raises(ValueError, match='longer than the run'):
    optim.schedule('cosine', 1.0, 10, warmup_steps=11)
  with pytest.raises(ValueError, match='no schedule is called'):
    optim.schedule('cosin', 1.0, 10)


def test_layer_decay_counts_blocks_from_the_output():
  tuned, theta = tuned_of(jpeft.tune('.*'))
  found = optim.factors(tuned, theta, layer_decay=0.5)
  assert {k.split('/')[1]: v for k, v in found.items()} == {
    'embed': 0.5**4,
    'block_0': 0.5**3,
    'block_1': 0.5**2,
    'block_2': 0.5,
    'head': 1.0,
  }


def test_layer_decay_of_a_stack_is_one_number_a_layer():
  tuned, theta = tuned_of(jpeft.tune('.*'), scan=True)
  found = optim.factors(tuned, theta, layer_decay=0.5)
  kernel = next(v for k, v in found.items() if 'blocks' in k and k.endswith('kernel'))
  assert kernel.shape == (3, 1, 1)
  np.testing.assert_allclose(kernel.ravel(), [0.5**3, 0.5**2, 0.5])
  assert next(v for k, v in found.items() if 'head' in k) == 1.0


def test_groups_and_lora_plus_multiply():
  tuned, theta = tuned_of(
    jpeft.chain(jpeft.lora(2, targets='.*fc1'), jpeft.tune('head', name='head'))
  )
  found = optim.factors(tuned, theta, groups=[('head/.*', 0.1), ('lora/.*', 3.0)], lora_plus=16.0)
  b = {v for k, v in found.items() if k.endswith('/b')}
  a = {v for k, v in found.items() if k.endswith('/a')}
  assert b == {48.0} and a == {3.0} and found['head/head/kernel'] == 0.1
  with pytest.raises(
    ValueError, match="'heads/.*' matches no leaf of theta; near it are .*head/head"
  ):
    optim.factors(tuned, theta, groups=[('heads/.*', 0.1)])


@pytest.mark.parametrize('scan', [False, True])
def test_decay_spares_vectors(scan):
  tuned, theta = tuned_of(jpeft.tune('.*'), scan)
  tx = optim.optimizer(tuned, theta, optax.constant_schedule(1.0), weight_decay=0.1, name='adamw')
  zero = jax.tree.map(jnp.zeros_like, theta)
  updates, _ = tx.update(zero, tx.init(theta), theta)
  for path, leaf in jax.tree_util.tree_flatten_with_path(theta)[0]:
    update = updates
    for key in path:
      update = update[key.key]
    np.testing.assert_allclose(
      update, -0.1 * leaf if path[-1].key == 'kernel' else 0 * leaf, rtol=1e-6
    )
  everywhere = optim.optimizer(
    tuned, theta, optax.constant_schedule(1.0), weight_decay=0.1, decay_vectors=True
  )
  ones = jax.tree.map(jnp.ones_like, theta)
  updates, _ = everywhere.update(zero, everywhere.init(ones), ones)
  assert all(np.allclose(u, -0.1) for u in jax.tree.leaves(updates))


def test_factors_scale_the_update():
  tuned, theta = tuned_of(jpeft.tune('.*'))
  rate, grads = optax.constant_schedule(0.1), jax.tree.map(jnp.ones_like, theta)
  plain = optim.optimizer(tuned, theta, rate, name='sgd', b1=0.0)
  decayed = optim.optimizer(tuned, theta, rate, name='sgd', b1=0.0, layer_decay=0.5)
  u, v = (tx.update(grads, tx.init(theta), theta)[0]['tune'] for tx in (plain, decayed))
  np.testing.assert_allclose(u['embed']['kernel'], -0.1)
  np.testing.assert_allclose(v['embed']['kernel'], -0.1 / 16)
  np.testing.assert_allclose(v['head']['bias'], -0.1)


def test_what_a_method_holds_fixed_stays_and_is_not_in_the_norm():
  tuned, theta = tuned_of(jpeft.lora(2, targets='.*fc1', init='pissa'))
  kept = tuned.trainable(theta)
  assert not all(jax.tree.leaves(kept))
  tx = optim.optimizer(
    tuned,
    theta,
    optax.constant_schedule(1.0),
    name='sgd',
    b1=0.0,
    clip_norm=1.0,
    weight_decay=0.0,
    groups=[('lora/.*', 1.0)],
    lora_plus=2.0,
  )
  grads = jax.tree.map(lambda x, keep: jnp.full_like(x, 1.0 if keep else 1e6), theta, kept)
  updates, _ = tx.update(grads, tx.init(theta), theta)
  count = sum(
    x.size for x, keep in zip(jax.tree.leaves(theta), jax.tree.leaves(kept), strict=True) if keep
  )
  for (path, u), keep in zip(
    jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(kept), strict=True
  ):
    factor = (2.0 if path[-1].key == 'b' else 1.0) if keep else 0.0
    np.testing.assert_allclose(u, -factor / count**0.5, rtol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'adamw_8bit', 'adam', 'sgd', 'lion', 'adafactor'])
def test_every_optimizer_descends(name):
  tuned, theta = tuned_of(jpeft.tune('head'))
  tx = optim.optimizer(tuned, theta, optax.constant_schedule(1e-2), name=name, weight_decay=1e-4)
  size = lambda t: sum(jnp.sum(x**2) for x in jax.tree.leaves(t))
  state, before = tx.init(theta), float(size(theta))
  for _ in range(20):
    updates, state = tx.update(jax.grad(size)(theta), state, theta)
    theta = optax.apply_updates(theta, updates)
  assert float(size(theta)) < before


def test_unknown_optimizer():
  tuned, theta = tuned_of(jpeft.tune('head'))
  with pytest.raises(ValueError, match="no optimizer is called 'adamww'.*did you mean 'adamw'"):
    optim.optimizer(tuned, theta, optax.constant_schedule(1.0), name='adamww')
