"""Theta as matrices: every layer's kernel as it is multiplied, in stacks as one by one."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import optim
from jpeft.training import step
from tests.core.small import Blocks, X, adapter, backbone, gain, low_rank
from tests.fixtures import BACKBONES, EDGES, noisy


def attached(row, method):
  """A method on a backbone of the fixtures, and a random tree like its theta."""
  tuned = jpeft.attach(row.model, method, row.backbone, *row.args, **row.kwargs)
  return tuned, random_like(tuned.shapes)


def random_like(shapes, seed=0):
  """Normal floats; integers count up."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jnp.arange(np.prod(x.shape), dtype=x.dtype).reshape(x.shape)
    return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

  return jax.tree.map(leaf, shapes)


# ---- Folding.

ENCODER = 'Transformer/encoderblock'
HEADS = f'{ENCODER}/MultiHeadDotProductAttention_0'
KERNELS = {
  'DenseGeneral': ('linen_vit', f'{ENCODER}_0/MultiHeadDotProductAttention_0/query/kernel'),
  'DenseGeneral in a stack': ('linen_vit_scan', f'{HEADS}/query/kernel'),
  'DenseGeneral of two axes in': ('linen_vit_scan', f'{HEADS}/out/kernel'),
  'NNX in a stack': ('nnx_vit_scan', 'blocks/attention/out/kernel'),
  'Einsum in a stack': ('linen_gemma', 'layers/attn/q_einsum/w'),
  'Einsum with two kernels': ('linen_gemma', 'layers/mlp/gating_einsum'),
  'conv': ('linen_fused', 'stem/conv2/kernel'),
  'experts': ('linen_moe', '/wi'),
  'a stack of stacks': ('linen_nested_scan', 'stage/block/Dense_0/kernel'),
  'a stack on another axis': ('linen_scan_axis1', 'stack/block/Dense_1/kernel'),
}
FOLDS = {
  'DenseGeneral': lambda w: w.reshape(32, 4 * 8),
  'DenseGeneral in a stack': lambda w: w.reshape(2, 32, 4 * 8),
  'DenseGeneral of two axes in': lambda w: w.reshape(2, 4 * 8, 32),
  'NNX in a stack': lambda w: w.reshape(2, 4 * 8, 32),
  'Einsum in a stack': lambda w: w.transpose(0, 2, 1, 3).reshape(3, 32, 4 * 8),
  'Einsum with two kernels': lambda w: w.transpose(0, 2, 1, 3).reshape(3, 32, 2 * 64),
  'conv': lambda w: w.reshape(2 * 2 * 16, 32),
  'experts': lambda w: w,
  'a stack of stacks': lambda w: w,
  'a stack on another axis': lambda w: w,  # theta has its stack in front
}


@pytest.mark.parametrize('kind', KERNELS)
def test_a_kernel_is_the_matrix_that_its_layer_multiplies_by(kind):
  row, path = KERNELS[kind]
  backbone = BACKBONES[row] if row in BACKBONES else EDGES[row]
  tuned, theta = attached(backbone, jpeft.tune('.*'))
  matrices, rest = optim.fold(tuned, theta)
  site, _, array = path.rpartition('/')
  name = f'tune/{path}'.replace('//', '/')
  np.testing.assert_array_equal(matrices[name], FOLDS[kind](theta['tune'][site][array]))
  assert rest['tune'][site][array] is None
  assert all(x.ndim - len(tuned.sites[site].lengths) >= 2 for x in [matrices[name]])
  assert not any(name.endswith(('bias', 'scale', 'embedding', 'pos_embed')) for name in matrices)
  chex.assert_trees_all_equal(optim.unfold(tuned, matrices, rest), theta)


def shapes_of(tuned):
  matrices, _ = jax.eval_shape(lambda theta: optim.fold(tuned, theta), tuned.shapes)
  return {name: m.shape for name, m in matrices.items()}


def test_what_a_rule_has_for_one_matrix():
  method = jpeft.chain(low_rank('', dot=False), gain(''))  # a [E, fan_in, 2], b; l [E, fan_out]
  tuned, theta = attached(EDGES['linen_moe'], method)
  assert shapes_of(tuned) == {
    'low/wi/a': (4, 16, 2),
    'low/wi/b': (4, 2, 32),
    'low/wo/a': (4 * 32, 2),  # summed over the experts
    'low/wo/b': (2, 16),
  }
  # Of each kernel l is a vector, which weight decay spares.
  decayed = optim.decays(tuned)(theta)
  assert jax.tree.leaves(decayed['gain']) == [False] * 2
  assert jax.tree.leaves(decayed['low']) == [True] * 4


def test_stacks_chosen_layers_and_adapters():
  model = Blocks(4, 'scan')
  held = backbone(model)
  method = jpeft.chain(
    jpeft.in_layers(jpeft.tune('.*fc'), '1,3'), low_rank('.*fc'), adapter('blocks')
  )
  tuned = jpeft.attach(model, method, held, X)
  assert shapes_of(tuned) == {
    'tune/blocks/fc/kernel': (2, 6, 6),
    'low/blocks/fc/kernel/a': (4, 6, 2),
    'low/blocks/fc/kernel/b': (4, 2, 6),
    'adapter/blocks/down': (4, 6, 2),
    'adapter/blocks/up': (4, 2, 6),
  }


def test_integers_and_what_is_not_trained_stay_apart():
  def rows(key, w):
    return {'rows': jnp.zeros((2, 3), jnp.int32), 'p': w[:2]}

  rule = jpeft.matrix('rows', rows, lambda t, w: w.at[:2].set(t['p']))
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.at('.*fc', rule), held, X)
  theta = random_like(tuned.shapes)
  matrices, rest = optim.fold(tuned, theta)
  assert set(matrices) == {f'rows/block_{i}/fc/kernel/p' for i in range(2)}
  assert rest['rows']['block_0/fc']['kernel']['rows'].dtype == jnp.int32
  trained, held = tuned.split(theta)
  matrices, rest = optim.fold(tuned, trained)
  assert len(matrices) == 2 and jax.tree.leaves(rest) == []
  chex.assert_trees_all_equal(tuned.join(optim.unfold(tuned, matrices, rest), held), theta)


# ---- Transforms.


def galore(rank=2, every=2, b1=0.9, b2=0.999, eps=1e-6):
  """Adam on the gradient of one matrix, projected on its first left singular vectors."""

  def init(w):
    small = jnp.zeros((rank, w.shape[1]))
    return {'count': jnp.int32(0), 'p': jnp.zeros((w.shape[0], rank)), 'm': small, 'v': small}

  def update(g, state, w=None):
    t = state['count']

    def refreshed():
      return jnp.linalg.svd(g, full_matrices=False)[0][:, :rank]

    p = jax.lax.cond(t % every == 0, refreshed, lambda: state['p'])
    r = p.T @ g
    m = b1 * state['m'] + (1 - b1) * r
    v = b2 * state['v'] + (1 - b2) * r**2
    size = jnp.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
    return p @ (size * m / (jnp.sqrt(v) + eps)), {'count': t + 1, 'p': p, 'm': m, 'v': v}

  return optax.GradientTransformation(init, update)


TRANSFORMS = {
  'galore': galore,
  'muon': optax.contrib.scale_by_muon,
  'muon of all': lambda: optax.contrib.muon(1e-2),
  'adam': optax.scale_by_adam,
}
SCANS = {
  'linen': (lambda: BACKBONES['linen_vit'], lambda: BACKBONES['linen_vit_scan']),
  'nnx': (lambda: BACKBONES['nnx_vit'], lambda: BACKBONES['nnx_vit_scan']),
}


def updates_of(tuned, tx, seeds=(0, 1, 2), make=random_like):
  """The updates of some steps, compiled unless JAX is told otherwise."""
  theta = make(tuned.shapes, 9)
  state = jax.jit(tx.init)(theta)
  update = jax.jit(tx.update)
  found = []
  for seed in seeds:
    updates, state = update(make(tuned.shapes, seed), state, theta)
    found.append(updates)
  return found


def updates_of_both(framework, transform, method, seeds):
  """(updates of an unrolled model, its layers stacked, and of the scanned one) for each step."""
  one, other = (make() for make in SCANS[framework])
  unrolled, _ = attached(one, method)
  scanned, _ = attached(other, method)
  (name,) = scanned.shapes

  def stacked(theta):
    """theta of the unrolled model as that of the scanned one."""
    layers = {}
    for path, arrays in theta[name].items():
      in_stack = re.sub(r'(encoderblock|blocks)[_/]\d', r'\1', path)
      layers.setdefault(in_stack, []).append(arrays)
    joined = {}
    for path in scanned.shapes[name]:
      joined[path] = layers[path][0]
      if scanned.sites[path].axes:
        joined[path] = jax.tree.map(lambda *x: jnp.stack(x), *layers[path])
    return {name: joined}

  def tx_of(tuned):
    return optim.on_matrices(tuned, transform(), optax.scale_by_adam())

  one_by_one = updates_of(unrolled, tx_of(unrolled), seeds)
  at_once = updates_of(
    scanned, tx_of(scanned), seeds, lambda _, seed: stacked(random_like(unrolled.shapes, seed))
  )
  for a, b in zip(one_by_one, at_once, strict=True):
    assert min(np.abs(x).max() for x in jax.tree.leaves(b)) > 0
    yield stacked(a), b


@pytest.mark.parametrize('framework', SCANS)
@pytest.mark.parametrize('name', TRANSFORMS)
def test_a_stack_gets_the_updates_of_its_layers(name, framework):
  for a, b in updates_of_both(framework, TRANSFORMS[name], jpeft.full(), (0, 1, 2)):
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('framework', SCANS)
@pytest.mark.parametrize('name', TRANSFORMS)
def test_operation_by_operation_they_are_equal_to_the_bit(name, framework):
  # Compiled, sums of products are fused in ways that differ between programs.
  kernels = jpeft.tune('.*/(out|fc2|Dense_1)')
  with jax.disable_jit():
    for a, b in updates_of_both(framework, TRANSFORMS[name], kernels, (0, 1)):
      chex.assert_trees_all_equal(a, b)


@pytest.mark.parametrize('row', ('linen_gemma', 'linen_moe'))
def test_a_transform_of_single_numbers_is_the_same_without_the_view(row):
  backbone = BACKBONES[row] if row in BACKBONES else EDGES[row]
  tuned, _ = attached(backbone, jpeft.full())
  viewed = optim.on_matrices(tuned, optax.adamw(1e-2), optax.adamw(1e-2))
  for a, b in zip(updates_of(tuned, viewed), updates_of(tuned, optax.adamw(1e-2)), strict=True):
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_transform_of_matrices_against_a_loop_over_them():
  tuned, grads = attached(BACKBONES['linen_gemma'], jpeft.full())
  tx = optim.on_matrices(tuned, galore(), optax.identity())
  updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
  layer = grads['full']['layers/attn/q_einsum']['w'][1]  # [heads, d, size]
  g = layer.transpose(1, 0, 2).reshape(32, 32)
  wanted, _ = galore().update(g, galore().init(g))
  wanted = wanted.reshape(32, 4, 8).transpose(1, 0, 2)
  found = updates['full']['layers/attn/q_einsum']['w'][1]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
  moments = state.matrices['full/layers/mlp/gating_einsum']
  assert moments['m'].shape == (3, 2, 128) and moments['count'].tolist() == [1, 1, 1]
  scale = 'final_norm'
  np.testing.assert_array_equal(updates['full'][scale]['scale'], grads['full'][scale]['scale'])


def test_a_branch_of_the_transform_stays_a_branch():
  tuned, grads = attached(BACKBONES['linen_gemma'], jpeft.full())
  tx = optim.on_matrices(tuned, galore(), optax.identity())
  jaxpr = str(jax.make_jaxpr(tx.update)(grads, tx.init(grads), grads))
  # The decomposition is inside of it: it costs its time every `every` steps alone.
  assert jaxpr.count('= cond[') == len(shapes_of(tuned)) == 5


def test_a_pattern_leaves_the_other_matrices_to_the_rest():
  tuned, grads = attached(BACKBONES['linen_vit_scan'], jpeft.full())
  tx = optim.on_matrices(tuned, optax.scale(2.0), optax.scale(3.0), pattern='.*Attention.*')
  updates, state = tx.update(grads, tx.init(grads))
  assert set(state.matrices) == {
    f'full/{HEADS}/{n}/kernel' for n in ('query', 'key', 'value', 'out')
  }
  for path, arrays in grads['full'].items():
    for name, g in arrays.items():
      factor = 2.0 if 'Attention' in path and name == 'kernel' else 3.0
      np.testing.assert_array_equal(updates['full'][path][name], factor * g)


def test_what_an_update_is_given_beside_the_gradient_reaches_both():
  def scaled(updates, state, params=None, *, value, **_):
    return jax.tree.map(lambda u: u * value, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scaled)
  tuned, grads = attached(BACKBONES['linen_vit_scan'], jpeft.full())
  tx = optim.on_matrices(tuned, tx, tx)
  updates, _ = tx.update(grads, tx.init(grads), value=2.0)
  chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 2 * g, grads))


@pytest.mark.parametrize('wrapped', (False, True), ids=('split', 'freeze'))
def test_in_the_training_step_of_a_method_with_state(wrapped):
  row = BACKBONES['linen_vit_scan']
  method = jpeft.lora(2, targets='.*query', init='pissa')
  tuned = jpeft.attach(row.model, method, row.backbone, *row.args, **row.kwargs)
  tx = optax.chain(
    optim.on_matrices(tuned, optax.contrib.scale_by_muon(), optax.identity()),
    optax.scale_by_learning_rate(1e-2),
  )
  if wrapped:
    tx = jpeft.freeze(tx, tuned.trainable)
  state = step.initial_state(tuned, tx, row.backbone, 0)
  forward = step.Forward(tuned, False, {'train': False})
  batch = {'image': row.args[0], 'label': np.array([0, 1], np.int32)}
  update = jax.jit(step.train_step(tuned, forward, tx, 0))
  losses = []
  first = state['theta']
  for _ in range(4):
    state, out = update(state, row.backbone, batch)
    losses.append(float(out['loss']))
  assert losses[-1] < losses[0]
  _, held = tuned.split(first)
  chex.assert_trees_all_equal(tuned.split(state['theta'])[1], held)


def test_mistakes_are_told():
  tuned, theta = attached(BACKBONES['linen_vit_scan'], jpeft.full())
  with pytest.raises(ValueError, match="'.*attn.*' matches no matrix of theta; near it are full"):
    optim.on_matrices(tuned, galore(), optax.identity(), pattern='.*attn.*')
  wide = noisy(theta)
  wide['full']['head']['kernel'] = jnp.zeros((3, 3))
  with pytest.raises(
    ValueError, match=r"'full/head/kernel' has the shape \(3, 3\), and \(32, 10\)"
  ):
    optim.fold(tuned, wide)
  biases, _ = attached(BACKBONES['linen_vit'], jpeft.tune('head', 'bias'))
  with pytest.raises(ValueError, match='theta of tune has no matrix'):
    optim.on_matrices(biases, galore(), optax.identity())
