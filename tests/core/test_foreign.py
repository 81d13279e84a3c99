"""Models as others write them: lifts, joined and masked kernels, shared arrays, caches."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jpeft
from tests.core.small import adapter, low_rank, noisy, plain
from tests.fixtures import leaf_paths

INIT = nn.initializers.lecun_normal()
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)


def checked(model, method, *args, start=None, **kwargs):
  """The method attached; it keeps the contract on the model."""
  if isinstance(model, nnx.Module):
    held = noisy(nnx.state(model))
  else:
    held = noisy(model.init(jax.random.key(0), *args, **kwargs))
  tuned = jpeft.attach(model, method, held, *args, **kwargs)
  found = jpeft.check(tuned, held, *args, start=1e-5 if start is None else start, **kwargs)
  assert found, str(found)
  return tuned, held


def adapted(tuned, name='low'):
  """Paths of the arrays that a method adapts."""
  return sorted(f'{site}/{array}' for site, t in tuned.shapes[name].items() for array in t)


# ---- Lifted functions.


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='head')(nn.RNN(nn.LSTMCell(8), name='rnn')(x))


class Lifted(nn.Module):
  """One Dense layer under a lift of a named function."""

  lift: str

  @nn.compact
  def __call__(self, x):
    cell = nn.Dense(6, name='cell')
    if self.lift == 'scan':

      def body(cell, carry, x):
        carry = jnp.tanh(cell(carry) + x)
        return carry, carry

      options = {'variable_broadcast': 'params', 'split_rngs': {'params': False}}
      return nn.scan(body, **options, in_axes=1, out_axes=1)(cell, x[:, 0], x)[1]
    if self.lift == 'vmap':

      def one(cell, x):
        return cell(x)

      options = {'variable_axes': {'params': None}, 'split_rngs': {'params': False}}
      return nn.vmap(one, **options, in_axes=1, out_axes=1)(cell, x)

    def block(cell, x):
      return jnp.tanh(cell(x))

    return {'remat': nn.remat, 'jit': nn.jit}[self.lift](block)(cell, x)


@pytest.mark.parametrize('lift', ('scan', 'remat', 'vmap', 'jit'))
def test_a_lifted_function_is_no_method_of_a_module(lift):
  tuned, _ = checked(Lifted(lift), low_rank('.*'), X)
  assert adapted(tuned) == ['cell/kernel']


def test_a_recurrent_network():
  tuned, _ = checked(Recurrent(), low_rank('.*'), X)
  cell = [f'LSTMCell_0/{side}{gate}/kernel' for side in 'hi' for gate in 'fgio']
  assert adapted(tuned) == sorted([*cell, 'head/kernel'])


@pytest.mark.parametrize('wrap', (nn.WeightNorm, nn.SpectralNorm))
def test_a_layer_whose_kernel_is_normalised(wrap):
  class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = wrap(nn.Dense(4, name='fc'))
      if wrap is nn.SpectralNorm:
        return layer(x, update_stats=False)
      return layer(x)

  tuned, _ = checked(Normed(), low_rank('fc'), X)
  assert adapted(tuned) == ['fc/kernel']


def test_a_parameter_whose_name_has_a_slash():
  class Slash(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name='fc')(x) * self.param('a/b', nn.initializers.ones, (4,))

  tuned, held = checked(Slash(), jpeft.chain(low_rank('fc'), jpeft.tune('')), X)
  merged = tuned.merge(noisy(tuned.init(jax.random.key(0), held)), held)
  assert set(merged['params']) == set(held['params'])


@pytest.mark.parametrize('used_before', (False, True))
def test_jit_inside_a_model_hides_nothing(used_before):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x + nn.Dense(6, name='fc')(x)

  class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
      for i in range(2):
        x = Block(name=f'block_{i}')(x)
      return nn.Dense(3, name='head')(x)

  model = Jitted()
  held = model.init(jax.random.key(0), X)
  if used_before:
    model.apply(held, X)
  for _ in range(2):
    tuned = jpeft.attach(model, low_rank('block_.*/fc'), held, X)
    assert [(site.kind, site.fields) for _, site in tuned.rules] == [
      ('Dense', ('dot_general',))
    ] * 2
    checked(model, adapter(r'block_\d'), X)


class Branches(nn.Module):
  """Two layers, one in each branch."""

  kind: str

  @nn.compact
  def __call__(self, x, flag):
    a = nn.Dense(6, name='a')
    b = nn.Dense(6, name='b')
    head = nn.Dense(3, name='head')
    if self.is_initializing():
      return head(a(x) + b(x))
    if self.kind == 'cond':
      x = nn.cond(flag, lambda m, x: a(x), lambda m, x: b(x), self, x)
    else:
      x = nn.switch(flag.astype(int), [lambda m, x: b(x), lambda m, x: a(x)], self, x)
    return head(checkpoint_name(x, 'branch'))


@pytest.mark.parametrize('kind', ('cond', 'switch'))
@pytest.mark.parametrize('targets', ('a|b', 'a'))
def test_rules_inside_branches(kind, targets):
  model = Branches(kind)
  for method in (low_rank(targets), adapter(targets), jpeft.tune(targets)):
    held = noisy(model.init(jax.random.key(0), X, jnp.array(True)))
    tuned = jpeft.attach(model, method, held, X, jnp.array(True))
    theta = noisy(tuned.init(jax.random.key(1), held))
    moved = []
    for flag in (True, False):
      out = jax.jit(tuned.apply)(theta, held, X, jnp.array(flag))
      moved.append(float(np.abs(out - model.apply(held, X, jnp.array(flag))).max()))
    assert moved[0] > 1e-3 and (moved[1] > 1e-3 if 'b' in targets else moved[1] == 0)


def test_recording_inside_a_branch_is_told():
  model = Branches('cond')
  held = model.init(jax.random.key(0), X, jnp.array(True))
  rule = jpeft.Call('seen', lambda t, call, x: (call.aux(x=x), call(x))[1])
  tuned = jpeft.attach(model, jpeft.at('a', rule), held, X, jnp.array(True))
  with pytest.raises(jax.errors.UnexpectedTracerError) as raised:
    tuned.apply({}, held, X, jnp.array(True), aux=True)
  assert 'inside a branch or a loop of the model' in ' '.join(raised.value.__notes__)


# ---- Kernels that are changed or joined before the product.


class JoinedQKV(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernels = [self.param(name, INIT, (6, 6)) for name in 'qkv']
    return x @ jnp.concatenate(kernels, -1)


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernels = jnp.stack([self.param(name, INIT, (6, 6)) for name in 'kv'])
    return jnp.einsum('bnd,sdf->sbnf', x, kernels)


class Standardised(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param('kernel', INIT, (6, 6))
    w = (w - w.mean(0)) / (w.std(0) + 1e-5)
    return nn.Dense(3, name='head')(x @ w)


class Masked(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param('kernel', INIT, (6, 6)) * jnp.tri(6)
    return nn.Dense(3, name='head')(x @ w)


class Rounded(nn.Module):
  """Fake quantisation: rounded in the forward pass, as it is in the backward pass."""

  @nn.compact
  def __call__(self, x):
    w = self.param('kernel', INIT, (6, 6))
    w = w + jax.lax.stop_gradient(jnp.round(w * 64) / 64 - w)
    return x @ w


class Scaled(nn.Module):
  """A Dense layer whose own product reads another kernel than the one that is stored."""

  @nn.compact
  def __call__(self, x):
    double = lambda x, w, *args, **kwargs: jax.lax.dot_general(x, 2 * w, *args, **kwargs)
    return nn.Dense(3, name='head', dot_general=double)(x)


@pytest.mark.parametrize(
  ('model', 'kernels'),
  (
    (JoinedQKV(), ['/k', '/q', '/v']),
    (Stacked(), ['/k', '/v']),
    (Standardised(), ['/kernel', 'head/kernel']),
    (Masked(), ['/kernel', 'head/kernel']),
    (Scaled(), ['head/kernel']),
  ),
  ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else '',
)
def test_every_array_that_reaches_a_product_is_a_kernel(model, kernels):
  tuned, _ = checked(model, low_rank('.*'), X)
  assert adapted(tuned) == kernels


def test_a_rounded_kernel_is_a_kernel():
  held = Rounded().init(jax.random.key(0), X)
  assert adapted(jpeft.attach(Rounded(), low_rank('.*'), held, X)) == ['/kernel']


class MaskedConv(nn.Module):
  @nn.compact
  def __call__(self, x):
    mask = jnp.ones((3, 3, 3, 4)).at[2].set(0)
    return nn.Conv(4, (3, 3), mask=mask, name='conv')(x)


class Transposed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True, name='up')(x)


@pytest.mark.parametrize('model', (MaskedConv(), Transposed()), ids=lambda m: type(m).__name__)
def test_convolutions_of_changed_kernels(model):
  images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
  tuned, _ = checked(model, low_rank('.*'), images)
  (kernel,) = adapted(tuned)
  ((_, site),) = tuned.rules
  leaf = site.leaves['kernel']
  # What the layer sums over: the window and the channels that it reads.
  assert leaf.use == 'conv_general_dilated' and leaf.fan_in == 3 * 3 * 3 and leaf.fan_out == 4
  assert not leaf.direct and kernel.endswith('/kernel')


# ---- Arrays that are used twice.


class TiedHead(nn.Module):
  """A head that reads the table from `variables`."""

  @nn.compact
  def __call__(self, tokens):
    table = nn.Embed(11, 6, name='wte')
    x = nn.Dense(6, name='fc')(table(tokens))
    return x @ table.variables['params']['embedding'].T


class TiedKernel(nn.Module):
  """An autoencoder whose decoder reads the encoder's kernel."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(3, name='fc')
    return layer(x) @ layer.variables['params']['kernel'].T


TOKENS = jnp.array([[1, 2, 3, 10], [4, 5, 6, 0]])


@pytest.mark.parametrize(
  'method',
  (jpeft.full(), jpeft.tune('.*'), jpeft.lora(2, targets='wte'), jpeft.lora(2, targets='fc')),
)
def test_a_tied_table_is_one_array(method):
  checked(TiedHead(), method, TOKENS)


def test_a_kernel_that_another_layer_reads_is_adapted_for_both():
  tuned, _ = checked(TiedKernel(), low_rank('fc'), X)
  assert adapted(tuned) == ['fc/kernel']


class PlainArray(nnx.Module):
  def __init__(self, rngs):
    self.scale = np.full(6, 2, np.float32)
    self.fc = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    return self.fc(x * self.scale)


class Head(nnx.Module):
  def __init__(self, table):
    self.table = table

  def __call__(self, x):
    return x @ self.table[...].T


class NnxTied(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(11, 6, rngs=rngs)
    self.fc = nnx.Linear(6, 6, rngs=rngs)
    self.out = Head(self.embed.embedding)

  def __call__(self, tokens):
    return self.out(self.fc(self.embed(tokens)))


class SharedKernel(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(6, 6, rngs=rngs)
    self.b = nnx.Linear(6, 6, rngs=rngs)
    self.b.kernel = self.a.kernel

  def __call__(self, x):
    return self.b(jnp.tanh(self.a(x)))


def test_plain_arrays_of_nnx_are_constants():
  model = PlainArray(nnx.Rngs(0))
  tuned, held = checked(model, low_rank('fc'), X)
  assert adapted(tuned) == ['fc/kernel'] and jpeft.summary(tuned).total >= 6 * 6 + 6
  # Those of the backbone that is given, not those of the model.
  other = jax.tree.map(lambda x: x, held)
  other['scale'] = held['scale'] * 3
  theta = tuned.init(jax.random.key(0), other)
  np.testing.assert_allclose(tuned.apply(theta, other, X), plain(model, other, X), rtol=1e-5)
  assert np.abs(plain(model, other, X) - plain(model, held, X)).max() > 0.1


@pytest.mark.parametrize('targets', ('fc', 'embed'))
def test_one_variable_in_two_modules(targets):
  checked(NnxTied(nnx.Rngs(0)), jpeft.lora(2, targets=targets), TOKENS)


def test_a_shared_kernel_is_adapted_once_and_for_both():
  tuned, held = checked(SharedKernel(nnx.Rngs(0)), low_rank('a'), X)
  assert adapted(tuned) == ['a/kernel']
  assert jpeft.count(tuned.backbone) == 6 * 6 + 2 * 6
  message = "low: 'b' names 'b', whose 'b/kernel' is the array 'a/kernel': name 'a' instead"
  with pytest.raises(ValueError, match=message):
    jpeft.attach(SharedKernel(nnx.Rngs(0)), low_rank('b'), held, X)


# ---- The stream among several outputs.


class CacheFirst(nn.Module):
  @nn.compact
  def __call__(self, x, cache):
    y = nn.Dense(6, name='fc2')(nn.gelu(nn.Dense(16, name='fc1')(x)))
    return None if cache is None else {'k': cache['k'] + y}, x + y


class OneReturnsADict(nn.Module):
  @nn.compact
  def __call__(self, x, cache):
    y = nn.Dense(6, name='fc2')(nn.gelu(nn.Dense(16, name='fc1')(x)))
    beside = jnp.zeros(3) if cache is None else cache['k'] + y
    return {'extra': beside, 'stream': x + y}


class OfBlocks(nn.Module):
  block: type

  @nn.compact
  def __call__(self, x, cache):
    for i in range(2):
      out = self.block(name=f'block_{i}')(x, cache)
      x = out['stream'] if isinstance(out, dict) else out[1]
    return nn.Dense(3, name='head')(x)


@pytest.mark.parametrize('block', (CacheFirst, OneReturnsADict))
@pytest.mark.parametrize('seen', (None, 'cache'))
def test_an_adapter_acts_on_the_stream(block, seen):
  model = OfBlocks(block)
  cache = {'k': jnp.zeros(X.shape)}
  held = noisy(model.init(jax.random.key(0), X, None))
  tuned = jpeft.attach(
    model, jpeft.pfeiffer(4, targets=r'block_\d'), held, X, cache if seen else None
  )
  theta = noisy(tuned.init(jax.random.key(0), held))
  without = tuned.apply(theta, held, X, None)
  assert np.abs(without - model.apply(held, X, None)).max() > 0.1
  np.testing.assert_allclose(tuned.apply(theta, held, X, cache), without, rtol=1e-5)
  chex.assert_trees_all_equal_shapes(leaf_paths(theta), leaf_paths(tuned.shapes))
