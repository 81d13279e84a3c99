"""Rules at one site act in the order of the chain, by whatever door, and merge to what they
computed.
"""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests.core.small import WIDTH, X, backbone, gain, low_rank, noisy, plain, shift, square

MODELS = {
  'linen': lambda: nn.Sequential([nn.Dense(5), nn.tanh]),
  'nnx': lambda: nnx.Sequential(nnx.Linear(WIDTH, 5, rngs=nnx.Rngs(0)), nnx.tanh),
}
MAKE = {
  'low': low_rank,
  'gain': gain,
  'square': square,
  'shift': shift,
  'low, boxed': lambda targets: low_rank(targets, dot=False),
  'square, boxed': lambda targets: square(targets, dot=False),
}
CHAINS = [
  *itertools.permutations(('low', 'gain', 'square')),
  *itertools.permutations(('low, boxed', 'gain', 'square')),
  *itertools.permutations(('low', 'gain', 'square, boxed')),
  *itertools.permutations(('shift', 'gain', 'low')),
]


def in_numpy(names, theta, kernel, bias):
  """The weights after a chain, Weights first; a shift acts on the bias too."""
  for name in sorted(names, key=lambda n: n == 'shift'):
    (t,) = theta[name.partition(',')[0]].values()
    t = t if name == 'shift' else t['kernel']
    t = jax.tree.map(np.asarray, t)
    if 'low' in name:
      kernel = kernel + t['a'] @ t['b']
    elif name == 'gain':
      kernel = kernel * t['l']
    elif 'square' in name:
      kernel = kernel + t['c'] * kernel @ kernel.T @ kernel
    else:
      kernel, bias = kernel * t['s'], bias * t['s'] + t['c']
  return kernel, bias


@pytest.mark.parametrize('names', CHAINS, ids=' > '.join)
@pytest.mark.parametrize('framework', MODELS)
def test_a_chain_is_the_composition_of_its_rules(framework, names):
  model = MODELS[framework]()
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.chain(*[MAKE[n]('layers[_/]0') for n in names]), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  weights = held['params']['layers_0'] if framework == 'linen' else held['layers'][0]
  read = lambda n: np.asarray(weights[n] if framework == 'linen' else weights[n].get_value())
  kernel, bias = in_numpy(names, theta, read('kernel'), read('bias'))
  want = np.tanh(np.asarray(X) @ kernel + bias)
  assert not np.allclose(want, plain(model, held, X), atol=0.1)
  np.testing.assert_allclose(tuned.apply(theta, held, X), want, atol=2e-6)
  np.testing.assert_allclose(plain(model, tuned.merge(theta, held), X), want, atol=2e-6)


def test_only_some_adapters_of_a_chain():
  model = MODELS['linen']()
  held = backbone(model)
  tuned = jpeft.attach(
    model, jpeft.chain(low_rank('layers_0'), gain('layers_0'), shift('layers_0')), held, X
  )
  theta = noisy(tuned.init(jax.random.key(0), held))
  some = tuned.only('gain', 'shift')
  kernel, bias = in_numpy(
    ('gain', 'shift'),
    theta,
    *(np.asarray(held['params']['layers_0'][n]) for n in ('kernel', 'bias')),
  )
  np.testing.assert_allclose(
    some.apply(theta, held, X), np.tanh(np.asarray(X) @ kernel + bias), atol=2e-6
  )
  assert set(some.init(jax.random.key(0), held)) == {'gain', 'shift'} and some.method.names == (
    'gain',
    'shift',
  )
  np.testing.assert_array_equal(tuned.only().apply(theta, held, X), plain(model, held, X))
  with pytest.raises(ValueError, match="no adapter is called 'gian'; there are low, gain, shift"):
    tuned.only('gian')
