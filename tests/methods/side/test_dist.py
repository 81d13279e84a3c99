"""DiST: counts, the layout of frames, what flows between the two encoders, numbers beside numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.side.dist import dist, logits, stem, temporal
from jpeft.models import ViT
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.methods.small import attached, shapes_of, vit

T, STRIDE = 4, 2
VIDEO = jax.random.normal(jax.random.key(5), (2 * T, 8, 8, 3))
SMALL = {'frames': T, 'stride': STRIDE, 'width': 16, 'channels': 6, 'out': 7}


def test_counts_as_published():
  b16 = ViT(width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, scan=True)
  for pooling, count in ((2, 19_001_184), (4, 26_105_184)):
    clips = jax.ShapeDtypeStruct((16, 224, 224, 3), jnp.float32)
    assert jpeft.count(shapes_of(b16, dist(16, 2, pooling=pooling), clips).shapes) == count
  l14 = ViT(width=1024, depth=24, heads=16, mlp_dim=4096, patch_size=14, scan=True)
  clips = jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.float32)
  found = jpeft.count(shapes_of(l14, dist(64, 2, out=768), clips).shapes)
  assert found == 32_831_712 - 3 * 96 * 5 * (
    16**2 - 14**2
  )  # published with a stem for patches of 16


def run(tuned, theta, held, video=VIDEO):
  return jax.jit(lambda theta, video: tuned.apply(theta, held, video))(theta, video)


@pytest.fixture(scope='module')
def small():
  model, held = vit()
  return model, held, *attached(model, held, dist(**SMALL), VIDEO)


def conv(p, x, pad):
  """A convolution [T, h, w, C] by loops over its kernel; pad in time and in space."""
  k = np.asarray(p['kernel'])
  a, b = pad
  x = np.pad(x, [(a, a), (b, b), (b, b), (0, 0)])
  size = [n - m + 1 for n, m in zip(x.shape, k.shape, strict=False)]
  out = np.zeros((*size[:3], k.shape[-1]))
  for i, j, l in np.ndindex(*k.shape[:3]):
    out += x[i : i + size[0], j : j + size[1], l : l + size[2]] @ k[i, j, l]
  return out + p['bias']


def norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['shift']


def gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def attended(p, q, x, heads=1):
  softmax = lambda a: (
    np.exp(a - a.max(-1, keepdims=True))
    / np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True)
  )
  query, held = norm(p['norm'], q), norm(p['norm'], x)
  a = softmax(linear(p['q'], query) @ linear(p['k'], held).T / np.sqrt(q.shape[-1]))
  q = q + linear(p['o'], a @ linear(p['v'], held))
  return q + linear(p['down'], gelu(linear(p['up'], norm(p['mlp_norm'], q))))


def by_numpy(t, video, taps):
  """z of one clip: video [T, 8, 8, 3], taps [layers][t, 5, d]."""
  row = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)
  k = np.asarray(t['stem']['kernel'])
  pixels = np.pad(video, [(2, 2), (0, 0), (0, 0), (0, 0)])
  patches = pixels.reshape(T + 4, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
  x = (
    sum(np.einsum('thwabc,abcd->thwd', patches[i : i + T], k[i]) for i in range(5))
    + t['stem']['bias']
  )
  r = 0
  for i, h in enumerate(taps):
    p = row(t['layers'], i)
    x = gelu(x + conv(p['space'], gelu(conv(p['time'], norm(p['norm'], x), (1, 0))), (0, 1)))
    m = linear(row(t['taps'], i), h) + r
    back = np.repeat(linear(p['to_time'], m[:, 1:]).reshape(T // STRIDE, 2, 2, -1), STRIDE, 0)
    a = np.asarray(p['from_time']['kernel'])[:, 0, 0]
    seen = sum(x[j::STRIDE] @ a[j] for j in range(STRIDE)) + p['from_time']['bias']
    m = m + np.concatenate([p['cls'], seen.reshape(T // STRIDE, 4, -1)], 1)
    ffn = linear(p['ffn2'], gelu(linear(p['ffn1'], norm(p['ffn_norm'], m))))
    y = linear(p['tffn1'], norm(p['tffn_norm'], m))[:, :, None]
    y = linear(p['tffn3'], gelu(conv(p['tffn2'], y, (1, 0))[:, :, 0]))
    r, x = ffn + y, x + back
  f, s, v = r + m, [t['frame_query'][None]] * (T // STRIDE), t['clip_query'][None]
  for i in range(2):
    s = [attended(row(t['frame'], i), q, tokens) for q, tokens in zip(s, f, strict=True)]
    v = attended(row(t['clip'], i), v, np.concatenate(s) + t['position'][i])
  return norm(t['norm'], v[0] + linear(t['residual'], taps[-1][:, 0].mean(0))) @ t['project']


def states(model, held, images):
  """Outputs of the blocks of `vit`."""
  keep = lambda module, _: module.name is not None and module.name.startswith('block_')
  run = functools.partial(model.apply, capture_intermediates=keep, mutable=['intermediates'])
  _, state = jax.jit(run)(held, images)
  return [
    np.asarray(state['intermediates']['encoder'][f'block_{i}']['__call__'][0]) for i in range(3)
  ]


@pytest.mark.parametrize('fields', [{}, {'scan': True}])
def test_the_embedding_of_a_clip_is_that_of_the_equations(fields, small):
  model, held, tuned, theta = small
  clips = np.asarray(VIDEO).reshape(2, T, 8, 8, 3)
  seen = states(model, held, clips[:, ::STRIDE].reshape(-1, 8, 8, 3))
  t = theta['dist']['']
  if fields:
    blocks = [held['params']['encoder'][f'block_{i}'] for i in range(3)]
    held = {
      'params': {
        **held['params'],
        'encoder': {'blocks': jax.tree.map(lambda *x: jnp.stack(x), *blocks)},
      }
    }
    tuned = jpeft.attach(vit(**fields)[0], dist(**SMALL), held, VIDEO)
  got = run(tuned, theta, held)
  want = [by_numpy(t, clips[i], [x[i * 2 : i * 2 + 2] for x in seen]) for i in range(2)]
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_without_messages_the_encoders_are_apart(small):
  _, held, tuned, theta = small
  t = theta['dist']['']
  layers = {
    **t['layers'],
    **{n: jax.tree.map(jnp.zeros_like, t['layers'][n]) for n in ('to_time', 'from_time')},
  }
  apart = {'dist': {'': {**t, 'layers': layers}}}
  unseen = VIDEO.reshape(2, T, 8, 8, 3).at[:, 1::STRIDE].add(1.0).reshape(VIDEO.shape)
  assert np.abs(run(tuned, theta, held) - run(tuned, theta, held, unseen)).max() > 1e-3
  np.testing.assert_array_equal(run(tuned, apart, held), run(tuned, apart, held, unseen))


def test_the_class_token_counts_twice(small):
  _, held, tuned, theta = small
  t = theta['dist']['']
  without = {'residual': jax.tree.map(jnp.zeros_like, t['residual'])}
  grads = jax.jit(jax.grad(lambda t: tuned.apply({'dist': {'': t}}, held, VIDEO).sum()))
  for off in ({}, without):
    assert np.abs(grads({**t, **off})['taps']['kernel'][-1]).max() > 0
  assert (
    np.abs(run(tuned, {'dist': {'': {**t, **without}}}, held) - run(tuned, theta, held)).max()
    > 1e-3
  )


def test_frames_that_are_alike_have_features_that_are_alike_but_near_the_ends(small):
  p = small[3]['dist']['']
  video = jnp.broadcast_to(VIDEO[:1], (1, 16, 8, 8, 3))
  x = np.asarray(temporal(jax.tree.map(lambda x: x[0], p['layers']), stem(p['stem'], video)))[0]
  for i in range(3, 13):
    np.testing.assert_allclose(x[i], x[7], atol=1e-5)
  assert all(np.abs(x[i] - x[7]).max() > 1e-3 for i in (0, 1, 2, 13, 14, 15))


def test_clips_do_not_mix_and_nothing_of_the_encoder_moves(small):
  _, held, tuned, theta = small
  other = VIDEO.at[T:].set(0.0)
  np.testing.assert_allclose(
    run(tuned, theta, held, other)[0], run(tuned, theta, held)[0], atol=1e-5
  )
  grads = jax.jit(jax.grad(lambda held: tuned.apply(theta, held, VIDEO).sum()))(held)
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_logits_are_scaled_cosines():
  z, texts = jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 0.0], [0.0, 5.0]])
  np.testing.assert_allclose(logits(z, texts, np.log(10.0)), [[6.0, 8.0]], rtol=1e-5)


def test_a_model_in_nnx():
  b = BACKBONES['nnx_vit_scan']
  with described(b):
    tuned = jpeft.attach(b.model, dist(**{**SMALL, 'frames': 2}), b.backbone, *b.args)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), b.backbone))
  assert jax.jit(tuned.apply)(theta, b.backbone, *b.args).shape == (len(b.args[0]) // 2, 7)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: dist(frames=5), 'stride=2 does not divide frames=5'),
    (lambda: dist(0), 'frames=0 must be'),
    (lambda: dist(exit='{norm}'), 'names 6 modules that are called'),
  ],
)
def test_bad_options(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, VIDEO)


def test_half_a_clip_is_an_error(small):
  _, held, tuned, theta = small
  with pytest.raises(ValueError, match='6 images are no whole clips of 4 frames'):
    tuned.apply(theta, held, VIDEO[:6])
