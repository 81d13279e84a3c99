"""What is not trained does not move, and nothing that an optimizer computes sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests.core.small import Blocks, X, backbone, gain, low_rank, noisy
from tests.fixtures import leaf_paths, leaves_equal


def setup(stack=''):
  """A model of three blocks under a rule with fixed entries and one without."""
  model = Blocks(stack=stack)
  held = backbone(model)
  fixed = low_rank('.*/fc', fixed=('a',))
  tuned = jpeft.attach(model, jpeft.chain(fixed, gain('.*/fc')), held, X)
  return tuned, noisy(tuned.init(jax.random.key(0), held)), held


def gradients(tuned, tree):
  return jax.grad(lambda tree: jnp.sum(tuned.apply(*jpeft.split(tree), X) ** 2))(tree)


@pytest.mark.parametrize('stack', ['', 'scan'])
def test_fixed_entries_are_named_and_get_no_gradient(stack):
  tuned, theta, held = setup(stack)
  free = leaf_paths(tuned.trainable(theta))
  assert {p.rpartition('/')[2]: v for p, v in free.items()} == {'a': False, 'b': True, 'l': True}
  grads = leaf_paths(gradients(tuned, jpeft.join(theta, held))['theta'])
  assert {p for p, g in grads.items() if not np.any(g)} == {p for p, v in free.items() if not v}
  paths = {p for p in grads if p.endswith('/a')}
  assert len(paths) == (1 if stack else 3)


@pytest.mark.parametrize('stack', ['', 'scan'])
def test_weight_decay_moves_neither_fixed_entries_nor_the_backbone(stack):
  tuned, theta, held = setup(stack)
  tree = jpeft.join(theta, held)
  mask = jpeft.mask(tree, tuned.trainable(theta))
  tx = jpeft.freeze(optax.adamw(0.1, weight_decay=0.5), mask)
  state = tx.init(tree)
  updates, _ = tx.update(gradients(tuned, tree), state, tree)
  after = optax.apply_updates(tree, updates)
  kept = {p for p, v in leaf_paths(mask).items() if not v}
  before, after = leaf_paths(tree), leaf_paths(after)
  assert {p for p in before if leaves_equal(before[p], after[p])} == kept
  assert kept == {p for p in before if p.startswith('backbone/') or p.endswith('/a')}


def test_a_global_norm_is_that_of_what_is_trained():
  tuned, theta, held = setup()
  tree = jpeft.join(theta, held)
  grads = jax.tree.map(jnp.ones_like, tree)
  grads['backbone'] = jax.tree.map(lambda x: 1e6 * x, grads['backbone'])
  trained = sum(x.size for p, x in leaf_paths(theta).items() if not p.endswith('/a'))
  mask = jpeft.mask(tree, tuned.trainable(theta))
  tx = jpeft.freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), mask)
  updates, _ = tx.update(grads, tx.init(tree), tree)
  np.testing.assert_allclose(
    leaf_paths(updates)['theta/gain/block_0/fc/kernel/l'], -(trained**-0.5), rtol=1e-6
  )
  assert not any(np.any(x) for x in jax.tree.leaves(updates['backbone']))


def test_state_holds_nothing_of_the_backbone():
  tuned, theta, held = setup()
  tree = jpeft.join(theta, held)
  state = jpeft.freeze(optax.adam(0.1), jpeft.mask(tree)).init(tree)
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * jpeft.count(theta)


def test_join_split_and_mask():
  tuned, theta, held = setup()
  tree = jpeft.join(theta, held)
  assert jpeft.split(tree) == (theta, held)
  mask = jpeft.mask(tree)
  assert jax.tree.structure(mask) == jax.tree.structure(tree)
  assert jax.tree.all(mask['theta']) and not jax.tree.reduce(lambda a, b: a or b, mask['backbone'])
  assert jpeft.mask(tree, tuned.trainable(theta))['theta'] == tuned.trainable(theta)


def scheduled(targets):
  """Adds the step, and a random number of each layer, to a counter that is not trained."""
  init = lambda key, site, arrays: {'n': jnp.zeros(()), 'r': jnp.zeros(()), 'u': jnp.ones(())}

  def update(t, site, step, key):
    return {**t, 'n': t['n'] + step, 'r': jax.random.uniform(key)}

  return jpeft.at(
    targets,
    jpeft.Call(
      'counts', lambda t, call, x: call(x) * t['u'], init, fixed=('n', 'r'), update=update
    ),
  )


@pytest.mark.parametrize('stack', ['', 'scan'])
def test_updates_between_steps(stack):
  model = Blocks(stack=stack)
  held = backbone(model)
  assert not jpeft.attach(model, gain('.*/fc'), held, X).updates
  tuned = jpeft.attach(model, jpeft.chain(gain('.*/fc'), scheduled('.*/fc')), held, X)
  assert tuned.updates
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  after = jax.jit(tuned.update)(
    jax.jit(tuned.update)(theta, 2, jax.random.key(1)), 3, jax.random.key(2)
  )
  assert jax.eval_shape(lambda: after) == jax.eval_shape(lambda: theta)
  flat = leaf_paths(after)
  assert all((x == 5).all() for p, x in flat.items() if p.endswith('/n'))
  random = np.concatenate([np.ravel(x) for p, x in flat.items() if p.endswith('/r')])
  assert len(set(random.tolist())) == 3
  assert all(
    leaves_equal(x, leaf_paths(theta)[p]) for p, x in flat.items() if p[-2:] not in ('/n', '/r')
  )
  assert leaves_equal(theta, jax.jit(tuned.init)(jax.random.key(0), held))
