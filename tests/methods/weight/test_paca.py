"""PaCA: the worked example, what is kept, what changes, counts, and 4-bit kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.weight.paca import paca
from tests.fixtures import noisy
from tests.kept import residuals
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

# As in torch: W [out, in].
W = np.array([[1, 2, 3], [4, 5, 6.0]])
X = jnp.array([[1.0, 0, -1], [2, 1, 0]])
RNG = np.random.default_rng(0)
LLAMA_7B = full_size.llama(32, 4096, 11008)
# Fewer tokens are multiplied by the change beside the kernel, more by a changed kernel.
TOKENS = pytest.mark.parametrize('tokens', [5, 70])


def dense(w=W, x=X, **hyperparameters):
  """(tuned, variables) of one Dense layer with torch's weight."""
  model = nn.Dense(w.shape[0], use_bias=False)
  variables = {'params': {'kernel': jnp.asarray(w.T, jnp.float32)}}
  return jpeft.attach(model, paca(targets='', **hyperparameters), variables, x), variables


def at_root(rows, d):
  return {'paca': {'': {'kernel': {'rows': jnp.asarray(rows), 'd': jnp.asarray(d, jnp.float32)}}}}


def of_root(theta):
  return theta['paca']['']['kernel']


def test_the_worked_example():
  tuned, variables = dense(rank=2, alpha=4)
  theta = at_root([2, 0], np.zeros((2, 2)))
  p = variables['params']['kernel'][jnp.array([2, 0])] / 2 + of_root(theta)['d']
  np.testing.assert_array_equal(p.T, [[1.5, 0.5], [3, 2]])
  out, pull = jax.vjp(
    lambda d, x: tuned.apply(at_root([2, 0], d), variables, x), of_root(theta)['d'], X
  )
  np.testing.assert_allclose(out, X @ W.T)
  d_p, d_x = pull(jnp.eye(2))
  np.testing.assert_allclose(d_p.T, [[-2, 2], [0, 4]])
  np.testing.assert_allclose(d_p.T / 2, [[-1, 1], [0, 2]])  # of the rows themselves
  np.testing.assert_allclose(d_x, [[1, 2, 3], [4, 5, 6]])


def test_the_start_is_the_backbone_bit_for_bit():
  model, variables = vit()
  tuned = jpeft.attach(model, paca(), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  np.testing.assert_array_equal(
    tuned.apply(theta, variables, IMAGES), model.apply(variables, IMAGES)
  )


def test_training_changes_the_chosen_rows_alone():
  model, variables = vit()
  tuned = jpeft.attach(model, paca(rank=3), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  trained, held = tuned.split(theta)
  tx = optax.adamw(1e-2, weight_decay=0.1)
  state = tx.init(trained)
  for _ in range(3):
    grads = jax.grad(
      lambda p, held=held: jnp.sum(jnp.sin(tuned.apply(tuned.join(p, held), variables, IMAGES)))
    )(trained)
    updates, state = tx.update(grads, state, trained)
    trained = optax.apply_updates(trained, updates)
  theta = tuned.join(trained, held)
  merged = tuned.merge(theta, variables)
  fc1 = ('encoder', 'block_1', 'mlp', 'fc1', 'kernel')
  old, new = variables['params'], merged['params']
  for key in fc1:
    old, new = old[key], new[key]
  rows = theta['paca']['encoder/block_1/mlp/fc1']['kernel']['rows']
  changed = np.any(old != new, axis=1)
  np.testing.assert_array_equal(np.flatnonzero(changed), rows)
  bias = lambda tree: tree['params']['encoder']['block_1']['mlp']['fc1']['bias']
  np.testing.assert_array_equal(bias(variables), bias(merged))


@TOKENS
def test_the_backward_pass_keeps_the_chosen_columns_of_the_input(tokens):
  x = jnp.asarray(RNG.normal(size=(tokens, 12)), jnp.float32)
  tuned, variables = dense(RNG.normal(size=(9, 12)), x, rank=4)
  theta = tuned.init(jax.random.key(0), variables)
  trained, held = tuned.split(theta)
  kept = residuals(
    lambda p, *rest: tuned.apply(tuned.join(p, rest[1]), rest[0], rest[2]),
    trained,
    variables,
    held,
    x,
    weights=(variables, trained, held),
    given=False,
  )
  assert [leaf.shape for leaf in kept if leaf.dtype == x.dtype] == [(tokens, 4)]
  given = residuals(
    lambda p, *rest: tuned.apply(tuned.join(p, rest[1]), rest[0], rest[2]),
    trained,
    variables,
    held,
    x,
  )
  assert x.shape not in [leaf.shape for leaf in given]


@TOKENS
def test_the_gradient_is_that_of_the_kernels_rows(tokens):
  x = jnp.asarray(RNG.normal(size=(tokens, 12)), jnp.float32)
  tuned, variables = dense(RNG.normal(size=(9, 12)), x, rank=4, alpha=4)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  rows = of_root(theta)['rows']
  grad = jax.grad(lambda d: jnp.sum(jnp.sin(tuned.apply(at_root(rows, d), variables, x))))(
    of_root(theta)['d']
  )
  kernel = tuned.merge(theta, variables)['params']['kernel']
  whole = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(kernel)
  np.testing.assert_allclose(grad, whole[rows], atol=1e-5)
  d_x = jax.grad(lambda x: jnp.sum(jnp.sin(tuned.apply(theta, variables, x))))(x)
  expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ kernel)))(x)
  np.testing.assert_allclose(d_x, expected, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_merging_is_exact_in_the_dtype_of_the_kernels(dtype):
  model, variables = vit()
  variables = jax.tree.map(lambda x: x.astype(dtype), variables)
  tuned = jpeft.attach(model, paca(rank=3, alpha=3), variables, IMAGES)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  merged = tuned.merge(theta, variables)
  for path in ('query', 'value'):
    t = theta['paca'][f'encoder/block_0/attention/{path}']['kernel']
    old, new = (
      tree['params']['encoder']['block_0']['attention'][path]['kernel'].reshape(32, 32)
      for tree in (variables, merged)
    )
    expected = old.at[t['rows']].set(old[t['rows']] + t['d'].astype(dtype))
    np.testing.assert_array_equal(new, expected)
  if dtype == jnp.float32:
    out = tuned.apply(theta, variables, IMAGES)
    np.testing.assert_allclose(model.apply(merged, IMAGES), out, atol=1e-5)


@pytest.mark.parametrize('rank, expected', [(8, 10_878_976), (16, 21_757_952), (64, 87_031_808)])
def test_counts_on_llama_7b(rank, expected):
  tuned = jpeft.attach(LLAMA_7B.model, paca(rank), *LLAMA_7B.shapes)
  assert jpeft.summary(tuned).trainable == expected


def test_a_4_bit_layer_with_all_rows_is_trained_as_a_whole():
  """QPaCA: as full fine-tuning of that layer that starts at the decoded kernel."""
  x = jnp.asarray(RNG.normal(size=(7, 64)), jnp.float32)
  _, variables = dense(RNG.normal(size=(16, 64)), x, rank=64)
  model = nn.Dense(16, use_bias=False)
  small = jpeft.quantize(model, jpeft.nf4(), variables, x, targets='')
  tuned = jpeft.attach(model, paca(64, 64, targets=''), small, x)
  theta = tuned.init(jax.random.key(0), small)
  kernel = tuned.merge(theta, small)['params']['kernel']
  assert np.abs(kernel - variables['params']['kernel']).max() > 1e-2
  trained, held = tuned.split(theta)
  for _ in range(3):
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(tuned.apply(tuned.join(p, held), small, x))))(
      trained
    )
    trained = jax.tree.map(lambda p, g: p - 0.01 * g, trained, grads)
    kernel = kernel - 0.01 * jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(kernel)
  out = tuned.apply(tuned.join(trained, held), small, x)
  np.testing.assert_allclose(out, x @ kernel, atol=1e-4)


def test_a_rule_before_it_gets_its_gradient():
  x = jnp.asarray(RNG.normal(size=(70, 12)), jnp.float32)
  model = nn.Dense(9)
  variables = model.init(jax.random.key(0), x)
  method = jpeft.chain(jpeft.lora(2, targets=''), paca(4, targets=''))
  tuned = jpeft.attach(model, method, variables, x)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  merged = tuned.merge(theta, variables)
  out = tuned.apply(theta, variables, x)
  np.testing.assert_allclose(out, model.apply(merged, x), atol=1e-5)
  trained, held = tuned.split(theta)

  def loss(trained, apply):
    return jnp.sum(jnp.sin(apply(tuned.join(trained, held))))

  found = jax.grad(loss)(trained, lambda t: tuned.apply(t, variables, x))
  expected = jax.grad(loss)(trained, lambda t: model.apply(tuned.merge(t, variables), x))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_rows_are_drawn_or_chosen_by_their_norms():
  w = np.diag([3.0, 1, 4, 2, 5])
  x = jnp.ones((1, 5))
  for choose, expected in (('largest', [2, 4]), ('smallest', [1, 3])):
    tuned, variables = dense(w, x, rank=2, choose=choose)
    rows = of_root(tuned.init(jax.random.key(0), variables))['rows']
    np.testing.assert_array_equal(rows, expected)
  tuned, variables = dense(w, x, rank=2)
  drawn = set()
  for seed in range(8):
    rows = of_root(tuned.init(jax.random.key(seed), variables))['rows']
    drawn.add(tuple(rows.tolist()))
  assert len(drawn) > 3 and all(len(set(rows)) == 2 for rows in drawn)


def test_a_convolution_trains_places_of_its_window():
  model = nn.Conv(4, (3, 3))
  x = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)
  variables = model.init(jax.random.key(0), x)
  tuned = jpeft.attach(model, paca(5, targets=''), variables, x)
  theta = noisy(tuned.init(jax.random.key(0), variables), 0.3)
  merged = tuned.merge(theta, variables)
  changed = np.any(merged['params']['kernel'] != variables['params']['kernel'], axis=-1)
  assert changed.sum() == 5
  out = tuned.apply(theta, variables, x)
  np.testing.assert_allclose(out, model.apply(merged, x), atol=1e-5)


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rank': 0}, 'paca: rank=0 must be a whole number, at least 1'),
    ({'alpha': 0}, 'paca: alpha=0 must be greater than 0'),
    ({'choose': 'best'}, "paca: choose='best' is none of 'random', 'largest', 'smallest'"),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    paca(**hyperparameters)


def test_more_rows_than_a_kernel_has_are_refused():
  with pytest.raises(
    ValueError, match=r'paca: rank=4 rows are to be chosen from a kernel \[3, 2\]'
  ):
    dense(rank=4)
