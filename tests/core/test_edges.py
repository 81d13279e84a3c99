"""Every unusual door: unchanged at first, differentiable, mergeable."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import adapter, low_rank, noisy, train
from tests.fixtures import EDGES, leaf_paths, plain
from tests.params import fast_if

RULES = {
  'fused': low_rank,
  'boxed': lambda targets: low_rank(targets, dot=False),
  'call': adapter,
  'train': train,
}
PAIRS = [('boxed' if i % 2 else 'fused', name) for i, name in enumerate(EDGES)]
PAIRS += [('call' if i % 2 else 'train', name) for i, name in enumerate(EDGES)]


def attached(rule, name):
  b = EDGES[name]
  role = 'block' if rule == 'call' else 'linear'
  return b, jpeft.attach(b.model, RULES[rule](b.roles[role]), b.backbone, *b.args, **b.kwargs)


def close(got, want, atol):
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=atol), got, want)


@pytest.mark.parametrize(
  ('rule', 'name'),
  fast_if(
    lambda rule, name: (rule in ('fused', 'boxed')) == (list(EDGES).index(name) % 4 < 2), PAIRS
  ),
)
def test_an_edge(rule, name):
  b, tuned = attached(rule, name)
  start = jax.jit(tuned.init)(jax.random.key(0), b.backbone)

  def fn(theta, held):
    out = tuned.apply(theta, held, *b.args, **b.kwargs)
    return sum(jnp.sum(y**2) for y in jax.tree.leaves(out)), out

  run = jax.jit(jax.value_and_grad(fn, has_aux=True))
  close(run(start, b.backbone)[0][1], plain(b), 1e-5)
  theta = noisy(start, 0.1)
  (_, out), grads = run(theta, b.backbone)
  still = {p for p, g in leaf_paths(grads).items() if not jnp.abs(g).max() > 1e-5}
  assert all(any(re.fullmatch(f'.*?/{z}', p) for z in b.zero_grad) for p in still)
  if tuned.mergeable:
    largest = max(float(np.abs(y).max()) for y in jax.tree.leaves(out))
    merged = tuned.merge(theta, b.backbone)
    assert jax.tree.structure(merged) == jax.tree.structure(b.backbone)
    close(plain(b, merged), out, 1e-5 * max(1, largest))
  else:
    assert rule == 'call'


@pytest.mark.parametrize('name', ['linen_methods', 'nnx_methods'])
def test_a_rule_wraps_the_method_it_names(name):
  b = EDGES[name]
  rule = lambda method, k: jpeft.at(
    'coder',
    jpeft.Call(
      method,
      lambda t, call, x: t['s'] * call(x) + k,
      lambda key, site, a: {'s': jnp.ones(())},
      method=method,
    ),
  )
  both = jpeft.chain(rule('encode', 1.0), rule('decode', 10.0))
  tuned = jpeft.attach(b.model, both, b.backbone, *b.args, **b.kwargs)
  theta = jax.jit(tuned.init)(jax.random.key(0), b.backbone)
  assert set(theta) == {'encode', 'decode'}
  zero = jax.tree.map(jnp.zeros_like, theta)
  out = jax.tree.leaves(
    tuned.apply({**theta, 'decode': zero['decode']}, b.backbone, *b.args, **b.kwargs)
  )
  np.testing.assert_array_equal(out[-1], np.full(out[-1].shape, 10.0))
  moved = jax.tree.leaves(
    tuned.apply({**theta, 'encode': zero['encode']}, b.backbone, *b.args, **b.kwargs)
  )
  down = tuned.only('encode').apply(zero, b.backbone, *b.args, **b.kwargs)
  close(moved[-1], jax.tree.leaves(down)[-1] + 10, 1e-5)


def test_a_call_that_the_module_does_not_have():
  b = EDGES['nnx_methods']
  with pytest.raises(ValueError, match='1 sites match, but none has what it adapts'):
    jpeft.attach(b.model, adapter('coder'), b.backbone, *b.args, **b.kwargs)


@pytest.mark.parametrize('name', ['linen_jit_block', 'nnx_jit'])
def test_a_jitted_layer_is_traced_again_for_another_method(name):
  b = EDGES[name]
  init = lambda key, site, arrays: {'s': jnp.ones(())}

  def attached(sign):
    def apply(t, call, *args):
      leaves, tree = jax.tree.flatten(call(*args))
      return jax.tree.unflatten(tree, [leaves[0] + sign * t['s'], *leaves[1:]])

    rule = jpeft.at(b.roles['block'], jpeft.Call('same', apply, init))
    return jpeft.attach(b.model, rule, b.backbone, *b.args, **b.kwargs)

  plus, minus, zero = (attached(sign) for sign in (1, -1, 0))
  theta = jax.jit(plus.init)(jax.random.key(0), b.backbone)
  outs = [tuned.apply(theta, b.backbone, *b.args) for tuned in (plus, minus, zero, plus)]
  np.testing.assert_array_equal(outs[0], outs[3])
  close(outs[2], plain(b), 1e-5)
  assert not np.allclose(outs[0], outs[1], atol=1e-2) and not np.allclose(
    outs[0], outs[2], atol=1e-2
  )


@pytest.mark.parametrize(
  'name', ['linen_nested_scan', 'linen_scan_axis1', 'linen_vmap_ensemble', 'linen_partitioned']
)
def test_stacked_layers_have_their_own_scalars_and_keys(name):
  b = EDGES[name]

  def apply(t, call, x):
    assert t['s'].shape == () and t['m'].shape == (1, 1)
    (y, rest), key = call(x), call.rng('noise')
    return t['s'] * y + (0 if key is None else t['m'][0, 0] * jax.random.normal(key)), rest

  rule = jpeft.Call(
    'scalar', apply, lambda key, site, a: {'s': jnp.ones(()), 'm': jnp.zeros((1, 1))}
  )
  tuned = jpeft.attach(b.model, jpeft.at(b.roles['block'], rule), b.backbone, *b.args)
  theta = jax.jit(tuned.init)(jax.random.key(0), b.backbone)
  run = jax.jit(lambda theta, key: tuned.apply(theta, b.backbone, *b.args, rngs={'dropout': key}))
  close(run(theta, jax.random.key(0)), plain(b), 1e-5)
  loss = lambda theta, key: jnp.sum(run.__wrapped__(theta, key) ** 2)
  grads = jax.jit(jax.grad(loss))(theta, jax.random.key(0))['scalar']
  noise = np.concatenate([np.ravel(g['m']) for g in grads.values()])  # goes with what each key drew
  assert (
    len(set(noise.tolist())) == noise.size == b.depth * (3 if name == 'linen_vmap_ensemble' else 1)
  )
  assert all(np.all(g['s'] != 0) for g in grads.values())
