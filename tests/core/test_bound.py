"""What a Call may ask of the model: the wrapped call as a function, packed residuals, doors,
keys.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests.core.small import (
  BLOCKS,
  WIDTH,
  Blocks,
  X,
  backbone,
  low_rank,
  noisy,
  plain,
  spy,
  stacks,
)
from tests.fixtures import leaves_equal
from tests.kept import residuals

MODELS = stacks(3)


def wrapped(apply, name='wrap'):
  return jpeft.at(BLOCKS, jpeft.Call(name, apply))


def run(model, *around):
  """(output, gradients, what the vjp keeps) of a low-rank rule in every block, with rules around
  the blocks.
  """
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.chain(low_rank('.*/fc'), *around), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))

  def fn(theta, held):
    out, vjp = jax.vjp(lambda theta: tuned.apply(theta, held, X), theta)
    return out, vjp(jnp.ones_like(out))[0]

  return *jax.jit(fn)(theta, held), residuals(tuned.apply, theta, held, X)


def saving(pack, unpack):
  return wrapped(lambda t, call, *args: call.saving(pack, unpack)(*args))


def to_bytes(x):
  scale = jnp.max(jnp.abs(x)) / 127 + 1e-12
  return jnp.round(x / scale).astype(jnp.int8), scale.astype(jnp.float32)


PACKS = {
  'bfloat16': (saving(lambda x: x.astype(jnp.bfloat16), lambda p: p.astype(jnp.float32)), 0.01),
  'int8': (saving(to_bytes, lambda p: p[0].astype(jnp.float32) * p[1]), 0.03),
}


@pytest.mark.parametrize('name', MODELS)
def test_saving_as_it_is_changes_no_bit(name):
  out, grads, _ = run(MODELS[name]())
  same, again, _ = run(MODELS[name](), saving(lambda x: x, lambda x: x))
  assert leaves_equal((out, grads), (same, again))


@pytest.mark.parametrize('name', MODELS)
def test_a_gradient_of_a_compiled_function_is_the_same(name):
  """A custom_vjp inside jit is traced when a gradient is taken: the rules inside act then too."""
  model = MODELS[name]()
  held = backbone(model)
  method = jpeft.chain(low_rank('.*fc'), saving(lambda x: x, lambda x: x))
  tuned = jpeft.attach(model, method, held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  loss = lambda theta: jnp.sum(jnp.square(tuned.apply(theta, held, X)))
  inside, outside = jax.jit(jax.grad(loss))(theta), jax.grad(jax.jit(loss))(theta)
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(inside))
  jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5), inside, outside)


@pytest.mark.parametrize('pack', PACKS)
@pytest.mark.parametrize('name', MODELS)
def test_saving_less_keeps_the_output_and_nearly_the_gradient(name, pack):
  out, grads, _ = run(MODELS[name]())
  around, error = PACKS[pack]
  same, near, kept = run(MODELS[name](), around)
  assert leaves_equal(out, same)
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
  worst = max(
    float(jnp.abs(g - n).max()) for g, n in zip(*map(jax.tree.leaves, (grads, near)), strict=True)
  )
  assert 0 < worst < error * scale
  if 'remat' not in name:  # there residuals live for one layer's backward pass alone
    assert pack in {str(x.dtype) for x in kept}


@pytest.mark.parametrize('name', MODELS)
def test_a_block_as_a_pure_function_is_the_block_with_the_rules_inside(name):
  out, grads, _ = run(MODELS[name]())

  def recompute(t, call, *args):
    fn, arrays = call.pure()
    return jax.checkpoint(fn)(arrays, *args)

  again, same, _ = run(MODELS[name](), wrapped(recompute))
  np.testing.assert_allclose(again, out, atol=1e-6)
  jax.tree.map(lambda g, s: np.testing.assert_allclose(g, s, atol=1e-5), grads, same)


@pytest.mark.parametrize('name', ['linen', 'nnx scan'])
def test_a_pure_block_may_run_at_other_weights(name):
  def zeroed(t, call, *args):
    fn, arrays = call.pure()
    return fn(jax.tree.map(jnp.zeros_like, arrays), *args)

  out, _, _ = run(MODELS[name](), wrapped(zeroed))
  np.testing.assert_array_equal(out, X)


class Dropping(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5)(x, deterministic=not train)


class NnxDropping(nnx.Module):
  def __init__(self):
    self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))

  def __call__(self, x):
    return self.drop(x)


@pytest.mark.parametrize('make', [Dropping, NnxDropping])
def test_a_pure_block_draws_the_same_dropout_each_time_it_runs(make):
  model, found = make(), []

  def twice(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    found[:] = [fn(arrays, *args, **kwargs) for _ in range(2)]
    return found[0]

  held = {'params': {}} if make is Dropping else nnx.state(model)
  kwargs = {'train': True} if make is Dropping else {}
  tuned = jpeft.attach(
    model,
    jpeft.at('', jpeft.Call('twice', twice)),
    held,
    jnp.ones(64),
    **{k: False for k in kwargs},
  )
  keys = [jax.random.key(i) for i in range(2)]
  outs = []
  for key in keys:
    outs.append(tuned.apply({}, held, jnp.ones(64), rngs={'dropout': key}, **kwargs))
    assert leaves_equal(*found) and set(np.unique(found[0])) == {0, 2}
  assert not leaves_equal(*outs)


def test_an_injected_door_is_closed_again():
  model, seen = nn.MultiHeadDotProductAttention(2, qkv_features=WIDTH), []

  def attend(q, k, v, **kwargs):
    return 0 * nn.dot_product_attention(q, k, v)

  def apply(t, call, *args, **kwargs):
    before = call.module.attention_fn
    with call.inject(attention_fn=attend):
      out = call(*args, **kwargs)
    seen.append(call.module.attention_fn is before)
    return out

  held = backbone(model, X)
  tuned = jpeft.attach(model, jpeft.at('', jpeft.Call('inject', apply)), held, X)
  out = tuned.apply({}, held, X)
  np.testing.assert_allclose(
    out, np.broadcast_to(held['params']['out']['bias'], out.shape), atol=1e-6
  )
  assert seen == [True] and model.attention_fn is nn.dot_product_attention


def test_modules_of_a_rules_own_are_no_part_of_the_model():
  model, seen = Blocks(1), []
  own = nn.Dense(WIDTH, name='fc')

  def beside(t, call, x):
    y, _ = call(x)
    with call.outside():
      return y + own.apply({'params': t}, x), None

  init = lambda key, site, arrays: own.init(key, jnp.zeros(WIDTH))['params']
  around = jpeft.at('block_0', jpeft.Call('beside', beside, init))
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.chain(around, spy('.*fc', seen.append)), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  out = tuned.apply(theta, held, X)
  np.testing.assert_allclose(
    out, plain(model, held, X) + X @ theta['beside']['block_0']['kernel'], atol=1e-6
  )
  assert [call.site.path for call in seen] == ['block_0/fc']


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_draws_its_own_key(name):
  model = MODELS[name]()
  held = backbone(model)

  def noise(t, call, x, *args):
    key = call.rng('noise')
    out = call(x, *args)
    call.tap(n=jnp.zeros(()) if key is None else jax.random.uniform(key))
    return out

  def read(t, call, x):
    call(x)
    return jnp.concatenate([t['n'].reshape(-1) for t in call.taps().values()])

  tuned = jpeft.attach(
    model,
    jpeft.chain(
      jpeft.at(BLOCKS, jpeft.Call('read', noise, taps=True)),
      jpeft.at('', jpeft.Call('read', read, taps=True)),
    ),
    held,
    X,
  )
  draw = jax.jit(lambda key: tuned.apply({}, held, X, rngs={'dropout': key}))
  one, again, other = (np.asarray(draw(jax.random.key(i))) for i in (0, 0, 1))
  assert len({*one.tolist(), *other.tolist()}) == 6
  np.testing.assert_array_equal(one, again)
  assert not np.any(tuned.apply({}, held, X))


@pytest.mark.parametrize('name', MODELS)
def test_a_second_run_as_a_pure_function_records_nothing_again(name):
  def record(t, call, x, *args):
    call.tap(x=x)
    return call(x, *args)

  def twice(t, call, x, *args):
    fn, arrays = call.pure()
    out = call(x, *args)
    fn(arrays, 0 * x, *args)
    return out

  def read(t, call, x):
    call(x)
    return jnp.concatenate([t['x'].reshape(-1, *x.shape) for t in call.taps().values()])

  model = MODELS[name]()
  held = backbone(model)
  reads = jpeft.at('', jpeft.Call('read', read, taps=True))
  records = jpeft.at(BLOCKS, jpeft.Call('read', record, taps=True))
  chains = [jpeft.chain(records, reads), jpeft.chain(records, wrapped(twice), reads)]
  np.testing.assert_array_equal(
    *(jpeft.attach(model, m, held, X).apply({}, held, X) for m in chains)
  )


@pytest.mark.parametrize('name', MODELS)
def test_another_purpose_gets_another_key(name):
  model = MODELS[name]()
  held = backbone(model)

  def noise(t, call, x, *args):
    keys = [call.rng(what) for what in ('one', 'two', 'one')]
    out = call(x, *args)
    draws = [jnp.zeros(()) if key is None else jax.random.uniform(key) for key in keys]
    call.aux(draws=jnp.stack(draws))
    return out

  tuned = jpeft.attach(model, wrapped(noise), held, X)
  _, aux = jax.jit(lambda key: tuned.apply({}, held, X, rngs={'dropout': key}, aux=True))(
    jax.random.key(0)
  )
  draws = np.asarray(aux['draws'])
  assert draws.shape == (3, 3)
  np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
  assert len(np.unique(draws[:, :2])) == 6


@pytest.mark.parametrize('name', MODELS)
def test_root_is_the_outermost_call_whatever_lies_between(name):
  """A trained number at the model reaches the layers inside of blocks that have a rule too."""
  model = MODELS[name]()
  held = backbone(model)

  def root(t, call, *args):
    assert call.root is None and call.outer is None
    call.local['gain'] = t['gain']
    return call(*args)

  def block(t, call, *args):
    call.local['place'] = 'block'
    assert call.root is call.outer
    return call(*args)

  def layer(t, call, *args):
    assert call.outer == {'place': 'block'}
    return call.root['gain'] * call(*args)

  method = jpeft.chain(
    jpeft.at('', jpeft.Call('m', root, lambda key, site, arrays: {'gain': jnp.ones(())})),
    jpeft.at(BLOCKS, jpeft.Call('m', block)),
    jpeft.at('.*/fc', jpeft.Call('m', layer)),
  )
  tuned = jpeft.attach(model, method, held, X)
  out = jax.jit(lambda gain: tuned.apply({'m': {'': {'gain': gain}}}, held, X))

  def scaled(path, x):
    return 1.7 * x if 'fc' in jax.tree_util.keystr(path) else x

  want = plain(model, jax.tree_util.tree_map_with_path(scaled, held), X)
  np.testing.assert_allclose(out(1.7), want, atol=1e-5)

  def loss(gain):
    return jnp.square(out(gain)).sum()

  numeric = (loss(1.01) - loss(0.99)) / 0.02
  np.testing.assert_allclose(jax.grad(loss)(1.0), numeric, rtol=1e-2)
