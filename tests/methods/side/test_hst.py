"""HST: counts, the pyramid, its two keys, what crosses the backbone, and a head for dense
prediction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.nn import attend
from jpeft.methods.side.hst import resize
from jpeft.models import ViT
from tests.methods.small import IMAGES, attached, shapes_of, vit
from tests.params import fast_if

BIG = dict(
  width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, image_size=224, num_classes=100
)
PIXELS = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
SMALL = dict(widths=(4, 4, 8, 8), heads=(1, 2, 2, 4))


@pytest.mark.parametrize('scan', [False, True])
def test_the_count_is_the_papers(scan):
  tuned = shapes_of(ViT(**BIG, scan=scan), jpeft.hst(), PIXELS)
  assert jpeft.summary(tuned).trainable == 764_840 + 73 * 100


def test_the_maps_of_a_pyramid():
  model = ViT(**BIG)
  tuned = shapes_of(model, jpeft.hst(output='maps'), PIXELS)
  assert jpeft.summary(tuned).trainable == 764_840
  held = jax.eval_shape(model.init, jax.random.key(0), PIXELS)
  maps = jax.eval_shape(tuned.apply, tuned.shapes, held, PIXELS)
  assert [m.shape[1:] for m in maps] == [(56, 56, 32), (28, 28, 48), (14, 14, 64), (7, 7, 72)]


def test_two_keys_in_any_order():
  keys = jax.random.normal(jax.random.key(0), (2, 2, 8))
  x = jax.random.normal(jax.random.key(1), (2, 5, 8))
  t = {
    n: {'kernel': jax.random.normal(jax.random.key(i), (8, 8)), 'bias': jnp.ones(8)}
    for i, n in enumerate('qkvo')
  }
  np.testing.assert_allclose(attend(t, x, keys, 2), attend(t, x, keys[:, ::-1], 2), atol=1e-5)
  lin = lambda n, x: np.asarray(x) @ t[n]['kernel'] + 1
  q, k, v = (lin(n, a).reshape(2, -1, 2, 4) for n, a in (('q', x), ('k', keys), ('v', keys)))
  e = np.exp(np.einsum('bnhk,bmhk->bhnm', q, k) / 2)
  want = np.einsum('bhnm,bmhk->bnhk', e / e.sum(-1, keepdims=True), v).reshape(2, 5, 8)
  np.testing.assert_allclose(attend(t, x, keys, 2), lin('o', want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('size', [(8, 8), (4, 4), (2, 2), (1, 1), (3, 5)])
def test_what_is_constant_stays_so_at_every_grid(size):
  np.testing.assert_allclose(
    resize(jnp.full((1, 4, 4, 2), 3.0), size), np.full((1, *size, 2), 3), rtol=1e-6
  )


def test_bilinear_is_that_of_pixel_centres():
  x = jnp.arange(2.0).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(resize(x, (1, 4))[0, 0, :, 0], [0, 0.25, 0.75, 1], atol=1e-6)


@pytest.mark.parametrize('fields', fast_if(bool, [{}, {'scan': True}]))
def test_the_tokens_change_the_stream_and_learn_through_later_blocks(fields):
  model, held = vit(**fields)
  tuned, theta = attached(model, held, jpeft.hst(**SMALL), IMAGES)
  names = [p for p, t in theta['hst'].items() if 'meta' in t]

  def loss(theta, blind):
    t = theta['hst']['']
    if blind:  # cut what the first block hands to the pyramid
      t = {
        **t,
        'stage0': {**t['stage0'], 'bridge': jax.tree.map(jnp.zeros_like, t['stage0']['bridge'])},
      }
    return jnp.square(tuned.apply({'hst': {**theta['hst'], '': t}}, held, IMAGES)).sum()

  for blind in (False, True):
    grads = jax.jit(jax.grad(loss), static_argnums=1)(theta, blind)['hst']
    first = grads[names[0]]['meta'][0] if fields else grads[names[0]]['meta']
    assert np.abs(first).max() > 0
  assert all(
    np.abs(g).max() > 0 for p, t in grads.items() if 'norm' in p for g in jax.tree.leaves(t)
  )
  trained = {p.rpartition('/')[2] for p in grads}
  assert trained == (
    {'', 'blocks', 'norm1', 'norm2'}
    if fields
    else {'', 'block_0', 'block_1', 'block_2', 'norm1', 'norm2'}
  )


def test_scanned_blocks_are_unrolled_blocks_and_remat_changes_nothing():
  model, held = vit()
  scanned, _ = vit(scan=True)
  stack = lambda t: jax.tree.map(lambda *x: jnp.stack(x), *[t[f'block_{i}'] for i in range(3)])
  stacked = {'params': {**held['params'], 'encoder': {'blocks': stack(held['params']['encoder'])}}}
  tuned, theta = attached(model, held, jpeft.hst(**SMALL), IMAGES)
  pick = lambda end: jax.tree.map(
    lambda *x: jnp.stack(x), *[theta['hst'][f'encoder/block_{i}{end}'] for i in range(3)]
  )
  other = {
    'hst': {
      '': theta['hst'][''],
      **{f'encoder/blocks{end}': pick(end) for end in ('', '/norm1', '/norm2')},
    }
  }
  out = tuned.apply(theta, held, IMAGES)
  again = jpeft.attach(scanned, jpeft.hst(**SMALL, remat=True), stacked, IMAGES)
  np.testing.assert_allclose(again.apply(other, stacked, IMAGES), out, atol=1e-5)


@pytest.mark.slow
def test_a_segmentation_head_learns_to_tell_the_sides_of_an_image():
  images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)) * 0.1
  images = images.at[:2, :, :8].add(1).at[2:, :, 8:].add(1)
  model = ViT(width=16, depth=4, heads=2, mlp_dim=32, patch_size=4, image_size=16, num_classes=5)
  held = jax.jit(model.init)(jax.random.key(1), images)
  labels = (images[:, 1::4, 1::4].mean(-1) > 0.5).astype(jnp.int32)
  tuned = jpeft.attach(
    model, jpeft.hst(**SMALL, output='segmentation', classes=2, fpn_width=8), held, images
  )
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  tx = optax.adam(1e-2)

  def loss(theta):
    logits = tuned.apply(theta, held, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  @jax.jit
  def step(theta, state):
    (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(theta)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(theta, updates), state, logits

  state = tx.init(theta)
  for _ in range(40):
    theta, state, logits = step(theta, state)
  assert logits.shape == (4, 4, 4, 2)
  assert float((logits.argmax(-1) == labels).mean()) > 0.95


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: jpeft.hst(output='x'), "output='x' is none of"),
    (lambda: jpeft.hst(classes=3), "goes with output='segm"),
    (lambda: jpeft.hst(heads=(5, 4, 8, 12)), 'each divided by its heads'),
    (lambda: jpeft.hst(drop_path=1), 'below 1'),
    (lambda: jpeft.hst(depths=(1, 1, 1, 1)), 'whose sum is 3'),
  ],
)
def test_bad_options_are_said_before_any_work(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, IMAGES)


def test_drop_path_leaves_out_branches_in_training_alone():
  model, held = vit(dropout=0.1)
  tuned, theta = attached(model, held, jpeft.hst(**SMALL, drop_path=0.5), IMAGES)
  plain = jpeft.attach(model, jpeft.hst(**SMALL), held, IMAGES)
  np.testing.assert_array_equal(tuned.apply(theta, held, IMAGES), plain.apply(theta, held, IMAGES))
  key = {'dropout': jax.random.key(0)}
  run = lambda tuned: tuned.apply(theta, held, IMAGES, deterministic=False, rngs=key)
  assert np.abs(run(tuned) - run(plain)).max() > 1e-3
