"""QST: counts, downsamplers, gates and blends by hand, what reads what, what is kept, and decoding
with two caches.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.core import count
from jpeft.decoding import generate, pad_left
from jpeft.models import Llama
from tests.fixtures import noisy
from tests.models.test_llama import LLAMA_2_7B
from tests.params import fast_if

TOKENS = jnp.array([[3, 9, 4, 1, 7, 7, 2], [8, 2, 2, 5, 0, 11, 6]])


@functools.cache
def llama(**fields):
  model = Llama(
    **{'width': 64, 'depth': 3, 'heads': 4, 'kv_heads': 2, 'mlp_dim': 96, 'vocab': 13, **fields}
  )
  held = jax.jit(model.init)(jax.random.key(1), TOKENS)
  return model, noisy(held, 0.1)


def attached(theta_seed=0, scan=True, noise=0.0, quantized=False, **options):
  """(tuned, theta, backbone) on a small decoder, its kernels in 4 bits if asked for."""
  model, held = llama(scan=scan)
  held = jpeft.quantize(model, jpeft.nf4(double=True), held, TOKENS) if quantized else held
  tuned = jpeft.attach(
    model, jpeft.qst(**{'reduction': 4, 'bottleneck': 3, **options}), held, TOKENS, mask=TOKENS
  )
  theta = jax.jit(tuned.init)(jax.random.key(theta_seed), held)
  return tuned, noisy(theta, noise) if noise else theta, held


def run(tuned, theta, held, tokens=TOKENS):
  return jax.jit(tuned.apply)(theta, held, tokens, mask=jnp.ones_like(tokens))


@pytest.mark.parametrize('blend', ('alpha', 'code'))
def test_the_count_on_llama_2_7b_is_the_papers(blend):
  model = models.from_config(LLAMA_2_7B, scan=True)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert count(jpeft.attach(model, jpeft.qst(16, blend=blend), held, tokens).shapes) == 28_623_104


@pytest.mark.parametrize(('kind', 'want'), (('avg', [8.5, 24.5]), ('max', [16, 32])))
def test_pools_by_hand(kind, want):
  """What the taps hold of a stream that counts its channels."""
  tuned, theta, held = attached(downsample=kind, reduction=16)
  assert 'down' not in theta['qst']['final_norm']
  held = jax.tree.map(jnp.zeros_like, held)
  held['params']['embed']['embedding'] += jnp.arange(1.0, 65)
  program = jpeft.cut(
    lambda theta, held, tokens: tuned.apply(theta, held, tokens), tuned.shapes, held, TOKENS
  )
  features = [np.asarray(f) for f in program.first(held, TOKENS)]
  assert any(f.shape[-1] == 4 and np.allclose(f[..., :2], want) for f in features)


def test_gates_and_blends_start_as_published():
  for blend, start in (('code', 0.731059), ('code_opt', 0.731059), ('alpha', 1.0)):
    t = attached(blend=blend)[1]['qst']['final_norm']
    np.testing.assert_allclose(jax.nn.sigmoid(t['gate']), 0.622459, atol=1e-6)
    assert t['gate'].shape == (3, 16) and t['blend'].shape == (64,)
    share = 1 - t['blend'] if blend == 'alpha' else jax.nn.sigmoid(t['blend'])
    np.testing.assert_allclose(share, start, atol=1e-6)


@pytest.mark.parametrize(
  ('downsample', 'scan'),
  fast_if(lambda downsample, scan: scan, (('adapter', True), ('max', False))),
)
def test_it_starts_as_the_4_bit_backbone(scan, downsample):
  tuned, theta, held = attached(scan=scan, downsample=downsample, quantized=True)
  theta = noisy(theta)
  theta['qst']['final_norm']['blend'] *= 0
  want = jax.jit(tuned.model.apply)(held, TOKENS, mask=jnp.ones_like(TOKENS))
  np.testing.assert_array_equal(run(tuned, theta, held), want)


def test_bfloat16_starts_as_the_backbone_too_and_leaves_it_by_small_steps():
  model, held = llama(scan=True, dtype=jnp.bfloat16)
  tuned = jpeft.attach(model, jpeft.qst(4), held, TOKENS)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  np.testing.assert_array_equal(
    jax.jit(tuned.apply)(theta, held, TOKENS), jax.jit(model.apply)(held, TOKENS)
  )
  theta['qst']['final_norm']['blend'] += 1e-4  # which 1 - a in bfloat16 would not tell from 0
  total = lambda t: tuned.apply(t, held, TOKENS).astype(jnp.float32).sum()
  grads = jax.jit(jax.grad(total))(theta)['qst']['final_norm']
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def by_hand(model, held, t, blend, downsample, tokens):
  """Logits of the method in numpy, around the model's own blocks one after the other."""
  sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))
  params = held['params']
  block_of = lambda module, p: (
    lambda s: np.asarray(module.apply({'params': p}, jnp.asarray(s, jnp.float32)))
  )
  wide = models.LlamaBlock(heads=4, head_dim=16, mlp_dim=96, kv_heads=2)
  slim = models.LlamaBlock(heads=4, head_dim=4, mlp_dim=24, kv_heads=2)
  states = [np.asarray(params['embed']['embedding'])[tokens]]
  for i in range(3):
    states.append(block_of(wide, params['decoder'][f'block_{i}'])(states[-1]))

  def down(i, h):
    if downsample in ('avg', 'max'):
      return getattr(h.reshape(*h.shape[:-1], 16, 4), {'avg': 'mean', 'max': 'max'}[downsample])(-1)
    d = jax.tree.map(lambda x: np.asarray(x[i], np.float64), t['down'])
    if downsample == 'linear':
      y = h @ d['kernel']
    else:
      y = h @ d['a']
      y = (y * sigmoid(y) if downsample == 'adapter' else y) @ d['b']
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y * d['norm']['scale'] + d['norm']['shift']

  def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)

  s = down(0, states[0])
  for i in range(3):
    z = sigmoid(t['gate'][i])
    s = block_of(slim, jax.tree.map(lambda x, i=i: x[i], t['blocks']))(
      z * s + (1 - z) * down(i, states[i + 1])
    )
  u = rms(s, t['norm']['scale']) @ np.asarray(t['up']['kernel']) + np.asarray(t['up']['bias'])
  h = rms(states[-1], params['final_norm']['scale'])
  a = {'alpha': lambda x: 1 - x, 'code': sigmoid, 'code_opt': lambda x: sigmoid(-x)}[blend](
    np.asarray(t['blend'])
  )
  return (a * h + (1 - a) * u) @ np.asarray(params['head']['kernel'])


@pytest.mark.parametrize(
  ('downsample', 'blend'),
  (
    ('adapter', 'alpha'),
    ('lora', 'code'),
    ('linear', 'code_opt'),
    ('avg', 'alpha'),
    ('max', 'code'),
  ),
)
def test_the_whole_against_numpy(downsample, blend):
  tuned, theta, held = attached(scan=False, noise=0.2, downsample=downsample, blend=blend)
  want = by_hand(
    tuned.model, held, theta['qst']['final_norm'], blend, downsample, np.asarray(TOKENS)
  )
  np.testing.assert_allclose(run(tuned, theta, held), want, atol=2e-4 * np.abs(want).max())


def test_the_backbone_is_frozen_and_the_first_downsampler_is_used_twice():
  tuned, theta, held = attached(noise=0.2, quantized=True)
  t = theta['qst']['final_norm']
  grad = jax.jit(jax.grad(lambda theta: jnp.square(run(tuned, theta, held)).sum()))

  def grads(z):
    """Gradients where layer 1 takes the share z of the stream, and the others all of it: no state
    but h_1 is read.
    """
    t['gate'] = jnp.stack([jnp.full(16, z), *[jnp.full(16, 1e3)] * 2])
    return grad(theta)['qst']['final_norm']['down']['a']

  embeddings, first = grads(1e3), grads(-1e3)
  for g in (embeddings, first):
    assert float(np.abs(g[0]).max()) > 1e-4 and float(np.abs(g[1:]).max()) == 0
  assert float(np.abs(embeddings - first).max()) > 1e-4
  floats = [x for x in jax.tree.leaves(held) if jnp.issubdtype(x.dtype, jnp.floating)]
  put = lambda new: jax.tree.map(
    lambda x: next(new) if jnp.issubdtype(x.dtype, jnp.floating) else x, held
  )
  found = jax.jit(jax.grad(lambda new: jnp.square(run(tuned, theta, put(iter(new)))).sum()))(floats)
  assert len(found) > 5 and not any(np.asarray(g).any() for g in found)


def test_the_last_state_is_read_by_the_side_and_by_the_blend():
  tuned, theta, held = attached(noise=0.2, scan=False)
  t = theta['qst']['final_norm']
  moved = jax.tree.map(lambda x: x, held)
  moved['params']['decoder']['block_2'] = noisy(moved['params']['decoder']['block_2'], 0.3)
  apply = jax.jit(tuned.apply)
  for share, gate in (
    (1.0, 0.5),
    (0.0, 1e3),
  ):  # of u alone, which reads h_3; of h alone, which no side block reads
    t['blend'], t['gate'] = jnp.full(64, share), jnp.full((3, 16), gate)
    assert (
      float(np.abs(jnp.subtract(*[apply(theta, held, TOKENS) for held in (moved, held)])).max())
      > 1e-2
    )


@pytest.mark.parametrize('scan', (True, False))
def test_what_is_kept_does_not_grow_with_the_backbones_inner_width(scan):
  def kept(mlp_dim):
    model, held = llama(scan=scan, mlp_dim=mlp_dim)
    tuned = jpeft.attach(model, jpeft.qst(4, block='attention', downsample='avg'), held, TOKENS)
    residuals = jax.eval_shape(
      lambda t: jax.vjp(lambda t: tuned.apply(t, held, TOKENS), t)[1], tuned.shapes
    )
    theta = [(x.shape, x.dtype) for x in jax.tree.leaves(tuned.shapes)]
    return sum(
      math.prod(x.shape) for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in theta
    )

  assert 0 < kept(96) == kept(960)


@pytest.mark.parametrize(
  ('options', 'message'),
  (
    ({'downsample': 'mean'}, "downsample='mean' is none of"),
    ({'blend': 'beta'}, "blend='beta' is none of"),
    ({'bottleneck': 0}, 'bottleneck=0 must be at least 1'),
    ({'reduction': 5}, 'does not divide the width 64'),
  ),
)
def test_bad_options_are_said_before_any_work(options, message):
  with pytest.raises(ValueError, match=message):
    attached(**options)


# ---- Decoding.

PROMPTS = ([5, 9, 3, 11, 7], [1, 12, 4])


MAKE = {
  'adapter': jpeft.qst(4),
  'layers': jpeft.qst(4, downsample='max', layers=(0, 2)),
  'lst': jpeft.lst(4, block='own', merge='gate'),
  'mlp': jpeft.lst(4, block='mlp', merge='add'),
}


@pytest.mark.parametrize(
  ('name', 'scan'),
  fast_if(
    lambda name, scan: scan == (name in ('adapter', 'lst')), itertools.product(MAKE, (True, False))
  ),
)
def test_decoding_with_caches_is_teacher_forcing(name, scan):
  make = MAKE[name]
  model, held = llama(scan=scan)
  tuned = jpeft.attach(model, make, held, TOKENS, mask=TOKENS)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held), 0.3)
  tokens, mask = (jnp.asarray(x) for x in pad_left(PROMPTS))
  text = jnp.concatenate([tokens, TOKENS], 1)
  seen = jnp.concatenate([mask, jnp.ones_like(TOKENS)], 1)
  want, plain = jax.jit(
    lambda theta, held: (
      tuned.apply(theta, held, text, mask=seen),
      model.apply(held, text, mask=seen),
    )
  )(theta, held)
  room = jax.eval_shape(
    lambda: tuned.apply(theta, held, text, mask=seen, mutable=['cache'])[1]['cache']
  )
  step = jax.jit(
    lambda cache, x, m: tuned.apply(theta, {**held, 'cache': cache}, x, mask=m, mutable=['cache'])
  )
  cache, got, start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), room), [], 0
  for size in (tokens.shape[1], *[1] * TOKENS.shape[1]):
    logits, state = step(cache, text[:, start : start + size], seen[:, start : start + size])
    cache, start = state['cache'], start + size
    got.append(logits)
  got = jnp.concatenate(got, 1)
  np.testing.assert_allclose(got[:, 2:], want[:, 2:], atol=1e-5 * float(np.abs(want).max()))
  assert float(np.abs(want - plain).max()) > 0.1


@pytest.mark.parametrize(
  ('method', 'cached'),
  (
    (jpeft.qst(4), True),
    (jpeft.qst(4, block='mlp'), True),
    (jpeft.qst(4, block='attention'), False),
  ),
  ids=('own', 'mlp', 'attention'),
)
def test_generation_uses_the_caches_where_it_can(method, cached):
  model, held = llama(scan=True)
  tuned = jpeft.attach(model, method, held, TOKENS, mask=TOKENS)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held), 0.3)
  tokens, mask = pad_left([*PROMPTS, [6, 0], [10]])
  with_cache, without = (
    generate(tuned, held, tokens, mask, theta=theta, new_tokens=6, cache=cache).tokens
    for cache in (True, False)
  )
  np.testing.assert_array_equal(with_cache, without)
  assert len({int(x) for x in with_cache.ravel()}) > 2
  jaxpr = jax.make_jaxpr(
    lambda: generate(tuned, held, tokens, mask, theta=theta, new_tokens=6).tokens
  )()
  assert ('f32[4,11,64]' not in str(jaxpr)) == cached  # states of the whole text
