"""UniPT: counts, the alignment, the gate, no recurrence, masks, and what gets a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import count
from jpeft.methods.side.unipt import align, mean
from jpeft.models import T5, Bert, ViT
from tests.fixtures import noisy
from tests.methods.small import IMAGES, MASK, TOKENS, attached, shapes_of, t5, vit


def bert(**fields):
  model = Bert(width=32, depth=3, heads=4, mlp_dim=64, vocab=50, pool='tokens', **fields)
  return model, noisy(model.init(jax.random.key(0), TOKENS), 0.05)


@pytest.mark.parametrize('scan', [False, True])
def test_the_text_module_counts_as_published(scan):
  model = Bert(width=768, depth=12, heads=12, mlp_dim=3072, vocab=100, pool='tokens', scan=scan)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  tuned = shapes_of(model, jpeft.unipt(2, 'retrieval', out=1024), tokens)
  assert count(tuned.shapes) == 13 * (768 * 512 + 512 + 1024) + 263_680 + 525_312 + 513 == 5_921_281


@pytest.mark.parametrize('width, numbers', [(768, 5_644_289), (512, 3_940_353)])
def test_the_towers_of_clip_count_as_published(width, numbers):
  model = ViT(
    width=width, depth=12, heads=8, mlp_dim=4 * width, patch_size=32, image_size=64, num_classes=512
  )
  tuned = shapes_of(model, jpeft.unipt_global(1), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
  assert count(tuned.shapes) == numbers


def test_alignment_of_two_keys():
  q, p = jnp.array([[[1.0, 0.0]]]), jnp.array([[[2.0, 0.0], [-1.0, 1.0]]])
  np.testing.assert_allclose(align(q, p), [[[2.0, 0.0]]])
  np.testing.assert_array_equal(align(-q, p[:, :1]), np.zeros((1, 1, 2)))  # no score is positive


def test_means_are_those_of_what_a_token_sees():
  x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  causal = np.tril(np.ones((1, 3, 3), bool))
  want = np.stack([x[:, : i + 1].mean(1) for i in range(3)], 1)
  np.testing.assert_allclose(mean(x, causal), want, atol=1e-6)
  padded = np.array([[[1, 1, 0]], [[1, 1, 1]]], bool)
  np.testing.assert_allclose(mean(x, padded)[:, 0], [x[0, :2].mean(0), x[1].mean(0)], atol=1e-6)


def reference(t, states, norm):
  """The output of 'tokens' in numpy, from h_0 .. h_L; `norm` is LayerNorm."""
  lin = lambda t, x: x @ np.asarray(t['kernel']) + np.asarray(t['bias'])
  pick = lambda t, i: jax.tree.map(lambda x: np.asarray(x)[i], t)
  p = [
    norm(lin(pick(t['layers']['down'], i), h), pick(t['layers']['norm'], i))
    for i, h in enumerate(states)
  ]
  q, scores, aligned = p[-1], [], []
  for k in p[:-1]:
    a = np.maximum(np.einsum('bnm,bkm->bnk', q, k), 0)
    a = a / np.maximum(a.sum(-1, keepdims=True), 1e-6) + np.eye(a.shape[-1])
    aligned.append(a @ k)
    scores.append(lin(t['gate'], q.mean(1) * k.mean(1)))
  e = np.exp(np.stack(scores) - np.max(scores))
  w = e / e.sum(0)
  np.testing.assert_allclose(w.sum(0), 1, atol=1e-6)
  total = sum(w[i][:, None] * a for i, a in enumerate(aligned))
  side = lin(t['proj']['out'], np.maximum(lin(t['proj']['in'], total), 0))
  return lin(t['up'], q + norm(side, jax.tree.map(np.asarray, t['proj']['norm'])))


def layer_norm(x, t):
  y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  return y * t['scale'] + t['shift']


def spied():
  """A method that returns the states of a ViT beside its output."""

  def record(t, call, *args, **kwargs):
    call.tap(x=args[0])
    return call(*args, **kwargs)

  def read(t, call, *args, **kwargs):
    call(*args, **kwargs)
    return [x['x'] for x in call.taps().values()]

  return jpeft.chain(
    jpeft.at('{block}|{final_norm}', jpeft.Call('read', record, taps=True)),
    jpeft.at('', jpeft.Call('read', read, taps=True)),
  )


def test_the_output_is_the_formula():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.unipt(4), IMAGES)
  states = jpeft.attach(model, spied(), held, IMAGES).apply({}, held, IMAGES)
  want = reference(theta['unipt']['final_norm'], [np.asarray(x) for x in states], layer_norm)
  head = held['params']['head']
  np.testing.assert_allclose(
    tuned.apply(theta, held, IMAGES), want[:, 0] @ head['kernel'] + head['bias'], atol=1e-4
  )


def test_no_layer_reads_another():
  """Exchanging two blocks' states with their parameters changes nothing: blocks that do nothing
  give equal states.
  """
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.unipt(4), IMAGES)
  t = theta['unipt']['final_norm']
  blocks = held['params']['encoder']
  for block in blocks.values():
    block['attention']['out'] = jax.tree.map(jnp.zeros_like, block['attention']['out'])
    block['mlp']['fc2'] = jax.tree.map(jnp.zeros_like, block['mlp']['fc2'])
  order = jnp.array([2, 0, 1, 3])
  other = {**t, 'layers': jax.tree.map(lambda x: x[order], t['layers'])}
  got = tuned.apply({'unipt': {'final_norm': other}}, held, IMAGES)
  np.testing.assert_allclose(got, tuned.apply(theta, held, IMAGES), atol=1e-5)


def test_a_gate_of_zero_weighs_all_alike():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.unipt(4), IMAGES)
  t = theta['unipt']['final_norm']
  flat = {**t, 'gate': jax.tree.map(jnp.zeros_like, t['gate'])}
  shifted = {**flat, 'gate': {**flat['gate'], 'bias': jnp.full(1, 3.0)}}
  outs = [tuned.apply({'unipt': {'final_norm': x}}, held, IMAGES) for x in (flat, shifted)]
  np.testing.assert_allclose(*outs, atol=1e-6)


@pytest.mark.parametrize('form', ['tokens', 'retrieval'])
def test_padding_reaches_no_other_token(form):
  model, held = bert()
  tuned = jpeft.attach(model, jpeft.unipt(4, form), held, TOKENS, mask=MASK)
  theta = noisy(tuned.init(jax.random.key(0), held))
  other = jnp.where(MASK == 0, 7, TOKENS)
  one, two = (tuned.apply(theta, held, x, mask=MASK) for x in (TOKENS, other))
  real = np.asarray(MASK, bool)
  np.testing.assert_array_equal(np.asarray(one)[real], np.asarray(two)[real])
  assert not np.allclose(one[~real], two[~real])


def test_a_decoder_sees_no_later_token_and_reads_the_encoder():
  model, held = t5()
  tuned, theta = attached(model, held, jpeft.unipt(4), TOKENS, TOKENS)
  out = lambda a, b: np.asarray(tuned.apply(theta, held, a, b))
  later = TOKENS.at[:, 4:].set(9)
  np.testing.assert_array_equal(out(TOKENS, TOKENS)[:, :4], out(TOKENS, later)[:, :4])
  grads = jax.grad(lambda theta: jnp.square(tuned.apply(theta, held, TOKENS, TOKENS)).sum())(theta)[
    'unipt'
  ]
  for path in ('encoder/final_norm', 'decoder/final_norm'):
    del grads[path]['gate']['bias']  # adds the same to all that a softmax compares
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads[path])), path


@pytest.mark.parametrize(
  'make, options',
  [
    (jpeft.unipt, {'reduction': 4}),
    (jpeft.unipt, {'reduction': 4, 'downsample': 'pool'}),
    (jpeft.unipt_global, {}),
  ],
)
def test_every_projection_learns_and_remat_changes_nothing(make, options):
  model, held = vit()
  tuned, theta = attached(model, held, make(**options), IMAGES)
  again = jpeft.attach(model, make(remat=True, **options), held, IMAGES)
  loss = lambda tuned: jax.jit(jax.grad(lambda t: jnp.square(tuned.apply(t, held, IMAGES)).sum()))(
    theta
  )
  grads = loss(tuned)
  ((t,),) = (sites.values() for sites in grads.values())
  for layer in jax.tree.leaves(t['layers']):
    assert (np.abs(layer).reshape(len(layer), -1).max(1) > 0).all()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, loss(again)
  )


def test_a_zero_update_leaves_the_embedding():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.unipt_global(1), IMAGES)
  theta['unipt_global']['head']['up'] = jax.tree.map(
    jnp.zeros_like, theta['unipt_global']['head']['up']
  )
  np.testing.assert_array_equal(tuned.apply(theta, held, IMAGES), model.apply(held, IMAGES))


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: jpeft.unipt(form='tokenz'), "form='tokenz' is none of"),
    (lambda: jpeft.unipt(0), 'must be at least 1'),
    (lambda: jpeft.unipt_global(embedding='{embed}'), 'a pooled embedding'),
    (lambda: jpeft.unipt(downsample='pool', width=5), 'does not divide the width 32'),
  ],
)
def test_bad_options_are_said_before_any_work(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, IMAGES)


def test_a_t5_is_no_single_tower():
  model = T5(width=32, depth=1, heads=4, mlp_dim=64, vocab=50, head_dim=8, tied=False)
  with pytest.raises(ValueError, match='there are 2 exits'):
    shapes_of(model, jpeft.unipt_global(1), TOKENS, TOKENS)
