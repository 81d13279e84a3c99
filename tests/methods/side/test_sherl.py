"""SHERL: counts, redundancy, what the last block reads, and what crosses the backbone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import count
from jpeft.methods.side.sherl import merged
from jpeft.models import T5, Bert, ViT
from tests.kept import residuals
from tests.methods.small import IMAGES, MASK, TOKENS, attached, shapes_of, t5, vit
from tests.params import fast_if

CLOSED = 10.0  # tanh(gamma / T) is one


@pytest.mark.parametrize('scan', [False, True])
def test_t5_base_counts_as_published(scan):
  model = T5(width=768, depth=12, heads=12, mlp_dim=3072, vocab=32128, scan=scan)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  tuned = shapes_of(model, jpeft.sherl(8, layers=[1, 2, 3, 5, 6, 7, 9, 10, 11]), tokens, tokens)
  parts = {path: count(t) for path, t in tuned.shapes['sherl'].items()}
  assert parts == {'encoder/final_norm': 999_842, 'decoder/final_norm': 907_394}
  assert count(tuned.shapes) == 1_907_236


def test_the_text_module_for_retrieval_counts_as_published():
  model = Bert(width=768, depth=12, heads=12, mlp_dim=3072, vocab=100, pool='tokens')
  tuned = shapes_of(
    model, jpeft.sherl(width=512, down='norm', up='norm'), jax.ShapeDtypeStruct((1, 8), jnp.int32)
  )
  assert count(tuned.shapes) == 5_133_058


def test_states_that_are_alike_share_their_weight():
  u = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])[:, None, None]
  same = {'kernel': jnp.zeros((2, 1)), 'bias': jnp.ones(1)}
  np.testing.assert_allclose(merged(same, u)[0, 0] - u[-1, 0, 0], [0.5, 0.5])
  none = {'kernel': jnp.zeros((2, 1)), 'bias': -jnp.ones(1)}
  np.testing.assert_array_equal(merged(none, u), u[-1])
  weighted = {'kernel': jnp.array([[1.0], [3.0]]), 'bias': jnp.zeros(1)}
  raw = np.array([2 / 2, 2 / 2, 6 / 1])  # w . (u_i * u_n) / R_i
  a = raw / raw.sum()
  np.testing.assert_allclose(merged(weighted, u)[0, 0] - 2, [a[0] + a[1], a[2]], rtol=1e-6)


def set_gate(theta, value):
  for t in theta['sherl'].values():
    t['gamma'] = jnp.full((), value)


@pytest.mark.parametrize('fields', [{}, {'scan': True}, {'scan': True, 'remat': True}])
def test_an_open_gate_and_no_merge_is_the_backbone(fields):
  model, held = vit(**fields)
  tuned, theta = attached(model, held, jpeft.sherl(4), IMAGES)
  t = theta['sherl']['final_norm']
  t['up'] = jax.tree.map(jnp.zeros_like, t['up'])
  own = held['params']['final_norm']
  t['norm'] = {'scale': own['scale'], 'shift': own['bias']}
  set_gate(theta, CLOSED)
  np.testing.assert_allclose(tuned.apply(theta, held, IMAGES), model.apply(held, IMAGES), atol=2e-5)


@pytest.mark.parametrize('fields', fast_if(bool, [{}, {'scan': True}]))
def test_an_open_gate_and_no_merge_is_t5(fields):
  model, held = t5(**fields)
  tuned, theta = attached(model, held, jpeft.sherl(4), TOKENS, TOKENS, mask=MASK)
  set_gate(theta, CLOSED)
  for stack in ('encoder', 'decoder'):
    t = theta['sherl'][f'{stack}/final_norm']
    t['up'] = jax.tree.map(jnp.zeros_like, t['up'])
    t['norm'] = held['params'][stack]['final_norm']
  run = lambda run, *a: run(*a, TOKENS, TOKENS, mask=MASK)
  np.testing.assert_allclose(
    run(tuned.apply, theta, held), run(model.apply, held), rtol=1e-4, atol=1e-4
  )
  theta['sherl']['encoder/final_norm']['up']['bias'] += 0.3  # the side memory
  assert np.abs(run(tuned.apply, theta, held) - run(model.apply, held)).max() > 1e-2


def test_the_side_memory_reaches_the_last_cross_attention_alone():
  model, held = t5()
  tuned, theta = attached(model, held, jpeft.sherl(4), TOKENS, TOKENS)
  other = jax.tree.map(lambda x: x, theta)
  other['sherl']['encoder/final_norm']['up']['bias'] += 0.3
  run = lambda held, theta: tuned.apply(theta, held, TOKENS, TOKENS)
  assert not np.array_equal(run(held, theta), run(held, other))
  last = held['params']['decoder']['block_1']['cross_attention']
  last['out'] = jax.tree.map(jnp.zeros_like, last['out'])
  np.testing.assert_array_equal(run(held, theta), run(held, other))


def test_at_the_start_the_last_block_reads_the_merged_state_alone():
  model, held = vit()
  tuned = jpeft.attach(model, jpeft.sherl(4), held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  blind = jax.tree.map(lambda x: x, theta)
  blind['sherl']['final_norm']['up'] = jax.tree.map(
    jnp.zeros_like, blind['sherl']['final_norm']['up']
  )
  one, two = (tuned.apply(blind, held, x) for x in (IMAGES, 2 * IMAGES))
  np.testing.assert_array_equal(one, two)  # nothing but the merged state comes through
  slope = jax.grad(lambda g: jnp.tanh(g / 0.1))(0.0)
  assert slope == pytest.approx(10)
  grads = jax.grad(lambda t: jnp.square(tuned.apply(t, held, IMAGES)).sum())(theta)['sherl'][
    'final_norm'
  ]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  'options',
  fast_if(
    lambda options: 'layers' not in options and options,
    [{}, {'down': 'norm', 'up': 'norm'}, {'remat': True}, {'layers': [1]}],
  ),
)
def test_unrolled_and_scanned_agree(options):
  model, held = vit()
  scanned, _ = vit(scan=True)
  blocks = [held['params']['encoder'][f'block_{i}'] for i in range(3)]
  stacked = {
    'params': {
      **held['params'],
      'encoder': {'blocks': jax.tree.map(lambda *x: jnp.stack(x), *blocks)},
    }
  }
  tuned, theta = attached(model, held, jpeft.sherl(4, **options), IMAGES)
  other = jpeft.attach(scanned, jpeft.sherl(4, **options), stacked, IMAGES)
  out = lambda tuned, held: jax.jit(
    jax.value_and_grad(lambda t: jnp.square(tuned.apply(t, held, IMAGES)).sum())
  )(theta)
  (one, grads), (two, same) = out(tuned, held), out(other, stacked)
  np.testing.assert_allclose(one, two, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, same)


@functools.cache
def kept(depth: int) -> int:
  """Bytes that the backward pass keeps beside weights."""
  model = ViT(
    width=64, depth=depth, heads=4, mlp_dim=256, patch_size=4, image_size=32, num_classes=10
  )
  images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
  held = jax.eval_shape(model.init, jax.random.key(0), images)
  tuned = jpeft.attach(model, jpeft.sherl(8), held, images)
  return jpeft.nbytes(
    residuals(tuned.apply, tuned.shapes, held, images, weights=(held, tuned.shapes))
  )


def test_a_further_block_costs_its_state():
  state = 4 * 65 * 64 * 4
  narrow = 4 * 65 * 8 * 4
  assert state <= kept(6) - kept(5) < state + 20 * narrow + 40 * 4 * 65 * 4
  assert (
    abs((kept(6) - kept(5)) - (kept(5) - kept(4))) < 20 * 4 * 65 * 4
  )  # redundancy compares pairs of states


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: jpeft.sherl(down='x'), "down='x' is none of"),
    (lambda: jpeft.sherl(up='x'), "up='x' is none of"),
    (lambda: jpeft.sherl(0), 'must be at least 1'),
    (lambda: jpeft.sherl(layers=[2]), 'no block before the last'),
    (lambda: jpeft.sherl(dropout=2), 'must lie in'),
  ],
)
def test_bad_options_are_said_before_any_work(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, IMAGES)
