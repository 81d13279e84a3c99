"""Training and evaluation: whose flag decides, where keys come from, what state comes back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests.core.small import WIDTH, X, backbone, gain, low_rank, noisy, plain, spy
from tests.fixtures import leaves_equal

KEY = {'dropout': jax.random.key(3)}


class Train(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dropout(0.5)(nn.Dense(WIDTH, name='fc')(x), deterministic=not train)


class Deterministic(nn.Module):
  deterministic: bool | None = None

  @nn.compact
  def __call__(self, x, deterministic=None):
    flag = nn.merge_param('deterministic', self.deterministic, deterministic)
    return nn.Dropout(0.5)(nn.Dense(WIDTH, name='fc')(x), deterministic=flag)


class Plain(nn.Module):
  @nn.compact
  def __call__(self, x, **kwargs):
    return nn.Dense(WIDTH, name='fc')(x)


class Nnx(nnx.Module):
  def __init__(self, dropout=True):
    self.fc = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    self.bn = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    if dropout:
      self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))

  def __call__(self, x):
    x = self.bn(self.fc(x))
    return self.dropout(x) if hasattr(self, 'dropout') else x


def in_mode(training):
  model = Nnx()
  model.train() if training else model.eval()
  return model


CASES = {
  'train=False': (Train(), {'train': False}, False, False),
  'train=False, key': (Train(), {'train': False, 'rngs': KEY}, False, False),
  'default, key': (Train(), {'rngs': KEY}, False, False),
  'train=True': (Train(), {'train': True, 'rngs': KEY}, True, True),
  'train=True by position': (Train(), {'args': (True,), 'rngs': KEY}, True, True),
  'deterministic=True, key': (Deterministic(), {'deterministic': True, 'rngs': KEY}, False, False),
  'deterministic=False': (Deterministic(), {'deterministic': False, 'rngs': KEY}, True, True),
  'deterministic field': (Deterministic(True), {'rngs': KEY}, False, False),
  'not deterministic field': (Deterministic(False), {'rngs': KEY}, True, True),
  'no flag': (Plain(), {}, False, False),
  'no flag, key': (Plain(), {'rngs': KEY}, True, True),
  'flag among **kwargs': (Plain(), {'train': False, 'rngs': KEY}, False, False),
  'nnx eval': (in_mode(False), {}, False, False),
  'nnx eval, key': (in_mode(False), {'rngs': KEY}, False, False),
  'nnx train': (in_mode(True), {}, True, False),
  'nnx train, key': (in_mode(True), {'rngs': KEY}, True, True),
}


def attached(model, method):
  if isinstance(model, nnx.Module):
    held = nnx.state(model)
    return jpeft.attach(model, method, held, X), held
  kwargs = {'deterministic': True} if model == Deterministic() else {}
  held = backbone(model, X, **kwargs)
  return jpeft.attach(model, method, held, X, rngs=KEY, **kwargs), held


@pytest.mark.parametrize('case', CASES)
def test_who_decides_about_training(case):
  model, kwargs, training, keyed = CASES[case]
  seen = []
  tuned, held = attached(
    model,
    spy(
      'fc', lambda call: seen.append((call.training, call.rng('spy', optional=True) is not None))
    ),
  )
  args = kwargs.get('args', ())
  out = tuned.apply({}, held, X, *args, **{k: v for k, v in kwargs.items() if k != 'args'})
  assert seen == [(training, keyed)]
  if isinstance(model, Train | Deterministic):
    assert np.any(out == 0) == training


@pytest.mark.parametrize(
  'method',
  [spy('fc', lambda call: call.rng('noise')), low_rank('fc', requires='input in training')],
  ids=['call', 'weight'],
)
def test_training_without_a_key(method):
  tuned, held = attached(in_mode(True), method)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  tuned.apply(theta, held, X, rngs=KEY)
  with pytest.raises(ValueError, match=r"at 'fc' needs a random key: call tuned.apply\(..., rngs="):
    tuned.apply(theta, held, X)
  attached(in_mode(False), method)[0].apply(theta, held, X)


def test_nnx_keys_seed_the_models_streams_and_leave_the_model_alone():
  model = in_mode(True)
  tuned, held = attached(model, gain('fc'))
  theta, before = (
    jax.jit(tuned.init)(jax.random.key(0), held),
    jax.tree.map(jnp.copy, nnx.state(model)),
  )
  one, again, other = (
    tuned.apply(theta, held, X, rngs={'dropout': jax.random.key(i)}) for i in (0, 0, 1)
  )
  assert leaves_equal(one, again) and not leaves_equal(one, other)
  own = [tuned.apply(theta, held, X) for _ in range(2)]
  assert leaves_equal(*own) and leaves_equal(own[0], plain(model, held, X))
  assert leaves_equal(nnx.state(model), before)


def test_nnx_statistics_come_back():
  model = Nnx(dropout=False)
  model.train()
  tuned, held = attached(model, low_rank('fc'))
  out, state = tuned.apply(tuned.init(jax.random.key(0), held), held, X, mutable=nnx.BatchStat)
  copy = nnx.merge(nnx.graphdef(model), held, copy=True)
  np.testing.assert_allclose(out, copy(X), atol=1e-6)
  want = nnx.state(copy, nnx.BatchStat)
  jax.tree.map(
    lambda s, w: np.testing.assert_allclose(s, w, atol=1e-6), nnx.as_pure(state), nnx.as_pure(want)
  )
  assert not np.allclose(state['bn']['mean'].get_value(), held['bn']['mean'].get_value())
  theta = noisy(tuned.init(jax.random.key(0), held))
  moved, other = tuned.apply(theta, held, X, mutable=nnx.BatchStat)
  assert not np.allclose(other['bn']['mean'].get_value(), state['bn']['mean'].get_value())


def test_nnx_everything_written_comes_back():
  tuned, held = attached(in_mode(True), gain('fc'))
  _, state = tuned.apply(tuned.init(jax.random.key(0), held), held, X, mutable=True)
  assert set(state) == {'bn', 'dropout'} and set(state['bn']) == {'mean', 'var'}
  assert int(state['dropout']['rngs']['count'].get_value()) == 1


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(WIDTH, name='fc')(x)
    self.sow('intermediates', 'x', x)
    return nn.BatchNorm(use_running_average=not train, name='bn')(x)


@pytest.mark.parametrize('taps', [False, True])
def test_linen_statistics_come_back(taps):
  model = Normed()
  held = {
    k: v for k, v in jax.jit(model.init)(jax.random.key(0), X).items() if k != 'intermediates'
  }
  recorded = spy('fc', lambda call: call.tap(a=jnp.ones(())), taps=True)
  tuned = jpeft.attach(model, jpeft.chain(low_rank('fc'), *([recorded] if taps else [])), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  want, stats = model.apply(held, X, train=True, mutable=['batch_stats'])
  out, state = tuned.apply(theta, held, X, train=True, mutable=['batch_stats'])
  assert set(state) == {'batch_stats'} and leaves_equal((out, state), (want, stats))
  assert leaves_equal(tuned.apply(theta, held, X, train=True, mutable='batch_stats'), (out, state))
  assert leaves_equal(tuned.apply(theta, held, X), model.apply(held, X))
  _, both = tuned.apply(theta, held, X, mutable=['intermediates'])
  assert set(both) == {'intermediates'}
  assert leaves_equal(
    tuned.apply(theta, held, X, train=True, mutable=True)[1]['batch_stats'], stats['batch_stats']
  )
