"""`generated`: theta as a function of a smaller tree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests.contract.anatomies import described
from tests.core.small import (
  BLOCKS,
  FC,
  WIDTH,
  Blocks,
  X,
  adapter,
  backbone,
  low_rank,
  noisy,
  plain,
  shared_factor,
  stacks,
  train,
)
from tests.fixtures import BACKBONES

DEPTH = 4
MODELS = stacks(DEPTH)
OTHER = {'linen scan': 'linen', 'linen scan remat': 'linen', 'nnx scan': 'nnx'}
WORD = 3


def hypernetwork(method=None):
  """One network makes the adapters of all layers, from a word for each layer (2106.04489)."""
  method = adapter(BLOCKS) if method is None else method

  def init(key, places):
    key_words, key_down, key_up = jax.random.split(key, 3)
    depth = sum(np.size(place.numbers) for place in places.values())
    return {
      '': {
        'words': 0.3 * jax.random.normal(key_words, (depth, WORD)),
        'down': 0.3 * jax.random.normal(key_down, (WORD, WIDTH, 2)),
        'up': 0.3 * jax.random.normal(key_up, (WORD, 2, WIDTH)),
      }
    }

  def expand(t, places):
    shared = t['']

    def of_layer(number):
      word = shared['words'][number]
      return {name: jnp.tensordot(word, shared[name], 1) for name in ('down', 'up')}

    made = {}
    for path, place in places.items():
      made[path] = place.per_layer(of_layer)(jnp.asarray(place.numbers))
    return made

  return jpeft.generated(method, init, expand)


def half_shared(**options):
  """LoRA whose a all layers share."""
  return shared_factor(low_rank(FC), **options)


def loss_of(tuned, held):
  return lambda theta: jnp.sum(jnp.sin(tuned.apply(theta, held, X)))


@pytest.mark.parametrize('name', MODELS)
def test_one_network_makes_the_entries_of_all_layers(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, hypernetwork(), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  assert jpeft.summary(tuned).trainable == DEPTH * WORD + 2 * WORD * 2 * WIDTH
  assert '(shared)' in str(jpeft.summary(tuned))

  # Each entry's gradient is the slope of the loss.
  loss = jax.jit(loss_of(tuned, held))
  grads = jax.jit(jax.grad(loss))(theta)
  for entry in ('words', 'down', 'up'):
    step = jax.tree.map(jnp.zeros_like, theta)
    step['adapter'][''][entry] = jax.random.normal(
      jax.random.key(1), step['adapter'][''][entry].shape
    )
    ends = [loss(jax.tree.map(lambda t, s: t + sign * 2e-3 * s, theta, step)) for sign in (1, -1)]
    slope = sum(jnp.vdot(g, s) for g, s in zip(*map(jax.tree.leaves, (grads, step)), strict=True))
    np.testing.assert_allclose((ends[0] - ends[1]) / 4e-3, slope, rtol=2e-2, atol=5e-3)

  # What the rules read is the theta of the plain method.
  itself = jpeft.attach(model, adapter(BLOCKS), held, X)
  expanded = jax.jit(tuned.expand)(theta)
  chex.assert_trees_all_equal_shapes(expanded, itself.shapes)
  np.testing.assert_allclose(
    tuned.apply(theta, held, X), itself.apply(expanded, held, X), rtol=1e-6, atol=1e-6
  )
  assert jpeft.check(tuned, held, X, start=None)


@pytest.mark.parametrize('name', OTHER)
def test_a_stack_computes_as_its_layers_one_by_one(name):
  model, unrolled = MODELS[name](), MODELS[OTHER[name]]()
  held = backbone(unrolled)
  tuned = jpeft.attach(unrolled, hypernetwork(), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  if name == 'nnx scan':
    layers = [held['blocks'][i] for i in range(DEPTH)]
    whole = backbone(model)
    stacked = type(whole)({'blocks': jax.tree.map(lambda *x: jnp.stack(x), *layers)})
  else:
    layers = [held['params'][f'block_{i}'] for i in range(DEPTH)]
    stacked = {'params': {'blocks': jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
  other = jpeft.attach(model, hypernetwork(), stacked, X)
  np.testing.assert_allclose(
    other.apply(theta, stacked, X), tuned.apply(theta, held, X), rtol=1e-5, atol=1e-6
  )
  chosen = jpeft.in_layers(hypernetwork(), '1,-1')
  few = [jpeft.attach(m, chosen, h, X) for m, h in ((model, stacked), (unrolled, held))]
  np.testing.assert_allclose(
    few[0].apply(theta, stacked, X), few[1].apply(theta, held, X), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('name', MODELS)
def test_entries_that_sites_share_beside_their_own(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, half_shared(), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  assert jpeft.summary(tuned).trainable == 2 * WIDTH + DEPTH * 2 * WIDTH
  assert tuned.mergeable
  merged = tuned.merge(theta, held)
  np.testing.assert_allclose(
    plain(model, merged, X), tuned.apply(theta, held, X), rtol=1e-4, atol=1e-5
  )
  assert jpeft.check(tuned, held, X)


def test_fixed_entries_of_the_smaller_tree():
  model = Blocks(DEPTH)
  held = backbone(model)
  tuned = jpeft.attach(model, half_shared(fixed=('a',)), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  trained, _ = tuned.split(theta)
  assert jpeft.count(trained) == DEPTH * 2 * WIDTH
  grads = jax.grad(loss_of(tuned, held))(theta)
  assert not np.any(grads['low']['']['a'])
  assert np.any(grads['low']['block_0/fc']['b'])


@pytest.mark.parametrize('name', MODELS)
def test_a_frozen_generated_method_computes_as_it_was_trained(name):
  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(model, half_shared(), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  base = jpeft.attach(model, jpeft.frozen(half_shared(), theta), held, X)
  again = base.init(jax.random.key(5), held)
  chex.assert_trees_all_equal(again, theta)
  np.testing.assert_array_equal(base.apply(again, held, X), tuned.apply(theta, held, X))
  assert jpeft.count(base.split(again)[0]) == 0
  with pytest.raises(ValueError, match="other arrays for the generated 'low'"):
    other = {'low': {'': theta['low']['']}}
    jpeft.attach(model, jpeft.frozen(half_shared(), other), held, X)


def test_beside_another_method_and_alone():
  model = Blocks(2)
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.chain(half_shared(), adapter('block_1')), held, X)
  theta = noisy(tuned.init(jax.random.key(0), held))
  alone = jpeft.attach(model, half_shared(), held, X)
  np.testing.assert_array_equal(
    tuned.only('low').apply(theta, held, X), alone.apply(theta, held, X)
  )
  assert hypernetwork() != adapter(BLOCKS)


@pytest.mark.parametrize('backbone_name', ('linen_vit', 'linen_vit_scan', 'nnx_vit_scan'))
def test_under_packed_blocks(backbone_name):
  """A shared entry gets the gradients of all layers, where their residuals are in few bits too."""
  b = BACKBONES[backbone_name]

  def init(key, places):
    first = next(iter(places.values())).t['kernel']['a']
    return {'': {'a': first.reshape(-1, *first.shape[-2:])[0]}}

  def expand(t, places):
    made = {}
    for path, place in places.items():
      a = jnp.broadcast_to(t['']['a'], place.t['kernel']['a'].shape)
      made[path] = {'kernel': {'a': a, 'b': jnp.full(place.t['kernel']['b'].shape, 0.1)}}
    return made

  lora = jpeft.lora(2, targets='{q}')

  def tuned_by(method):
    with described(b):
      method = jpeft.chain(method, jpeft.packed(bits=8))
      return jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)

  def gradient(tuned, theta):
    def loss(theta):
      out = tuned.apply(theta, b.backbone, *b.args, **b.kwargs)
      return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(out))

    return jax.jit(jax.grad(loss))(theta)['lora']

  tuned = tuned_by(jpeft.generated(lora, init, expand))
  theta = tuned.init(jax.random.key(0), b.backbone)
  shared = gradient(tuned, theta)['']['a']
  apart = gradient(tuned_by(lora), tuned.expand(theta))
  layers = [t['kernel']['a'].reshape(-1, *shared.shape) for t in apart.values()]
  total = np.concatenate(layers).sum(0)
  assert np.any(total)
  np.testing.assert_allclose(shared, total, rtol=1e-4, atol=1e-5 * np.abs(total).max())


def test_places_come_in_the_order_of_the_forward_pass():
  model = Blocks(12)
  seen = []

  def same(tree, places):
    seen.append(list(places))
    return {path: place.t for path, place in places.items()} if tree is None else tree

  method = jpeft.generated(low_rank('.*/fc'), lambda key, places: same(None, places), same)
  held = backbone(model)
  tuned = jpeft.attach(model, method, held, X)
  tuned.apply(tuned.init(jax.random.key(0), held), held, X)
  assert len(seen) > 2
  assert all(paths == [f'block_{i}/fc' for i in range(12)] for paths in seen)


def attach(init, expand, method=None, **options):
  method = low_rank('block_0/fc') if method is None else method
  return jpeft.attach(
    Blocks(2), jpeft.generated(method, init, expand, **options), backbone(Blocks(2)), X
  )


def test_mistakes():
  own = lambda key, places: {path: place.t for path, place in places.items()}
  same = lambda t, places: t
  attach(own, same)
  with pytest.raises(ValueError, match='must return {path: dict of arrays}'):
    attach(lambda key, places: {'a': jnp.zeros(2)}, same)
  with pytest.raises(ValueError, match="entries for 'block_1/fc', where no rule of it acts"):
    attach(lambda key, places: {'block_1/fc': {'a': jnp.zeros(2)}}, same)
  with pytest.raises(ValueError, match="expand of generated 'low' lacks 'block_0/fc/kernel/a'"):
    attach(own, lambda t, places: {})
  with pytest.raises(ValueError, match=r"makes 'block_0/fc/kernel/b' of shape \(1, 2, 6\)"):
    attach(own, lambda t, places: jax.tree.map(lambda x: x[None] if x.shape[0] == 2 else x, t))
  with pytest.raises(ValueError, match="fixed='c' of generated names no entry"):
    attach(own, same, fixed=('c',))
  with pytest.raises(ValueError, match='update edits entries that are made of a smaller tree'):
    attach(own, same, low_rank('block_0/fc', update=lambda t, site, step, key: t))
  with pytest.raises(ValueError, match='the names low, adapter'):
    jpeft.generated(jpeft.chain(low_rank('.*'), adapter('.*')), own, same)
  both = jpeft.chain(jpeft.generated(low_rank('block_0/fc'), own, same), low_rank('block_1/fc'))
  with pytest.raises(ValueError, match="two methods called 'low', of which one is generated"):
    jpeft.attach(Blocks(2), both, backbone(Blocks(2)), X)
  stack = Blocks(2, 'scan')
  shared = jpeft.generated(
    train('blocks/fc'), lambda key, places: {'blocks/fc': {'a': jnp.zeros(5)}}, same
  )
  with pytest.raises(ValueError, match='a stack of layers'):
    jpeft.attach(stack, shared, backbone(stack), X)
