"""Ladder side-tuning: counts, gates, layer dropping, pruning, and what crosses between the
stacks.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import count
from jpeft.methods.side.prune import keep_count, keep_rows
from jpeft.models import T5, ViT
from tests.params import fast_if

TOKENS = jnp.arange(12).reshape(2, 6)
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def vit(**fields):
  model = ViT(
    width=32, depth=3, heads=4, mlp_dim=64, patch_size=4, image_size=8, num_classes=5, **fields
  )
  held = jax.jit(model.init)(jax.random.key(1), IMAGES)
  return model, jax.tree.map(
    lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), held
  )


def t5(**fields):
  model = T5(width=32, depth=2, heads=4, mlp_dim=64, vocab=50, head_dim=8, **fields)
  return model, jax.jit(model.init)(jax.random.key(0), TOKENS, TOKENS)


PUBLISHED = [
  ((768, 12, 12, 3072, 64), (1, 2, 3, 5, 6, 7, 9, 10, 11), 3_878_712),
  ((1024, 24, 16, 4096, 64), tuple(range(1, 24, 2)), 9_057_328),
  ((1024, 24, 32, 16384, 128), (23,), 2_494_896),
]


@pytest.mark.parametrize(
  'sizes, layers, numbers, scan',
  fast_if(
    lambda sizes, layers, numbers, scan: scan or layers == PUBLISHED[0][1],
    [(*case, scan) for case in PUBLISHED for scan in (False, True)],
  ),
)
def test_t5_counts_are_the_papers(sizes, layers, numbers, scan):
  width, depth, heads, mlp_dim, head_dim = sizes
  model = T5(
    width=width,
    depth=depth,
    heads=heads,
    mlp_dim=mlp_dim,
    vocab=32128,
    head_dim=head_dim,
    scan=scan,
  )
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  tuned = jpeft.attach(model, jpeft.lst(8, layers=layers, block='own'), shapes, tokens, tokens)
  assert count(tuned.shapes) == numbers


def test_gates_start_at_one_half_and_move_ten_times_faster():
  model, held = vit()
  theta = jpeft.attach(model, jpeft.lst(4), held, IMAGES).init(jax.random.key(0), held)
  gates = theta['lst']['final_norm']['gate']
  np.testing.assert_array_equal(gates, np.zeros(3))
  slope = jax.grad(lambda a: jax.nn.sigmoid(a / 0.1))(gates[0])
  assert slope == pytest.approx(2.5)


def test_pruning_keeps_the_best_rows_in_order():
  assert keep_rows(jnp.array([3.0, 1.0, 4.0, 1.5]), keep_count(4, 2)).tolist() == [0, 2]
  assert keep_count(12, 8) == 2
  assert keep_count(3, 8) == 1


@pytest.mark.parametrize('make', [vit, lambda: vit(scan=True)])
def test_a_full_width_copy_is_the_backbone(make):
  model, held = make()
  method = jpeft.lst(1, gate='one', prune='magnitude', block='own')
  tuned = jpeft.attach(model, method, held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  t = theta['lst']['final_norm']
  for name in ('in', 'up'):
    t[name] = {'kernel': jnp.eye(32), 'bias': jnp.zeros(32)}
  np.testing.assert_allclose(tuned.apply(theta, held, IMAGES), model.apply(held, IMAGES), atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_dropped_layers_are_not_read(scan):
  model, held = vit(scan=scan)
  tuned = jpeft.attach(model, jpeft.lst(4, layers=[2]), held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  jaxpr = jax.make_jaxpr(lambda theta: tuned.apply(theta, held, IMAGES))(theta)
  assert theta['lst']['final_norm']['gate'].shape == (3,)  # one a backbone layer, unused ones too
  assert jax.tree.leaves(theta['lst']['final_norm']['blocks'])[0].shape[0] == 1
  gate = jax.grad(lambda theta: tuned.apply(theta, held, IMAGES).sum())(theta)['lst']['final_norm'][
    'gate'
  ]
  assert gate[2] != 0 and not gate[:2].any()
  assert jaxpr.out_avals[0].shape == (2, 5)


@pytest.mark.parametrize('prune', ['magnitude', 'fisher'])
def test_pruned_blocks_are_cut_from_the_backbone(prune):
  model, held = vit()
  scores = 'magnitude'
  if prune == 'fisher':
    loss = lambda held, image: jnp.square(model.apply(held, image[None])).sum()
    scores = jpeft.fisher(loss, held, IMAGES)
    assert all(bool((x >= 0).all()) for x in jax.tree.leaves(scores))
  theta = jpeft.attach(model, jpeft.lst(4, prune=scores), held, IMAGES).init(
    jax.random.key(0), held
  )
  small = theta['lst']['final_norm']['blocks']['attention']['query']['kernel'][0]
  whole = held['params']['encoder']['block_0']['attention']['query']['kernel']
  assert small.shape == (8, 8)
  rows = np.isin(np.asarray(small), np.asarray(whole))
  assert rows.all()
  importance = scores['params'] if prune == 'fisher' else held['params']
  first = jnp.abs(importance['embed']['patch']['kernel']).reshape(-1, 32).sum(0)
  kept = keep_rows(first, 8)
  norm = held['params']['encoder']['block_0']['norm1']['scale']
  np.testing.assert_array_equal(
    theta['lst']['final_norm']['blocks']['norm1']['scale'][0], norm[kept]
  )


def test_the_side_decoder_attends_to_the_side_encoder():
  model, held = t5()
  tuned = jpeft.attach(model, jpeft.lst(4), held, TOKENS, TOKENS)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  grads = jax.grad(lambda theta: jnp.square(tuned.apply(theta, held, TOKENS, TOKENS)).sum())(theta)
  for path in ('encoder/final_norm', 'decoder/final_norm'):
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads['lst'][path])), path
  cross = grads['lst']['decoder/final_norm']['blocks']['cross_attention']['key']['kernel']
  assert cross.shape == (2, 8, 8)


@pytest.mark.parametrize('gate, start, end', [('linear', 0.1, 0.9), ('hyperbolic', 0.9, 0.5)])
def test_scheduled_gates_follow_the_step_and_are_not_trained(gate, start, end):
  model, held = vit()
  tuned = jpeft.attach(model, jpeft.lst(4, gate=gate, gate_steps=10), held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  gates = lambda theta: theta['lst']['final_norm']['gate']
  np.testing.assert_allclose(gates(theta), start)
  np.testing.assert_allclose(gates(tuned.update(theta, 10, jax.random.key(0))), end, rtol=1e-6)
  assert tuned.updates
  assert not gates(tuned.trainable(theta))


def test_adding_starts_as_the_backbone():
  model, held = vit()
  tuned = jpeft.attach(model, jpeft.lst(4, merge='add'), held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  np.testing.assert_array_equal(tuned.apply(theta, held, IMAGES), model.apply(held, IMAGES))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'block': 'mpl'}, "block='mpl' is none of"),
    ({'reduction': 5}, 'does not divide the width 32'),
    ({'layers': [7]}, 'must name some of the 3 blocks'),
    ({'block': 'attention', 'heads': 3}, '3 heads do not divide the side width'),
    ({'block': 'mlp', 'prune': 'magnitude'}, "needs block='own'"),
  ],
)
def test_bad_options_are_said_before_any_work(options, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, jpeft.lst(**{'reduction': 4, **options}), held, IMAGES)


def test_a_side_decoder_needs_attention():
  model, held = t5()
  with pytest.raises(ValueError, match='never reads the side encoder'):
    jpeft.attach(model, jpeft.lst(4, block='mlp'), held, TOKENS, TOKENS)


@pytest.mark.parametrize(
  'scan, downsample',
  fast_if(
    lambda scan, downsample: scan == (downsample == 'linear'),
    itertools.product([False, True], ['linear', 'pool']),
  ),
)
def test_normalized_states_weigh_the_same(scan, downsample):
  model, held = vit(scan=scan)
  tuned = jpeft.attach(model, jpeft.lst(4, downsample=downsample, normalize=True), held, IMAGES)
  run = lambda theta, held, images: tuned.apply(theta, held, images)
  features = jpeft.cut(run, tuned.shapes, held, IMAGES).first(held, IMAGES)
  states = jnp.concatenate(
    [f.reshape(-1, f.shape[-1]) for f in features]
  )  # 'replace' reads nothing else
  np.testing.assert_allclose(states.mean(-1), 0, atol=1e-5)
  if downsample == 'linear':
    np.testing.assert_allclose(states.std(-1), 1, atol=1e-3)
