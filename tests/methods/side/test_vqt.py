"""VQT: the second query stream, what it costs to keep, the head, and the selection of features."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.side.features import group_lasso, select
from jpeft.methods.side.vqt import along_slopes
from jpeft.models import Bert, ViT
from tests.fixtures import noisy
from tests.kept import residuals
from tests.methods.small import IMAGES, MASK, TOKENS, attached, shapes_of, vit

BIG = dict(width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, image_size=224)
PIXELS = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('tokens, classes, numbers', [(1, 100, 1_007_716), (20, 10, 2_035_210)])
def test_counts_are_the_papers(tokens, classes, numbers, scan):
  tuned = shapes_of(ViT(**BIG, num_classes=classes, scan=scan), jpeft.vqt(tokens), PIXELS)
  assert jpeft.summary(tuned).trainable == numbers


def test_the_start():
  model = ViT(
    width=768, depth=1, heads=12, mlp_dim=64, patch_size=16, image_size=16, num_classes=100
  )
  x = jnp.zeros((1, 16, 16, 3))
  held = jax.jit(model.init)(jax.random.key(0), x)
  t = jpeft.attach(model, jpeft.vqt(10), held, x).init(jax.random.key(0), held)['vqt']
  queries = np.abs(t['encoder/block_0']['queries'])
  assert queries.max() <= 0.0625 and queries.max() > 0.062
  np.testing.assert_allclose(t['head']['bias'], -4.59512, rtol=1e-6)
  assert np.std(t['encoder/block_0']['kernel']) == pytest.approx(math.sqrt(2 / 100), rel=0.02)


def seen(model, held, theta, tuned, **kwargs):
  """(logits, the inputs of the blocks and of the head) of a run."""

  def record(t, call, x, *args, **kwargs):
    call.tap(input=x)
    return call(x, *args, **kwargs)

  def read(t, call, *args, **kwargs):
    return call(*args, **kwargs), {p: x['input'] for p, x in call.taps().items() if 'input' in x}

  spy = jpeft.chain(
    jpeft.at('{block}|{head}', jpeft.Call('read', record, taps=True)),
    jpeft.at('', jpeft.Call('read', read, taps=True)),
  )
  both = jpeft.attach(model, jpeft.chain(tuned.method, spy) if tuned else spy, held, IMAGES)
  return both.apply(theta, held, IMAGES, **kwargs)


@pytest.mark.parametrize('fields', [{}, {'scan': True}])
def test_the_models_own_tokens_do_not_see_the_queries(fields):
  model, held = vit(**fields)
  tuned, theta = attached(model, held, jpeft.vqt(2), IMAGES)
  _, plain = seen(model, held, {}, None)
  _, beside = seen(model, held, theta, tuned)
  jax.tree.map(np.testing.assert_array_equal, plain, beside)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize('options', [{'keep': 'keys'}, {'keep': 'slopes'}, {'remat': True}])
def test_a_second_stream_is_one_sequence_whose_queries_are_no_keys(options):
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.vqt(2, **options), IMAGES)
  logits, inputs = seen(model, held, theta, tuned)
  sites = jpeft.attach(model, jpeft.vqt(2), held, IMAGES).sites
  t = theta['vqt']
  want = (
    unit(np.asarray(inputs['head'])) * t['head']['keep'] @ t['head']['kernel'] + t['head']['bias']
  )
  for i in range(3):
    path = f'encoder/block_{i}'
    x, q = inputs[path], jnp.broadcast_to(t[path]['queries'], (2, 2, 32))
    mask = jnp.arange(7) >= 2
    z = sites[path].module.apply(
      {'params': held['params']['encoder'][f'block_{i}']},
      jnp.concatenate([q, x], 1),
      mask=mask[None, None, None],
    )[:, :2]
    chunk = unit(np.asarray(z.reshape(2, -1)))
    np.testing.assert_allclose(np.linalg.norm(chunk, axis=-1), 1, rtol=1e-6)
    want = want + chunk * t[path]['keep'] @ t[path]['kernel']
  np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize('options', [{'keep': 'slopes'}, {'remat': True}])
def test_a_block_has_its_own_queries_and_what_is_kept_changes_no_gradient(options):
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.vqt(2, keep='keys'), IMAGES)
  again = jpeft.attach(model, jpeft.vqt(2, **options), held, IMAGES)
  for path in theta['vqt']:
    if path != 'encoder/block_1':
      theta['vqt'][path]['kernel'] = jnp.zeros_like(theta['vqt'][path]['kernel'])
  grads, same = (
    jax.jit(jax.grad(lambda t, tuned=tuned: jnp.square(tuned.apply(t, held, IMAGES)).sum()))(theta)[
      'vqt'
    ]
    for tuned in (tuned, again)
  )
  moved = {p: bool(jnp.any(g['queries'])) for p, g in grads.items() if 'queries' in g}
  assert moved == {'encoder/block_0': False, 'encoder/block_1': True, 'encoder/block_2': False}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, same)


def kept(method, **fields) -> int:
  """Bytes that the backward pass keeps, of 6 blocks of width 128 on 4 images of 64 patches; weights
  count once.
  """
  sizes = dict(
    width=128, depth=6, heads=4, mlp_dim=512, patch_size=4, image_size=32, num_classes=10
  )
  model = ViT(**{**sizes, **fields})
  images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
  held = jax.eval_shape(model.init, jax.random.key(0), images)
  tuned = jpeft.attach(model, method, held, images)
  return jpeft.nbytes(residuals(tuned.apply, tuned.shapes, held, images))


def test_no_residual_of_full_width_is_kept():
  """The residuals of one sequence with prompts are 28 MB by the paper's code, those of a second
  stream 5.8 MB.
  """
  stream, lean = kept(jpeft.vqt(1, keep='keys')), kept(jpeft.vqt(1, remat=True))
  assert stream < 5.81e6 * 65 / 64 and lean < stream  # the class token is one more
  wide = kept(jpeft.vqt(1, keep='keys'), mlp_dim=1024)
  weights, row = 6 * 2 * 128 * 512 * 4, 6 * 4 * 512 * 4
  assert (
    wide - stream <= weights + 4 * row
  )  # of the MLP its weights and the one token, not N of its hidden layer
  assert kept(jpeft.vpt_deep(1)) > 4 * stream


def test_slopes_are_kept_where_they_are_smaller_than_keys_and_values():
  """Of 65 tokens 2 x 65 numbers a feature, of T queries T x 32, in heads of 32 features."""
  keys, slopes = (kept(jpeft.vqt(1, keep=keep)) for keep in ('keys', 'slopes'))
  assert kept(jpeft.vqt(1)) == slopes
  features = 4 * 6 * 4 * 128  # bytes of a feature's number in 4 images, 6 blocks
  assert keys - slopes > features * (130 - 32)  # nor what is made again of the run on T tokens
  assert kept(jpeft.vqt(4)) == kept(jpeft.vqt(4, keep='slopes'))
  assert kept(jpeft.vqt(5)) == kept(jpeft.vqt(5, keep='keys'))


def test_the_slopes_of_masked_attention_in_groups_of_heads_are_its_gradient():
  key_q, key_k, key_v, key_w = jax.random.split(jax.random.key(0), 4)
  query = jax.random.normal(key_q, (2, 3, 4, 8))
  key, value = (jax.random.normal(k, (2, 7, 2, 8)) for k in (key_k, key_v))
  weights = jax.random.normal(key_w, query.shape)
  mask = (jnp.arange(7) < 5)[None, None, None]

  def read(query):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)

  wanted = jax.vjp(read, query)
  found = jax.vjp(functools.partial(along_slopes, read), query)
  np.testing.assert_array_equal(found[0], wanted[0])
  np.testing.assert_allclose(found[1](weights)[0], wanted[1](weights)[0], atol=1e-5)


def test_group_lasso_and_selection():
  t = {'a': {'kernel': jnp.array([[3.0, 4.0], [0.0, 0.0]]), 'keep': jnp.ones(2)}}
  assert float(group_lasso(t)) == 5
  assert not np.isnan(
    jax.grad(group_lasso)({'a': {'kernel': t['a']['kernel']}})['a']['kernel']
  ).any()
  fresh = {'a': {'kernel': jnp.ones((2, 2)), 'keep': jnp.ones(2)}}
  chosen = select(t, 0.5, fresh)
  np.testing.assert_array_equal(chosen['a']['keep'], [1, 0])
  np.testing.assert_array_equal(chosen['a']['kernel'], 1)
  with pytest.raises(ValueError, match='keeps 0 of 2'):
    select(t, 0.1, fresh)


@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
@pytest.mark.parametrize(
  'make', [functools.partial(jpeft.vqt, 2), jpeft.head2toe], ids=['vqt', 'head2toe']
)
def test_training_adds_the_penalty(make, scan):
  """The loss and its gradient with lasso are those of the task and of `group_lasso` over theta."""
  model, held = vit(scan=scan)
  options = {'taps': '{block}'} if make is jpeft.head2toe else {}
  tuned, theta = attached(model, held, make(lasso=0.01, **options), IMAGES)
  plain = jpeft.attach(model, make(**options), held, IMAGES)
  assert tuned.has_loss and not plain.has_loss
  (name,) = theta

  def task(out):
    return jnp.square(out).mean()

  def minimised(theta):
    run = functools.partial(tuned.apply, theta, held, IMAGES, aux=True)
    value, out, _ = tuned.objective(run, task)
    return value, out

  def wanted(theta):
    return task(plain.apply(theta, held, IMAGES)) + 0.01 * group_lasso(theta[name])

  assert float(wanted(theta)) > float(task(plain.apply(theta, held, IMAGES))) + 0.01
  (value, out), found = jax.jit(jax.value_and_grad(minimised, has_aux=True))(theta)
  np.testing.assert_allclose(value, wanted(theta), rtol=1e-5)
  np.testing.assert_allclose(out, plain.apply(theta, held, IMAGES), atol=1e-5)
  expected = jax.jit(jax.grad(wanted))(theta)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_what_is_not_selected_is_not_read():
  model, held = vit(scan=True)
  tuned, theta = attached(model, held, jpeft.vqt(2), IMAGES)
  fresh = jax.jit(tuned.init)(jax.random.key(3), held)
  t = select(theta['vqt'], 0.3, fresh['vqt'])
  assert jax.tree.map(jnp.shape, t) == jax.tree.map(jnp.shape, theta['vqt'])
  assert sum(float(s['keep'].sum()) for s in t.values()) == int(0.3 * (32 + 3 * 64))
  np.testing.assert_array_equal(
    t['encoder/blocks']['queries'], theta['vqt']['encoder/blocks']['queries']
  )
  grads = jax.grad(lambda t: jnp.square(tuned.apply({'vqt': t}, held, IMAGES)).sum())(t)
  for path, g in grads.items():
    dropped = np.asarray(t[path]['keep']) == 0
    assert dropped.any() and not np.asarray(g['kernel'])[dropped].any()


def test_masks_let_a_summary_see_what_any_token_sees():
  model = Bert(width=32, depth=2, heads=4, mlp_dim=64, vocab=50, num_classes=3)
  held = noisy(model.init(jax.random.key(0), TOKENS), 0.05)
  tuned, theta = attached(model, held, jpeft.vqt(2), TOKENS, mask=MASK)
  other = jnp.where(MASK == 0, 7, TOKENS)
  np.testing.assert_array_equal(*(tuned.apply(theta, held, x, mask=MASK) for x in (TOKENS, other)))


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: jpeft.vqt(0), 'whole number'),
    (lambda: jpeft.vqt(keep='key'), "keep='key' is none of None, 'keys', 'slopes'"),
    (lambda: jpeft.vqt(keep='keys', remat=True), 'leave one of them out'),
    (lambda: jpeft.vqt(lasso=-1), 'lasso=-1 must be at least 0'),
    (lambda: jpeft.head2toe(lasso=-1), 'lasso=-1 must be at least 0'),
    (lambda: jpeft.vqt(head='{norm}'), 'names 6 modules'),
    (lambda: jpeft.vqt(head='{final_norm}'), 'one prediction'),
    (lambda: jpeft.vqt(attention='{mlp}'), 'no attention_fn'),
    (lambda: jpeft.vqt(attention='encoder/block_0/attention'), 'no module of the block'),
  ],
)
def test_bad_options_are_said_before_any_work(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, IMAGES)
