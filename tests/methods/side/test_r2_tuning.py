"""R2-Tuning: counts, the order of its steps, its start, masks, points."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.side.r2_tuning import points, pooled, r2_tuning
from jpeft.models import ViT
from tests.methods.small import attached, shapes_of, vit

module = importlib.import_module('jpeft.methods.side.r2_tuning')
T, K, L = 4, 3, 6
VIDEO = jax.random.normal(jax.random.key(5), (2 * T, 8, 8, 3))
QUERY = jax.random.normal(jax.random.key(6), (2, K, L, 10))
SMALL = {'frames': T, 'states': K, 'width': 16, 'heads': 2, 'query_width': 10}


def test_counts_as_published():
  b32 = ViT(width=768, depth=12, heads=12, mlp_dim=3072, patch_size=32, scan=True)
  tuned = shapes_of(b32, r2_tuning(75), jax.ShapeDtypeStruct((75, 224, 224, 3), jnp.float32))
  t = tuned.shapes['r2_tuning']['']
  count = {n: jpeft.count(x) for n, x in t.items()}
  assert (count['video'], count['query'], count['w_q'] + count['w_v']) == (
    265_220,
    198_656,
    131_584,
  )
  assert (count['g'], count['s'], count['decoder']) == (3, 4, 1_053_440)
  assert sum(count[n] for n in ('video', 'query', 'w_q', 'w_v', 'g', 's', 'decoder')) == 1_648_907
  assert (count['pyramid'], count['pool'], count['score'], count['boundary'], count['level']) == (
    791_040,
    256,
    197_633,
    198_402,
    4,
  )
  assert jpeft.count(tuned.shapes) == 2_836_242


@pytest.fixture(scope='module')
def small():
  model, held = vit()
  return model, held, *attached(model, held, r2_tuning(**SMALL), VIDEO)


def run(tuned, theta, held, video=VIDEO, query=QUERY, **kwargs):
  return jax.jit(
    lambda theta, video, query, kwargs: tuned.apply(theta, held, video, query=query, **kwargs)
  )(theta, video, query, kwargs)


def test_shapes_and_points(small):
  _, held, tuned, theta = small
  out = run(tuned, theta, held)
  shapes = jax.tree.map(lambda x: x.shape, out)
  levels = lambda width: [(2, n, width) for n in (4, 2, 1, 0)]
  assert shapes == {
    'last': (2, T, 16),
    'cls': (2, K, T, 16),
    'query': (2, K, 16),
    'score': levels(1),
    'boundary': levels(2),
  }
  assert all(np.all(x > 0) for x in out['boundary'])
  levels = points(75)
  assert [len(level['at']) for level in levels] == [75, 37, 18, 9]
  assert [level['range'] for level in levels] == [(0, 2), (2, 4), (4, 8), (8, np.inf)]
  assert list(levels[2]['at'][:3]) == [0, 4, 8]


def test_steps_go_from_the_deepest_state_up(small, monkeypatch):
  """The words of one state reach the steps from that state on, the deepest first."""
  _, held, tuned, theta = small
  steps = []
  decode = module._R2Tuning.decode

  def recording(*args):
    steps.append(decode(*args))
    return steps[-1]

  monkeypatch.setattr(module._R2Tuning, 'decode', recording)

  @jax.jit
  def record(query):
    tuned.apply(theta, held, VIDEO, query=query)
    return list(steps)

  plain = record(QUERY)
  assert len(plain) == K
  for state in range(K):
    moved = [
      np.abs(a - b).max() > 1e-4
      for a, b in zip(plain, record(QUERY.at[:, state].multiply(-1)), strict=True)
    ]
    assert moved == [step >= K - 1 - state for step in range(K)]


def states(model, held, images):
  """The embeddings and the outputs of the blocks of `vit`."""
  keep = lambda module, _: module.name == 'embed' or (module.name or '').startswith('block_')
  run = functools.partial(model.apply, capture_intermediates=keep, mutable=['intermediates'])
  _, state = jax.jit(run)(held, images)
  found = state['intermediates']
  return [
    found['embed']['__call__'][0],
    *(found['encoder'][f'block_{i}']['__call__'][0] for i in range(3)),
  ]


def norm(p, x):
  x = np.asarray(x) - np.mean(x, -1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['shift']


def mapped(p, x):
  x = np.maximum(norm(p['norm1'], x) @ p['fc1']['kernel'] + p['fc1']['bias'], 0)
  return norm(p['norm2'], x) @ p['fc2']['kernel'] + p['fc2']['bias']


def timed(x):
  x, at = np.asarray(x), np.tile(np.arange(T), 2)
  ends = np.stack([at / T, (at + 1) / T], -1)[:, None]
  return np.concatenate([x, np.broadcast_to(ends, (*x.shape[:2], 2))], -1)


@pytest.mark.parametrize('fields', [{}, {'scan': True}])
def test_at_the_start_layers_mix_in_equal_parts_and_no_word_counts(fields, monkeypatch, small):
  monkeypatch.setattr(module._R2Tuning, 'decode', lambda self, t, e, *rest: e)
  model, held = vit(**fields)
  tuned = jpeft.attach(model, r2_tuning(**{**SMALL, 'states': 2}), held, VIDEO)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  assert 'g' in theta['r2_tuning']['']
  query = QUERY[:, :2]
  out = run(tuned, theta, held, query=query)['last']
  if not fields:
    t = theta['r2_tuning']['']
    shallow, deep = (
      mapped(t['video'], timed(x))[:, 0].reshape(2, T, -1) for x in states(model, held, VIDEO)[-2:]
    )
    np.testing.assert_allclose(out, (shallow + deep) / 2, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(out, run(tuned, theta, held, query=query + 1)['last'])


def test_the_gate_of_a_state_weighs_what_its_words_find(small, monkeypatch):
  """d e / d s is o at s = 0: the words, with what they attend to, as numpy has it."""
  model, held, _, _ = small
  monkeypatch.setattr(module._R2Tuning, 'decode', lambda self, t, e, *rest: e)
  tuned, theta = attached(model, held, r2_tuning(**{**SMALL, 'states': 1}), VIDEO)
  t = theta['r2_tuning']['']
  assert 'g' not in t
  at = lambda s: tuned.apply({'r2_tuning': {'': {**t, 's': s}}}, held, VIDEO, query=QUERY[:, :1])[
    'last'
  ]
  _, slope = jax.jit(lambda s: jax.jvp(at, (s,), (jnp.ones(1),)))(jnp.zeros(1))
  v = mapped(t['video'], timed(states(model, held, VIDEO)[-1]))
  q = np.repeat(mapped(t['query'], QUERY[:, 0]), T, 0)
  words, patches = (x @ t[n]['kernel'] + t[n]['bias'] for x, n in ((q, 'w_q'), (v, 'w_v')))
  logits = words @ np.swapaxes(patches, 1, 2) / 4
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  o = (share @ v + q).max(1)
  np.testing.assert_allclose(slope.reshape(2 * T, -1), o, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(pooled(t, jnp.asarray(q), jnp.asarray(v)), o, rtol=1e-3, atol=1e-3)


def test_masks(small):
  _, held, tuned, theta = small
  t = theta['r2_tuning']['']
  mute = {
    'r2_tuning': {'': {**t, 's': jnp.zeros(K)}}
  }  # the max over words knows no mask, as published
  mask = jnp.arange(L)[None] < jnp.array([[4], [L]])
  other = QUERY.at[0, :, 4:].multiply(-1)
  one, two = (run(tuned, mute, held, query=q, query_mask=mask) for q in (QUERY, other))
  np.testing.assert_allclose(one['last'], two['last'], atol=1e-5)
  np.testing.assert_allclose(one['query'], two['query'], atol=1e-5)
  assert (
    np.abs(run(tuned, mute, held, query=other)['last'] - run(tuned, mute, held)['last'])[0].max()
    > 1e-3
  )
  frames = jnp.arange(T)[None] < jnp.array([[2], [T]])
  longer = VIDEO.at[2:4].add(1.0)
  one, two = (run(tuned, theta, held, v, frame_mask=frames) for v in (VIDEO, longer))
  np.testing.assert_allclose(one['last'][0, :2], two['last'][0, :2], atol=1e-5)


def test_nothing_of_the_encoders_moves(small):
  _, held, tuned, theta = small
  loss = lambda theta, held, query: sum(
    jnp.square(x).sum() for x in jax.tree.leaves(tuned.apply(theta, held, VIDEO, query=query))
  )
  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(theta, held, QUERY)
  assert all(not np.any(g) for g in jax.tree.leaves(grads[1:]))
  still = [path for path, g in jax.tree_util.tree_leaves_with_path(grads[0]) if not np.any(g)]
  assert all("'8'" in str(path) or "['k']['bias']" in str(path) for path in still), (
    still
  )  # no point, no slope


def test_dropout_asks_for_a_key(small):
  model, held, tuned, theta = small
  train = jax.jit(
    lambda key: tuned.apply(
      theta, held, VIDEO, query=QUERY, deterministic=False, rngs={'dropout': key}
    )['last']
  )
  one, other = train(jax.random.key(0)), train(jax.random.key(1))
  assert np.abs(one - other).max() > 1e-3
  with pytest.raises(ValueError, match='r2_tuning dropout at .* needs a random key'):
    tuned.apply(theta, held, VIDEO, query=QUERY, deterministic=False)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: r2_tuning(4, states=5), 'states=5, and 3 blocks have 4'),
    (lambda: r2_tuning(4, strides=(1, 3)), 'powers of 2'),
    (lambda: r2_tuning(4, width=6, heads=4), 'a multiple of heads=4'),
    (lambda: r2_tuning(4, dropout=1), 'below 1'),
  ],
)
def test_bad_options(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, VIDEO)


def test_a_query_of_another_shape_is_an_error(small):
  _, held, tuned, theta = small
  with pytest.raises(
    ValueError, match=r'query is \[2, 2, 6, 10\], and 2 videos need \[2, 3, words, 10\]'
  ):
    tuned.apply(theta, held, VIDEO, query=QUERY[:, 1:])
