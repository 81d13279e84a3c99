"""E2VPT: rows of the attention, masks and their importance, pruning and rewinding, counts."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.keys import more_keys
from jpeft.methods.prompt.e2vpt import Pruning, e2vpt, masked
from jpeft.methods.prompt.vpt import vpt_deep
from tests.fixtures import noisy
from tests.methods.small import IMAGES, vit
from tests.methods.weight.test_snell import vit_base

MASKS = ('tokens', 'segments')
LAYOUTS = pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
PRUNED = {'prune_tokens': 0.5, 'prune_segments': 0.5, 'prune_after': 2}
RNG = np.random.default_rng(0)


def attached(method, **fields):
  """(model, tuned, variables, theta)."""
  model, variables = vit(**{'depth': 2, **fields})
  tuned = jpeft.attach(model, method, variables, IMAGES)
  return model, tuned, variables, jax.jit(tuned.init)(jax.random.key(0), variables)


def random(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize('pruning', [{}, PRUNED], ids=['plain', 'masks'])
@LAYOUTS
def test_without_rows_and_with_masks_of_one_it_is_vpt_deep(pruning, fields):
  model, tuned, variables, theta = attached(e2vpt(4, 0, dropout=0.0, **pruning), **fields)
  deep = jpeft.attach(model, vpt_deep(4), variables, IMAGES)
  prompts = {p: {'prompts': t['prompts']} for p, t in theta['e2vpt'].items() if 'prompts' in t}
  out = tuned.apply(theta, variables, IMAGES)
  np.testing.assert_array_equal(out, deep.apply({'vpt_deep': prompts}, variables, IMAGES))


@pytest.mark.parametrize('rows', [0, 1, 5])
def test_rows_leave_the_number_of_tokens(rows):
  lengths = []

  def see(t, call, *args, **kwargs):
    out = call(*args, **kwargs)
    lengths.append(out.shape)
    return out

  inside = jpeft.at('{block}', jpeft.Call('inside', see))
  model = vit_base()
  method = jpeft.chain(inside, e2vpt(10, rows))
  tuned = jpeft.attach(model.model, method, *model.shapes)
  lengths.clear()
  jax.eval_shape(tuned.apply, tuned.shapes, *model.shapes)
  assert set(lengths) == {(32, 1 + 10 + 196, 768)}


def test_rows_behind_the_keys_do_the_same():
  query, key, value = (random(2, 7, 3, 4) for _ in range(3))
  rows = random(5, 3, 4)
  front = more_keys(nn.dot_product_attention, rows, rows)(query, key, value)
  own = jnp.broadcast_to(rows, (2, 5, 3, 4))
  behind = [jnp.concatenate([x, own], 1) for x in (key, value)]
  np.testing.assert_allclose(front, nn.dot_product_attention(query, *behind), atol=1e-6)


def test_rows_are_tokens_whose_queries_are_dropped():
  query, key, value = (random(2, 7, 3, 4) for _ in range(3))
  rows = random(5, 3, 4)
  found = more_keys(nn.dot_product_attention, rows, rows)(query, key, value)
  own = jnp.broadcast_to(rows, (2, 5, 3, 4))
  together = [jnp.concatenate([own, x], 1) for x in (query, key, value)]
  np.testing.assert_allclose(found, nn.dot_product_attention(*together)[:, 5:], atol=1e-6)


def test_the_worked_attention():
  one = lambda x: jnp.full((1, 1, 1, 1), x)
  row = jnp.zeros((1, 1, 1))
  given = one(1.0), one(0.0), one(4.0)
  assert nn.dot_product_attention(*given) == 4
  assert more_keys(nn.dot_product_attention, row, row)(*given) == 2


def test_the_counts_on_vit_base():
  base = vit_base(scan=True)

  def trained(*args, **kwargs):
    return jpeft.summary(jpeft.attach(base.model, e2vpt(*args, **kwargs), *base.shapes)).trainable

  assert trained(10, 5) == 9_216 * (10 + 5) == 138_240
  assert trained(10, 5, share=False) == 184_320
  assert trained(10, 5, **PRUNED) == 138_240 + 10 + 160  # and the masks


def test_the_starts_on_vit_base():
  base = vit_base(scan=True)
  tuned = jpeft.attach(base.model, e2vpt(10, 5), *base.shapes)
  theta = tuned.init(jax.random.key(0), base.shapes[0])
  found = {next(iter(t)): jnp.abs(next(iter(t.values()))).max() for t in theta['e2vpt'].values()}
  assert found['prompts'] == pytest.approx(0.0625, rel=1e-3)
  assert found['rows'] == pytest.approx((6 / 320) ** 0.5, rel=1e-2)
  assert found['rows'] <= 0.1370


def test_segments_interleave():
  segments = jnp.arange(2 * 16).reshape(2, 16) + 1.0
  found = masked(jnp.ones((2, 768)), jnp.ones(2), segments)
  assert found[0, 17] == segments[0, 1] and found[1, 767] == segments[1, 15]
  without = masked(jnp.ones((2, 768)), jnp.ones(2), jnp.ones((2, 16)).at[:, 0].set(0))
  assert jnp.sum(without == 0, -1).tolist() == [48, 48]
  none = masked(jnp.ones((2, 768)), jnp.array([1.0, 0]), jnp.ones((2, 16)))
  assert none[0].all() and not none[1].any()


def loss_of(tuned, variables, theta):
  return jnp.sum(jnp.sin(tuned.apply(theta, variables, IMAGES)))


def with_mask(theta, name, index, change):
  own = theta['e2vpt']
  root = {**own[''], name: own[''][name].at[index].add(change)}
  return {**theta, 'e2vpt': {**own, '': root}}


@LAYOUTS
def test_importance_is_the_derivative_for_the_masks(fields):
  _, tuned, variables, theta = attached(e2vpt(4, 2, dropout=0.0, **PRUNED), **fields)
  # So small that the norm's epsilon counts: else a factor of a whole token would change nothing.
  own = {p: jax.tree.map(lambda x: 0.01 * x, t) for p, t in noisy(theta)['e2vpt'].items()}
  theta = {'e2vpt': {**own, '': theta['e2vpt']['']}}
  variables = noisy(variables, 0.3)
  run = jax.jit(lambda theta: loss_of(tuned, variables, theta))
  trained, held = tuned.split(theta)
  grad = jax.grad(lambda t: loss_of(tuned, variables, tuned.join(t, held)))(trained)['e2vpt']['']
  (rule,) = (rule for _, rule in tuned.method if rule.edit)
  state = jpeft.State(theta['e2vpt'], theta['e2vpt'], ())
  after = rule.edit(state, {'': grad}, 1, None).theta['']
  for name in MASKS:
    index = np.unravel_index(np.abs(grad[name]).argmax(), grad[name].shape)
    ends = [run(with_mask(theta, name, index, change)) for change in (1e-2, -1e-2)]
    numeric = float(ends[0] - ends[1]) / 2e-2
    assert abs(numeric) > 0.01
    assert float(2 * after['importance'][name][index]) == pytest.approx(numeric, rel=1e-3)


def test_the_lowest_are_left_out_with_their_signs():
  pruning = Pruning(4, 16, 0.5, 0.5, after=1)
  segments = jnp.tile(jnp.arange(16.0) - 8, (4, 1)).at[1].multiply(-1)
  masks = pruning.masks({'tokens': jnp.array([-3.0, 0.1, 2, -0.1]), 'segments': segments})
  assert masks['tokens'].tolist() == [0, 1, 1, 0]
  assert masks['segments'][0].tolist() == [0] * 8 + [1] * 8
  assert masks['segments'][1].tolist() == [1] * 8 + [0] * 8


@pytest.mark.parametrize(('share', 'tokens', 'segments'), [(0.3, 7, 12), (0.9, 1, 4), (1.0, 1, 4)])
def test_what_stays_at_least(share, tokens, segments):
  pruning = Pruning(10, 16, share, share, after=1)
  masks = pruning.masks({'tokens': random(10), 'segments': random(10, 16)})
  assert masks['tokens'].sum() == tokens
  assert (masks['segments'].sum(-1) == segments).all()


def like(trained, tree):
  """A tree without what is not trained any more."""

  def kept(now, x):
    return None if now is None else x

  return jax.tree.map(kept, trained, tree, is_leaf=lambda x: x is None)


def updates(tuned, variables, theta, total):
  """Yields (theta, moments, gradients of the masks) after each update, with its stages."""
  tx = optax.sgd(1e-2, 0.9)
  state = tx.init(tuned.split(theta)[0])
  for number in range(1, total + 1):
    now = tuned.at_stage(number - 1, total)
    trained, held = now.split(theta)
    state = (optax.TraceState(like(trained, state[0].trace)), *state[1:])
    loss = lambda t, now=now, held=held: loss_of(tuned, variables, now.join(t, held))
    grads = jax.jit(jax.grad(loss))(trained)
    changes, state = tx.update(grads, state, trained)
    new = now.join(optax.apply_updates(trained, changes), held)
    theta, state = now.edit(theta, new, state, grads, number, jax.random.key(0))
    yield theta, state, grads['e2vpt']['']


@LAYOUTS
def test_prompts_are_pruned_and_start_again(fields):
  _, tuned, variables, first = attached(e2vpt(4, 2, dropout=0.0, **PRUNED), **fields)
  one, two, three = itertools.islice(updates(tuned, variables, first, 3), 3)
  path = next(p for p, t in first['e2vpt'].items() if 'prompts' in t)

  def root(stage):
    return stage[0]['e2vpt']['']

  assert jnp.all(root(one)['tokens'] == 1)
  assert not np.array_equal(one[0]['e2vpt'][path]['prompts'], first['e2vpt'][path]['prompts'])
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *({m: s[2][m] for m in MASKS} for s in (one, two)))
  for mask in MASKS:
    np.testing.assert_allclose(root(two)['importance'][mask], mean[mask], rtol=1e-5)
  assert root(two)['tokens'].sum() == 2 and (root(two)['segments'].sum(-1) == 8).all()
  lowest = np.argsort(mean['tokens'])[:2]
  assert not root(two)['tokens'][lowest].any()
  for place, t in two[0]['e2vpt'].items():
    if place:
      jax.tree.map(np.testing.assert_array_equal, t, first['e2vpt'][place])
  assert not any(x.any() for x in jax.tree.leaves(two[1]))
  for mask in MASKS:
    np.testing.assert_array_equal(root(three)[mask], root(two)[mask])
  assert not np.array_equal(three[0]['e2vpt'][path]['prompts'], first['e2vpt'][path]['prompts'])
  assert tuned.stages(10) == (0, 2)


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'tokens': -1}, 'e2vpt: tokens=-1 must be a whole number'),
    ({'prune_tokens': 0.5}, 'e2vpt: prune_after=0 must be at least 1 where'),
    ({'prune_after': 5}, 'e2vpt: prune_after=5 must be .* and 0 elsewhere'),
    ({'prune_segments': 1.5, 'prune_after': 5}, r'e2vpt: prune_segments=1.5 must lie in \[0, 1\]'),
    ({'tokens': 0, **PRUNED}, 'e2vpt: tokens=0 leaves nothing to prune'),
    ({'segments': 0}, 'e2vpt: segments=0 must be a whole number'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    e2vpt(**hyperparameters)


def test_a_run_must_outlast_the_pruning():
  _, tuned, _, _ = attached(e2vpt(4, 2, **PRUNED))
  with pytest.raises(ValueError, match='stage'):
    tuned.stages(2)
