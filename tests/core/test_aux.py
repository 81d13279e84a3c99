"""What stands beside the output: arrays of rules, new state of theta, losses of a method."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.core.small import (
  BLOCKS,
  WIDTH,
  Blocks,
  X,
  backbone,
  gain,
  plain,
  stacks,
)
from tests.fixtures import leaf_paths

MODELS = stacks(12)


def gated(name='gated'):
  """A gate a row of each block, which is also given beside the output, and the sum of its input."""

  def init(key, site, arrays):
    return {'w': 0.1 * jax.random.normal(key, (WIDTH,))}

  def apply(t, call, x):
    gate = jax.nn.sigmoid(x @ t['w'])  # [B]
    call.aux(gate=gate, total=jnp.sum(x))
    leaves, tree = jax.tree.flatten(call(x))
    leaves[0] = x + gate[:, None] * (leaves[0] - x)
    return jax.tree.unflatten(tree, leaves)

  return jpeft.at(BLOCKS, jpeft.Call(name, apply, init))


@pytest.mark.parametrize('name', MODELS)
def test_arrays_of_all_layers_come_stacked_in_their_order(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, gated(), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)

  @jax.jit
  def run(theta, held):
    return tuned.apply(theta, held, X, aux=True)

  out, aux = run(theta, held)
  chex.assert_shape(aux['gate'], (12, len(X)))
  np.testing.assert_allclose(out, jax.jit(tuned.apply)(theta, held, X), rtol=1e-4)
  # The first layer reads X, and the stream grows from there.
  np.testing.assert_allclose(aux['total'][0], X.sum(), rtol=1e-5)
  assert len(np.unique(aux['total'])) == 12

  grads = jax.grad(lambda theta: jnp.sum(tuned.apply(theta, held, X, aux=True)[1]['gate']))(theta)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_unrolled_and_scanned_layers_give_the_same():
  scanned, unrolled = Blocks(3, 'scan'), Blocks(3)
  held = backbone(scanned)
  layers = {
    f'block_{i}': jax.tree.map(lambda x, i=i: x[i], held['params']['blocks']) for i in range(3)
  }
  auxes = []
  for model, params in ((scanned, held), (unrolled, {'params': layers})):
    tuned = jpeft.attach(model, gated(), params, X)
    theta = jax.tree.map(jnp.ones_like, tuned.init(jax.random.key(0), params))
    auxes.append(tuned.apply(theta, params, X, aux=True)[1])
  chex.assert_trees_all_close(*auxes, rtol=1e-5)


def test_without_asking_nothing_is_recorded():
  model = Blocks(3, 'scan')
  held = backbone(model)
  tuned = jpeft.attach(model, gated(), held, X)
  theta = tuned.init(jax.random.key(0), held)
  plain_jaxpr = str(jax.make_jaxpr(tuned.apply)(theta, held, X))
  tuned.apply(theta, held, X, aux=True)
  assert str(jax.make_jaxpr(tuned.apply)(theta, held, X)) == plain_jaxpr
  quiet = jpeft.attach(model, gain('.*/fc'), held, X)
  assert quiet.apply(quiet.init(jax.random.key(0), held), held, X, aux=True)[1] == {}


def test_layers_of_unlike_shapes_are_refused():
  def apply(t, call, x):
    call.aux(x=x if call.site.path == '' else x[0])
    return call(x)

  model = Blocks()
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.at('|block_0', jpeft.Call('odd', apply)), held, X)
  with pytest.raises(ValueError, match=r"aux 'x' has layers of the shapes \[\(4, 6\), \(6,\)\]"):
    tuned.apply({}, held, X, aux=True)


def normalised(name='normalised', momentum=0.5):
  """Batch normalisation of what each block adds, with running means (as in an adapter with BN)."""

  def init(key, site, arrays):
    return {'mean': jnp.zeros(WIDTH), 'count': jnp.zeros((), jnp.int32), 'scale': jnp.ones(WIDTH)}

  def apply(t, call, x):
    leaves, tree = jax.tree.flatten(call(x))
    added = leaves[0] - x
    mean = t['mean']
    if call.training:
      mean = added.mean(0)
      running = momentum * t['mean'] + (1 - momentum) * mean
      call.write(mean=running, count=t['count'] + 1)
    leaves[0] = x + t['scale'] * (added - mean)
    return jax.tree.unflatten(tree, leaves)

  return jpeft.at(BLOCKS, jpeft.Call(name, apply, init, fixed=('mean',), exact=('mean',)))


@pytest.mark.parametrize('name', MODELS)
def test_running_means_are_written_back(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, normalised(), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)

  @jax.jit
  def step(theta, held):
    trained, state = tuned.split(theta)

    def loss(trained):
      theta = tuned.join(trained, state)
      out, aux = tuned.apply(theta, held, X, aux=True, rngs={'dropout': jax.random.key(0)})
      return jnp.sum(out**2), (out, aux)

    grads, (out, aux) = jax.grad(loss, has_aux=True)(trained)
    return out, tuned.write_back(tuned.join(trained, state), aux), grads

  out, after, grads = step(theta, held)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, theta)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  flat = leaf_paths(after)
  assert all((x == 1).all() for path, x in flat.items() if path.endswith('count'))
  means = [x for path, x in flat.items() if path.endswith('mean')]
  assert all(np.abs(x).max(-1).min() > 0 for x in means)
  # Evaluation reads the running means, and writes nothing.
  evaluated = tuned.apply(after, held, X)
  assert np.abs(evaluated - out).max() > 1e-3
  assert tuned.apply(after, held, X, aux=True)[1] == {}
  _, again, _ = step(after, held)
  assert all((x == 2).all() for path, x in leaf_paths(again).items() if path.endswith('count'))


@pytest.mark.parametrize(
  ('entries', 'message'),
  (
    ({'u': 1.0}, "writer at 'block_0' writes 'u', which is trained: name it in fixed="),
    ({'n': jnp.ones(2)}, r"writes 'n' of shape \(2,\), and theta has \(\) there"),
    ({'m': 1.0}, "writes 'm', and its theta has n, u"),
  ),
)
def test_what_cannot_be_written(entries, message):
  def apply(t, call, x):
    call.write(**entries)
    return call(x)

  init = lambda key, site, arrays: {'u': jnp.ones(()), 'n': jnp.zeros((), int)}
  model = Blocks()
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.at('block_0', jpeft.Call('writer', apply, init)), held, X)
  with pytest.raises(ValueError, match=message):
    tuned.apply(tuned.init(jax.random.key(0), held), held, X)


def two_passes(rate=0.3, name='gated'):
  """Gates that a second pass ignores; the loss has both passes and keeps the gates at a rate."""
  ((pattern, rule),) = gated(name)

  def root(t, call, *args, complete=False):
    call.local['complete'] = complete
    return call(*args)

  def apply(t, call, x):
    if call.outer['complete']:
      return call(x)
    return rule.apply(t, call, x)

  def minimised(loss, run):
    out, aux = run()
    full, _ = run(complete=True)
    return loss(out) + loss(full) + (aux['gate'].mean() - rate) ** 2, out

  return jpeft.chain(
    jpeft.at('', jpeft.Call(name, root, takes=('complete',), loss=minimised)),
    jpeft.at(pattern, jpeft.Call(name, apply, rule.init)),
  )


@pytest.mark.parametrize('name', MODELS)
def test_a_loss_of_two_passes(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, two_passes(), held, X)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  loss = lambda out: jnp.mean(out**2)

  @jax.jit
  def objective(theta, held):
    return tuned.objective(lambda **takes: tuned.apply(theta, held, X, aux=True, **takes), loss)

  value, out, _ = objective(theta, held)
  gates = tuned.apply(theta, held, X, aux=True)[1]['gate']
  # Outputs are of order 1; some are nearly 0, and compiled sums round otherwise.
  near = dict(rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out, tuned.apply(theta, held, X), **near)
  complete = tuned.apply(theta, held, X, complete=True)
  np.testing.assert_allclose(complete, plain(model, held, X), **near)
  wanted = loss(out) + loss(plain(model, held, X)) + (gates.mean() - 0.3) ** 2
  np.testing.assert_allclose(value, wanted, rtol=1e-5)


def test_the_objective_of_other_methods_is_the_loss():
  model = Blocks()
  held = backbone(model)
  tuned = jpeft.attach(model, normalised(), held, X)
  theta = tuned.init(jax.random.key(0), held)
  rngs = {'dropout': jax.random.key(0)}
  assert not tuned.has_loss
  run = lambda: tuned.apply(theta, held, X, rngs=rngs, aux=True)
  value, out, aux = tuned.objective(run, jnp.sum)
  np.testing.assert_allclose(value, jnp.sum(out), rtol=1e-6)
  after = tuned.write_back(theta, aux)
  assert after['normalised']['block_0']['count'] == 1


def test_two_losses_are_refused():
  model = Blocks()
  held = backbone(model)
  with pytest.raises(ValueError, match='one and two each say what training minimises'):
    jpeft.attach(model, jpeft.chain(two_passes(name='one'), two_passes(name='two')), held, X)
