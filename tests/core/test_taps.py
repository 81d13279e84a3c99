"""What rules record inside arrives where it is read, in the order of the layers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core.paths import natural
from tests.core.small import WIDTH, Block, Blocks, NnxBlocks, X, backbone, gain, plain, spy

MODELS = {
  'linen': lambda: Blocks(12),
  'linen scan': lambda: Blocks(12, 'scan'),
  'linen scan remat': lambda: Blocks(12, 'scan remat'),
  'nnx': lambda: NnxBlocks(12),
  'nnx scan': lambda: NnxBlocks(12, 'scan'),
}


def recorded(blocks='blocks?[_/]?\\d*', root=''):
  """The root returns what its blocks recorded beside its output, as a list: jit sorts dicts."""

  def record(t, call, x):
    call.tap(x=x, mean=x.mean(-1))
    return call(x)

  def read(t, call, *args):
    out = call(*args)
    return out, list(call.taps().values()), tuple(map(natural, call.taps()))

  return jpeft.chain(
    jpeft.at(blocks, jpeft.Call('reads', record, taps=True)),
    jpeft.at(root, jpeft.Call('reads', read, taps=True)),
  )


def kernels(model, held):
  """The kernels and biases of the twelve layers, stacked."""
  flat = jax.tree.leaves(held)  # bias, kernel, bias, kernel, ... by the names of the blocks
  if len(flat) == 2:
    return flat[::-1]
  names = sorted(range(12), key=str) if isinstance(model, nn.Module) else list(range(12))
  order = np.argsort(names)
  return [np.stack(flat[i::2])[order] for i in (1, 0)]


@pytest.mark.parametrize('name', MODELS)
def test_taps_come_in_the_order_of_twelve_layers(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, recorded(), held, X)
  assert jax.jit(tuned.init)(jax.random.key(0), held) == {}
  paths = []

  def run(held):
    out, taps, names = tuned.apply({}, held, X)
    paths[:] = names
    return out, taps

  out, taps = jax.jit(run)(held)
  np.testing.assert_allclose(out, plain(model, held, X), atol=1e-5)
  x, want = np.asarray(X), []
  for kernel, bias in zip(*kernels(model, held), strict=True):
    want.append(x)
    x = x + np.tanh(x @ kernel + bias)
  np.testing.assert_allclose(out, x, atol=1e-4)
  layers = lambda n: taps[0][n] if 'scan' in name else np.stack([t[n] for t in taps])
  np.testing.assert_allclose(layers('x'), np.stack(want), atol=1e-4)
  np.testing.assert_allclose(layers('mean'), np.stack(want).mean(-1), atol=1e-4)
  assert paths == sorted(paths) and len(paths) == (1 if 'scan' in name else 12)


@pytest.mark.parametrize('name', ['linen', 'nnx scan'])
def test_gradients_flow_through_taps(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.chain(gain('.*/fc'), recorded()), held, X)
  loss = lambda theta: sum(jnp.sum(t['x'] ** 2) for t in tuned.apply(theta, held, X)[1])
  grads = jax.jit(jax.grad(loss))(tuned.init(jax.random.key(0), held))['gain']
  grads = [g['kernel']['l'] for _, g in sorted(grads.items(), key=lambda item: natural(item[0]))]
  moved = np.any(np.reshape(grads, (12, WIDTH)), 1)
  assert moved.tolist() == 11 * [True] + [False]  # what leaves the last block enters no other


class Twice(nn.Module):
  @nn.compact
  def __call__(self, x):
    block = Block(name='block')
    return block(block(x)[0])[0]


class NnxTwice(nnx.Module):
  def __init__(self):
    self.block = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.block(self.block(x))


@pytest.mark.parametrize('make', [Twice, NnxTwice])
def test_a_tap_in_a_module_that_is_called_twice(make):
  model = make()
  held = backbone(model)
  tuned = jpeft.attach(model, recorded('block'), held, X)
  with pytest.raises(
    ValueError, match='is called more than once, so what a tap records there is ambiguous'
  ):
    tuned.apply({}, held, X)


def test_a_tap_under_a_scan_that_broadcasts_params():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      scan = nn.scan(Block, variable_broadcast='params', split_rngs={'params': False}, length=3)
      return scan(name='block')(x)[0]

  held = backbone(Shared())
  tuned = jpeft.attach(Shared(), recorded('block'), held, X)
  with pytest.raises(ValueError, match='data dependency on the scan body|broadcast over a scan'):
    tuned.apply({}, held, X)


def test_nothing_is_left_in_the_users_model():
  model = NnxBlocks(2)
  held, before = backbone(model), nnx.graphdef(model)
  tuned = jpeft.attach(model, recorded(), held, X)
  tuned.apply({}, held, X)
  assert nnx.graphdef(model) == before and not hasattr(model.blocks[0], 'jpeft_tap')
  spied = []
  jpeft.attach(model, spy('blocks/0', spied.append), held, X).apply({}, held, X)
  assert [type(call.module).__name__ for call in spied] == ['NnxBlock']
  assert type(model.blocks[0]).__call__ is not type(spied[0].module).__call__


@pytest.mark.parametrize('name', MODELS)
def test_two_methods_may_record_at_one_site_and_read_their_own(name):
  model = MODELS[name]()
  held = backbone(model)

  def method(name, factor):
    def record(t, call, x):
      call.tap(x=factor * x)
      return call(x)

    def read(t, call, *args):
      out = call(*args)
      total = sum(jnp.sum(t['x']) for t in call.taps().values())
      inner = out[1] if isinstance(out, tuple) else ()
      return out[0] if inner else out, (total, *inner)

    return jpeft.chain(
      jpeft.at('blocks?[_/]?\\d*', jpeft.Call(name, record, taps=True)),
      jpeft.at('', jpeft.Call(name, read, taps=True)),
    )

  tuned = jpeft.attach(model, jpeft.chain(method('one', 1), method('two', 2)), held, X)
  _, (two, one) = tuned.apply({}, held, X)
  np.testing.assert_allclose(2 * one, two, rtol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_taps_need_no_flag(name):
  model = MODELS[name]()
  held = backbone(model)
  outs = []
  for flag in (False, True):
    rules = [(at, dataclasses.replace(rule, taps=flag)) for at, rule in recorded()]
    tuned = jpeft.attach(model, jpeft.Method(rules), held, X)
    out, taps, _ = jax.jit(lambda held, tuned=tuned: tuned.apply({}, held, X)[:2] + (0,))(held)
    outs.append((out, taps))
  jax.tree.map(np.testing.assert_array_equal, *outs)


def test_reading_what_another_method_recorded_is_refused():
  model = Blocks()
  held = backbone(model)
  record = spy('block_0', lambda call: call.tap(x=X), name='writer')

  def read(t, call, x):
    call(x)
    return call.taps()

  tuned = jpeft.attach(
    model, jpeft.chain(record, jpeft.at('', jpeft.Call('reader', read))), held, X
  )
  message = "reader at '' reads taps, and no rule of that name .*; rules that have: writer"
  with pytest.raises(ValueError, match=message):
    tuned.apply({}, held, X)
