"""Entries of theta by name, and state that is not trained."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jpeft
from jpeft.core.entries import cast, names_entry, unused_name
from jpeft.models.llama import Llama
from jpeft.training import optim, step
from tests.core.small import Blocks, NnxBlocks, X, backbone, low_rank, plain
from tests.fixtures import leaf_paths
from tests.kept import residuals


def rows_in_place(targets, count=3, name='rows'):
  """Trains some rows of each kernel in place: integers say which (as PaCA does)."""

  def init(key, w):
    chosen = jax.random.permutation(key, w.shape[0])[:count]
    return {'rows': chosen, 'p': w[chosen], 'on': jnp.ones((), bool)}

  def weight(t, w):
    return jnp.where(t['on'], w.at[t['rows']].set(t['p']), w)

  return jpeft.at(targets, jpeft.matrix(name, init, weight))


MODELS = [
  Blocks(),
  Blocks(stack='scan'),
  Blocks(stack='scan remat'),
  NnxBlocks(),
  NnxBlocks(stack='scan'),
]


@pytest.mark.parametrize('model', MODELS, ids=lambda m: f'{type(m).__name__} {m.stack}')
def test_integers_and_booleans_are_state(model):
  held = backbone(model)
  tuned = jpeft.attach(model, rows_in_place('.*fc'), held, X)
  theta = tuned.init(jax.random.key(0), held)
  np.testing.assert_allclose(tuned.apply(theta, held, X), plain(model, held, X), rtol=1e-5)

  trained, state = tuned.split(theta)
  assert {path.rpartition('/')[2] for path in leaf_paths(trained)} == {'p'}
  assert {path.rpartition('/')[2] for path in leaf_paths(state)} == {'rows', 'on'}
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, tuned.join(trained, state), theta))
  assert jpeft.summary(tuned).trainable == jpeft.count(trained) == 3 * 3 * 6

  @jax.jit
  def gradient(trained):
    return jax.grad(lambda p: jnp.sum(tuned.apply(tuned.join(p, state), held, X) ** 2))(trained)

  grads = gradient(trained)
  assert jax.tree.structure(grads) == jax.tree.structure(trained)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  assert bool(jpeft.check(tuned, held, X)), str(jpeft.check(tuned, held, X))


def test_the_gradient_of_rows_is_that_of_the_kernel():
  model = Blocks(stack='scan')
  held = backbone(model)
  tuned = jpeft.attach(model, rows_in_place('.*fc'), held, X)
  full = jpeft.attach(model, jpeft.tune('.*fc', 'kernel'), held, X)
  loss = lambda tuned, theta: jnp.sum(tuned.apply(theta, held, X) ** 2)
  theta = tuned.init(jax.random.key(0), held)
  trained, state = tuned.split(theta)
  rows = jax.grad(lambda p: loss(tuned, tuned.join(p, state)))(trained)['rows']['blocks/fc'][
    'kernel'
  ]
  dense = jax.grad(lambda t: loss(full, t))(full.init(jax.random.key(0), held))
  dense = dense['tune']['blocks/fc']['kernel']
  chosen = theta['rows']['blocks/fc']['kernel']['rows']
  np.testing.assert_allclose(rows['p'], jnp.take_along_axis(dense, chosen[..., None], 1), rtol=1e-5)


def test_a_training_step_leaves_state_alone():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, images, deterministic=True):
      return nn.Dense(3, name='head')(images.reshape(len(images), -1))

  batch = {'image': np.ones((4, 2, 2, 3), np.float32), 'label': np.arange(4) % 3}
  model = Net()
  held = model.init(jax.random.key(0), batch['image'])
  tuned = jpeft.attach(model, rows_in_place('head'), held, batch['image'])
  tx = optim.optimizer(tuned, tuned.shapes, lambda _: 0.1, weight_decay=0.1, clip_norm=1.0)
  for accumulate in (1, 2):
    state = step.initial_state(tuned, tx, held, 0)
    # Moments of what is trained, and the counter of Adam.
    assert sum(x.size for x in jax.tree.leaves(state['optimizer']) if x.ndim) == 2 * 3 * 3
    fn = step.train_step(tuned, step.Forward(tuned, True), tx, 0, accumulate=accumulate)
    new, _ = jax.jit(fn)(state, held, batch)
    before, after = leaf_paths(state['theta']), leaf_paths(new['theta'])
    moved = {path.rpartition('/')[2] for path in before if np.any(before[path] != after[path])}
    assert moved == {'p'}
    chex.assert_trees_all_equal_dtypes(new['theta'], state['theta'])


class Bare(nn.Module):
  """A product by a parameter of a name that a method uses for an entry."""

  array: str

  @nn.compact
  def __call__(self, x):
    return x @ self.param(self.array, nn.initializers.normal(), (6, 6))


def test_an_array_called_as_a_fixed_entry_does_not_fix_the_others():
  model = Bare('a')
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.lora_fa(2, targets=''), held, X)
  assert leaf_paths(tuned.trainable(tuned.shapes)) == {'lora_fa//a/a': False, 'lora_fa//a/b': True}


def test_a_scheduled_gate_does_not_fix_the_gate_of_a_side_block():
  model = Llama(vocab=50, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=64)
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens)
  tuned = jpeft.attach(model, jpeft.lst(reduction=4, gate='linear'), held, tokens)
  free = leaf_paths(tuned.trainable(tuned.shapes))
  fixed = {path for path, is_trained in free.items() if not is_trained}
  assert fixed and all(path.endswith('/gate') for path in fixed)
  kernels = {path for path in free if '/gate/' in path}
  assert kernels and all(free[path] for path in kernels)


@pytest.mark.parametrize('field', ('fixed', 'exact'))
def test_a_name_that_means_nothing_is_refused(field):
  model = Blocks()
  held = backbone(model)
  message = f"low: {field}='\\*/c' names no entry of its theta; there are kernel/a, kernel/b"
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, low_rank('.*/fc', **{field: ('c',)}), held, X)


def test_names_of_entries():
  assert names_entry('gate', ('gate',))
  assert names_entry('mlp', ('mlp', 'gate', 'kernel'))
  assert names_entry('*/a', ('kernel', 'a'))
  assert not names_entry('gate', ('mlp', 'gate', 'kernel'))
  assert not names_entry('*/a', ('a',))
  assert unused_name(('a', 'b/*'), [{'a': 1}, {'b': {'c': 1}}]) is None
  assert unused_name(('a', 'c'), [{'a': 1}, {'b': {'c': 1}}]) == 'c'


def test_cast_leaves_exact_entries_and_integers():
  t = {'kernel': {'m': jnp.ones(2), 'b': jnp.ones(2), 'n': jnp.ones(2, int)}}
  found = jax.tree.map(lambda x: x.dtype.name, cast(t, jnp.bfloat16, ('*/m',)))
  assert found == {'kernel': {'m': 'float32', 'b': 'bfloat16', 'n': 'int32'}}


def test_a_call_gets_exact_entries_as_stored():
  seen = {}

  def apply(t, call, x):
    seen.update({name: x.dtype.name for name, x in t.items()})
    return call(x) * t['s'].astype(x.dtype)

  model = Blocks()
  held = backbone(model)
  init = lambda key, site, arrays: {'s': jnp.ones(()), 'r': jnp.ones(())}
  rule = jpeft.Call('exact', apply, init, exact=('s',))
  x = X.astype(jnp.bfloat16)
  tuned = jpeft.attach(model, jpeft.at('block_0/fc', rule), held, x)
  tuned.apply(tuned.init(jax.random.key(0), held), held, x)
  assert seen == {'s': 'float32', 'r': 'bfloat16'}


def test_freeze_takes_a_function_of_the_tree():
  model = Blocks()
  held = backbone(model)
  tuned = jpeft.attach(model, low_rank('.*/fc', fixed=('a',)), held, X)
  theta = tuned.init(jax.random.key(0), held)
  tx = jpeft.freeze(optax.sgd(1.0), tuned.trainable)
  for tree in (theta, tuned.split(theta)[0]):
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(ones, tx.init(tree), tree)
    assert {p[-1]: float(u.max()) for p, u in leaf_paths(updates).items() if np.any(u)} == {
      'b': -1.0
    }


def rows_by_columns(targets, count=2, name='rows'):
  """Trained rows of each kernel, through the columns of the input that they are multiplied by."""

  def init(key, w):
    chosen = jax.random.permutation(key, w.shape[0])[:count]
    return {'rows': chosen, 'p': w[chosen]}

  def weight(t, w):
    return w.at[t['rows']].set(t['p'])

  def dot(t, x, y, w, key):
    frozen = jax.lax.stop_gradient(w()[t['rows']])
    return y + x.columns(t['rows']) @ (t['p'] - frozen)

  return jpeft.at(targets, jpeft.matrix(name, init, weight, dot))


class Kinds(nn.Module):
  """A dense layer, one of several axes, an einsum and a convolution."""

  @nn.compact
  def __call__(self, x):  # [B, 8, 6]
    x = nn.Conv(6, (3,), name='conv')(x)
    x = nn.DenseGeneral((2, 4), name='split')(x)  # [B, 8, 2, 4]
    x = nn.DenseGeneral(6, axis=(-2, -1), name='join')(x)
    x = nn.Einsum((6, 6), 'bnd,df->bnf', name='einsum')(x)
    return nn.Dense(3, name='dense')(x)


def test_columns_of_the_input_are_what_rows_of_the_kernel_multiply():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6)), jnp.float32)
  model = Kinds()
  held = backbone(model, x)
  tuned = jpeft.attach(model, rows_by_columns('.*'), held, x)
  assert len(tuned.rules) == 5
  # Start, merge, gradient, and dot against weight.
  found = jpeft.check(tuned, held, x)
  assert found, str(found)


def test_the_backward_pass_keeps_the_chosen_columns_alone():
  class One(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(7, name='dense')(x)

  x = jnp.ones((5, 64))
  held = backbone(One(), x)
  tuned = jpeft.attach(One(), rows_by_columns('dense', 3), held, x)
  trained, state = tuned.split(tuned.init(jax.random.key(0), held))

  def run(trained, x):
    return tuned.apply(tuned.join(trained, state), held, x)

  kept = [value.shape for value in residuals(run, trained, x, weights=held)]
  assert (5, 3) in kept and (5, 64) not in kept
