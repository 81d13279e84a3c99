"""LoRAPrune: the worked example, its schedule, what is pruned for good, no gradient of kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import models
from jpeft.methods.weight.cuttable import KEPT, groups_of, is_between
from jpeft.methods.weight.loraprune import Schedule, averaged, chosen, loraprune, part_scores
from jpeft.models import Llama
from tests.fixtures import noisy
from tests.methods.small import IMAGES, t5, vit
from tests.methods.small import TOKENS as WORDS
from tests.runs import LLAMA

TOKENS = np.arange(12).reshape(2, 6).astype('int32')


def test_the_worked_example():
  w = jnp.array([[1.0, -2], [0.5, 3]]).T  # torch has [out, in]
  factors = {'a': jnp.array([[1.0, 1]]).T, 'b': jnp.array([[0.1], [-0.2]]).T}
  slopes = {'a': jnp.array([[0.3, -0.1]]).T, 'b': jnp.array([[0.2], [0.4]]).T}
  found = part_scores(w, factors, slopes, 2.0, 2, by_inputs=False)
  np.testing.assert_allclose(found, [0.431141, 0.902285], atol=1e-6)
  # |g (w + s a b)| = |[[.17, .21], [.22, .46]] * [[1.2, -1.8], [.1, 2.6]]|, over outputs.
  columns = np.array([0.17 * 1.2 + 0.22 * 0.1, 0.21 * 1.8 + 0.46 * 2.6])
  found = part_scores(w, factors, slopes, 2.0, 2, by_inputs=True)
  np.testing.assert_allclose(found, columns / np.linalg.norm(columns), atol=1e-6)


def test_the_schedule():
  schedule = Schedule(0.5, 0.1, 0.1, 10)
  found = [float(schedule.share(t, 1000)) for t in (50, 100, 200, 500, 800, 900, 1000)]
  np.testing.assert_allclose(found, [0, 0, 0.165039, 0.4375, 0.499023, 0.5, 0.5], atol=1e-6)
  chooses = [t for t in range(1, 96) if schedule.chooses(t, 95)]
  assert chooses == [*range(10, 90, 10), 86]
  assert float(schedule.share(86, 95)) == 0.5  # one choice is made at the exact target


def test_what_is_pruned_stays_so():
  rng = np.random.default_rng(0)
  kept = jnp.ones((2, 8), bool)
  for share in (0.1, 0.26, 0.5, 0.5):
    importance = jnp.asarray(rng.random((2, 8)))
    new = kept & chosen(importance, kept, share)
    assert not (new & ~kept).any()
    assert (8 - new.sum(-1) == int(share * 8)).all()
    kept = new
  assert (chosen(jnp.zeros((1, 4)), jnp.ones((1, 4), bool), 0.99).sum(-1) == 1).all()


def test_an_importance_that_is_not_finite_is_skipped():
  before = jnp.ones((2, 2))
  scores = jnp.array([[3.0, jnp.nan], [3.0, 5.0]])
  np.testing.assert_allclose(averaged(before, scores, 0.9), [[1, 1], [1.2, 1.4]], rtol=1e-6)


def llama(scan):
  """(model of grouped queries, six blocks; weights)."""
  model = Llama(16, 4, 4, 16, 20, kv_heads=2, scan=scan)
  return model, noisy(jax.jit(model.init)(jax.random.key(0), TOKENS), 0.05)


@functools.cache
def trained(name, scan=False, steps=10):
  """(tuned, variables, inputs, [theta after each update])."""
  model, held = vit(scan=scan) if name == 'vit' else llama(scan)
  inputs = IMAGES if name == 'vit' else TOKENS
  tuned = jpeft.attach(model, loraprune(rank=2, every=3), held, inputs)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  tx = optax.adam(1e-2)

  @jax.jit
  def step(theta, state, held, number):
    now, fixed = tuned.split(theta)

    def loss(now):
      return jnp.square(tuned.apply(tuned.join(now, fixed), held, inputs)).mean()

    grads = jax.grad(loss)(now)
    updates, state = tx.update(grads, state, now)
    new = tuned.join(optax.apply_updates(now, updates), fixed)
    key = jax.random.key(0)
    return tuned.edit(theta, new, state, grads, number, key, steps, held)

  state = tx.init(tuned.split(theta)[0])
  thetas = [theta]
  for number in range(1, steps + 1):
    theta, state = step(theta, state, held, number)
    thetas.append(theta)
  return tuned, held, inputs, thetas


def masks_of(theta):
  """{path: mask [.., parts]}."""
  found = {}
  for path, arrays in theta['loraprune'].items():
    for t in arrays.values():
      if KEPT in t:
        found[path] = np.asarray(t[KEPT])
  return found


@pytest.mark.parametrize(('name', 'scan'), [('vit', False), ('llama', True)])
def test_half_of_the_parts_go_and_the_narrow_model_computes_the_same(name, scan):
  tuned, held, inputs, thetas = trained(name, scan)
  history = [masks_of(theta) for theta in thetas]
  for before, after in zip(history, history[1:], strict=False):
    for path, mask in after.items():
      assert not (mask & ~before[path]).any()
  for path, mask in history[-1].items():
    layers = mask if scan else [mask]
    numbers = range(4) if scan else [int(path.split('block_')[1][0])]
    last = tuned.sites[path].depth - 1
    for number, layer in zip(numbers, layers, strict=True):
      pruned = 0 if number == last else len(layer) // 2  # the last layer loses nothing
      assert (~layer).sum() == pruned, (path, number)

  theta = noisy(thetas[-1])
  out = jax.jit(tuned.apply)(theta, held, inputs)
  keep = jpeft.keep_of(tuned, theta)
  small, weights = jpeft.narrowed(tuned.model, jax.jit(tuned.merge)(theta, held), keep)
  np.testing.assert_allclose(jax.jit(small.apply)(weights, inputs), out, atol=1e-5)
  assert small.depth == tuned.model.depth and small.mlp_dim != tuned.model.mlp_dim


def test_heads_of_both_attentions_of_a_decoder_are_cut():
  model, held = t5()
  tuned = jpeft.attach(model, loraprune(rank=2), held, WORDS, WORDS)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held))
  for number, arrays in enumerate(theta['loraprune'].values()):
    t = arrays['kernel']
    if KEPT in t:
      t[KEPT] = jnp.arange(len(t[KEPT])) % 4 != number % 4
  keep = jpeft.keep_of(tuned, theta)
  small, weights = jpeft.narrowed(model, jax.jit(tuned.merge)(theta, held), keep)
  out = jax.jit(tuned.apply)(theta, held, WORDS, WORDS)
  np.testing.assert_allclose(jax.jit(small.apply)(weights, WORDS, WORDS), out, atol=1e-5)
  assert set(keep.decoder.cross_heads) == {0, 1} and len(keep.decoder.cross_heads[0]) == 3


def test_layers_at_both_ends_lose_nothing():
  tuned = trained('llama', True)[0]
  site = tuned.sites['decoder/blocks/mlp/fc2']
  assert is_between(site, 1, 2).tolist() == [False, True, False, False]
  assert is_between(site, 0, 0).all()
  unrolled = trained('vit', False)[0].sites['encoder/block_1/mlp/fc2']
  assert is_between(unrolled, 1, 1) and not is_between(unrolled, 2, 0)


def test_layers_that_share_parts_share_one_mask():
  tuned, _, _, thetas = trained('vit')
  sites = {path: tuned.sites[path] for path in thetas[-1]['loraprune']}
  groups = groups_of(sites)
  assert groups.keys() == masks_of(thetas[-1]).keys()
  block = 'encoder/block_1'
  attention = [f'{block}/attention/{name}' for name in ('query', 'key', 'value', 'out')]
  assert sorted(groups[f'{block}/attention/out']) == sorted(attention)
  assert sorted(groups[f'{block}/mlp/fc2']) == [f'{block}/mlp/fc1', f'{block}/mlp/fc2']


def test_the_pruned_model_is_a_dense_checkpoint(tmp_path):
  model = models.from_config(LLAMA)
  held = noisy(jax.jit(model.init)(jax.random.key(0), TOKENS), 0.05)
  tuned = jpeft.attach(model, loraprune(rank=2), held, TOKENS)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held))
  for path in masks_of(theta):
    t = theta['loraprune'][path]['kernel']
    t[KEPT] = jnp.arange(len(t[KEPT])) % 2 == 0
  out = jax.jit(tuned.apply)(theta, held, TOKENS)
  merged = jax.jit(tuned.merge)(theta, held)
  small, weights = jpeft.narrowed(model, merged, jpeft.keep_of(tuned, theta))
  models.save_pretrained(tmp_path, small, weights, LLAMA)
  again = models.load(tmp_path)
  assert (again.model.heads, again.model.kv_heads, again.model.mlp_dim) == (2, 1, 32)
  np.testing.assert_allclose(jax.jit(again.model.apply)(again.variables, TOKENS), out, atol=1e-5)


def test_scanned_layers_are_judged_as_unrolled_ones():
  """The importances of one update, from the same weights, factors and gradients."""
  found = {}
  for scan in (False, True):
    _, _, _, thetas = trained('vit', scan)
    own = thetas[1]['loraprune']
    for path, arrays in own.items():
      if 'importance' in arrays['kernel']:
        found[scan, path] = np.asarray(arrays['kernel']['importance'])
  for (scan, path), x in found.items():
    if scan:
      assert x.ndim == 2 and (x > 0).all()
      np.testing.assert_allclose(np.linalg.norm(x, axis=-1) > 0.05, True)
      assert x.shape[1:] == found[False, path.replace('blocks', 'block_0')].shape


def test_no_gradient_of_a_kernel_is_formed():
  """What the backward pass of a step makes is as large as for LoRA; no product is a kernel."""
  model, held = vit()

  def products(method):
    tuned = jpeft.attach(model, method, held, IMAGES)
    now, fixed = tuned.split(tuned.shapes)

    def loss(now, fixed, held):
      return tuned.apply(tuned.join(now, fixed), held, IMAGES).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(now, fixed, held)
    return [
      equation.outvars[0].aval.shape
      for equation in equations(jaxpr.jaxpr)
      if equation.primitive.name == 'dot_general'
    ]

  found = products(loraprune(rank=2))
  whole = {x.shape for x in jax.tree.leaves(held) if x.ndim == 2 and min(x.shape) > 5}
  assert whole and not [shape for shape in found if shape in whole or shape[::-1] in whole]
  full = products(jpeft.full())
  assert [shape for shape in full if shape in whole or shape[::-1] in whole]


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def test_counts_of_llama_7b():
  model = Llama(4096, 32, 32, 11008, 32000, scan=True)
  held = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  tuned = jpeft.attach(model, loraprune(rank=8), held, TOKENS)
  assert jpeft.summary(tuned).trainable == 19_988_480
  t = tuned.shapes['loraprune']
  assert t['decoder/blocks/attention/out']['kernel'][KEPT].shape == (32, 32)
  assert t['decoder/blocks/mlp/fc2']['kernel'][KEPT].shape == (32, 11008)


def test_refusals():
  with pytest.raises(ValueError, match='settle=0.9 leaves no updates to prune in'):
    loraprune(settle=0.9)
  with pytest.raises(ValueError, match=r'sparsity=1 must lie in \[0, 1\)'):
    loraprune(sparsity=1)
  tuned, held, _, thetas = trained('vit')
  trained_part = tuned.split(thetas[0])[0]
  state = optax.adam(1e-3).init(trained_part)
  common = (thetas[0], thetas[0], state, trained_part, 1, jax.random.key(0))
  with pytest.raises(ValueError, match='give Tuned.edit the number, as steps='):
    tuned.edit(*common)
  with pytest.raises(ValueError, match='give Tuned.edit backbone='):
    tuned.edit(*common, 10)
