"""A pass over training examples before training: what is found, stored, put back, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jpeft
from jpeft.core import Examples, Pass, bounds, early_updates

X = np.arange(24, dtype='float32').reshape(8, 3)
Y = np.arange(8) % 2


class Two(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(2, name='b')(nn.Dense(3, name='a')(x))


MODEL = Two()
HELD = MODEL.init(jax.random.key(0), X)


def mean_shift(targets='a|b', name='shift', seen=None):
  """Adds a trained vector to the mean input of a layer, which a pass finds."""

  def method(found=None):
    def init(key, site, arrays):
      width = site.input.shape[-1]
      mean = jnp.zeros(width) if found is None else jnp.asarray(found[site.path])
      return {'mean': mean, 'shift': jnp.zeros(width)}

    def apply(t, call, x, **kwargs):
      return call(x - t['mean'] + t['shift'], **kwargs)

    return jpeft.at(targets, jpeft.Call(name, apply, init, fixed=('mean',)))

  def record(t, call, x, **kwargs):
    call.tap(sum=x.sum(0))
    return call(x, **kwargs)

  def find(examples):
    sums, count = {}, 0
    for batch, taps in examples.tapped(jpeft.at(targets, jpeft.Call('sums', record))):
      count += len(batch.labels)
      for path, tap in taps.items():
        sums[path] = sums.get(path, 0) + tap['sum']
    if seen is not None:
      seen.append(count)
    return {path: x / count for path, x in sums.items()}

  preparation = jpeft.Preparation('finds means', find, method, str, bound='as large as ever')
  return jpeft.prepared_by(method(), preparation)


def test_it_finds_stores_and_puts_back():
  batches = [(X[:5], Y[:5]), (X[5:], Y[5:])]
  waiting = jpeft.chain(mean_shift(), jpeft.tune('b', name='head'))
  method = jpeft.prepare(waiting, MODEL, HELD, batches, train=False)
  found = jpeft.found_in(method)
  assert found.keys() == {'shift/a', 'shift/b'}
  np.testing.assert_allclose(found['shift/a'], X.mean(0))
  again = jpeft.with_found(waiting, found)
  for one in (method, again):
    assert one.names == ('shift', 'head')
    tuned = jpeft.attach(MODEL, one, HELD, X)
    theta = tuned.init(jax.random.key(0), HELD)
    np.testing.assert_allclose(theta['shift']['a']['mean'], X.mean(0))
  assert jpeft.prepare(again, MODEL, HELD, []) == again  # nothing is left to find


def test_each_pass_of_a_chain_sees_all_batches():
  seen = []
  both = jpeft.chain(mean_shift('a', seen=seen), mean_shift('b', 'other', seen=seen))
  method = jpeft.prepare(both, MODEL, HELD, iter([({'x': X}, Y)]))
  assert seen == [8, 8] and jpeft.found_in(method).keys() == {'shift/a', 'other/b'}


def test_what_waits_is_refused_and_has_shapes():
  waiting = mean_shift()
  with pytest.raises(ValueError, match=r'shift finds means in a pass .*jpeft.prepare\(method'):
    jpeft.attach(MODEL, waiting, HELD, X)
  stand_in = jpeft.stand_in(waiting)
  assert jpeft.attach(MODEL, stand_in, HELD, X).shapes['shift'].keys() == {'a', 'b'}
  assert bounds(stand_in) == ['as large as ever'] and not bounds(waiting)
  with pytest.raises(ValueError, match='shift: nothing was found for it; there are other/a'):
    jpeft.with_found(waiting, {'other/a': X})


@pytest.mark.parametrize(
  'batches, why', [([], 'there is none'), ([X], r'must be \(inputs, labels\), not ndarray')]
)
def test_batches_that_cannot_be(batches, why):
  with pytest.raises(ValueError, match=why):
    jpeft.prepare(mean_shift(), MODEL, HELD, batches)


def test_patterns_are_checked_before_the_pass():
  def batches():
    yield X, Y
    raise AssertionError('read')

  with pytest.raises(ValueError, match='no site matches'):
    jpeft.prepare(mean_shift('c'), MODEL, HELD, batches())


def test_the_loss_leaves_out_rows_that_fill_up():
  mask = np.array([1, 1, 1, 0, 0, 0, 0, 0], 'float32')
  batch = Examples((X,), Y, mask=mask)
  own = Pass(MODEL, HELD, [batch])
  tuned = own.attached(jpeft.tune('a'))
  theta = tuned.init(jax.random.key(0), HELD)
  arrays = own.arrays_of(batch)
  masked = own.loss(tuned, theta, HELD, arrays, Y, mask)
  logits = jax.nn.log_softmax(MODEL.apply(HELD, X[:3]))
  np.testing.assert_allclose(masked, -logits[np.arange(3), Y[:3]].mean(), rtol=1e-5)
  whole = Pass(MODEL, HELD, [batch], loss=lambda out, labels: out.sum())
  with pytest.raises(ValueError, match='loss must give that of each label'):
    whole.loss(tuned, theta, HELD, arrays, Y, mask)


def test_updates_before_training_are_as_many_as_asked_for():
  tuned = jpeft.attach(MODEL, jpeft.tune('a'), HELD, X)
  theta = tuned.init(jax.random.key(0), HELD)
  batches = [Examples((X,), Y)] * 2
  made = early_updates(
    Pass(MODEL, HELD, batches), tuned, theta, optax.sgd(0.1), steps=3, penalty=lambda theta: 0.0
  )
  with pytest.raises(ValueError, match='tune: its pass before .* had 2 batches for 3 updates'):
    list(made)
