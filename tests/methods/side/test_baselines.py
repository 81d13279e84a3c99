"""The baselines of the side methods: side-tuning, Head2Toe, LoRA with a frozen factor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.side.features import select
from jpeft.methods.side.head2toe import averaged
from jpeft.models import Bert
from jpeft.training.optim import lora_fa as correction
from tests.fixtures import noisy
from tests.methods.small import IMAGES, TOKENS, attached, vit


def test_side_tuning_mixes_two_networks():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.side_tuning(4), IMAGES)
  t = theta['side_tuning']['final_norm']
  assert (
    jpeft.attach(model, jpeft.side_tuning(4), held, IMAGES).init(jax.random.key(0), held)[
      'side_tuning'
    ]['final_norm']['merge']
    == 0
  )
  head = held['params']['head']
  plain = model.apply(held, IMAGES)

  def run(merge, **parts):
    return tuned.apply(
      {'side_tuning': {'final_norm': {**t, 'merge': jnp.array(merge), **parts}}}, held, IMAGES
    )

  np.testing.assert_allclose(run(-100.0), plain, atol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, t['up'])
  for a in (0.0, 1.0):
    share = 1 / (1 + np.exp(-a))
    want = share * (plain - head['bias']) + head['bias']
    np.testing.assert_allclose(run(-a, up=nothing), want, atol=1e-5)


def test_the_side_network_reads_no_state_of_the_backbone():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.side_tuning(4), IMAGES)
  theta['side_tuning']['final_norm']['merge'] = jnp.array(100.0)
  out = tuned.apply(theta, held, IMAGES)
  held['params']['encoder'] = noisy(held['params']['encoder'])
  np.testing.assert_array_equal(out, tuned.apply(theta, held, IMAGES))
  assert set(theta['side_tuning']['final_norm']) == {'blocks', 'norm', 'in', 'up', 'merge'}


@pytest.mark.parametrize(
  'shape, target, size',
  [
    ((2, 7, 7, 64), 32, 64),
    ((2, 8, 8, 16), 64, 64),
    ((2, 9, 9, 16), 64, 64),
    ((2, 8, 8, 2), 64, 128),
    ((2, 197, 768), 512, 768),
    ((2, 197, 64), 512, 512),
    ((2, 10, 3), 7, 6),
    ((2, 5), 3, 5),
  ],
)
def test_pooled_sizes(shape, target, size):
  assert averaged(jnp.ones(shape), target).shape == (2, size)


def test_pooling_is_by_windows():
  x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
  want = np.stack([x[:, :3].mean(1), x[:, 3:6].mean(1)], 1).reshape(2, -1)
  np.testing.assert_allclose(averaged(x, 8), want, atol=1e-6)
  image = np.random.default_rng(1).normal(size=(1, 4, 4, 1)).astype(np.float32)
  want = [image[0, i : i + 2, j : j + 2].mean() for i in (0, 2) for j in (0, 2)]
  np.testing.assert_allclose(averaged(image, 4)[0], want, atol=1e-6)
  np.testing.assert_allclose(averaged(x, 4), x.mean(1), atol=1e-6)


def test_all_features_without_penalty_are_a_linear_probe_of_many_layers():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.head2toe(8, taps='{block}'), IMAGES)
  outs = []

  def record(t, call, x, *args, **kwargs):
    outs.append(call(x, *args, **kwargs))
    return outs[-1]

  def feature(t, call, x):
    outs.append(x)
    return call(x)

  spy = jpeft.chain(
    jpeft.at('{block}', jpeft.Call('spy', record)), jpeft.at('{head}', jpeft.Call('spy', feature))
  )
  jpeft.attach(model, spy, held, IMAGES).apply({}, held, IMAGES)
  outs[:] = outs[-4:]
  t = theta['head2toe']
  length = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  want = t['head']['bias'] + length(np.asarray(outs[3])) * t['head']['keep'] @ t['head']['kernel']
  for i in range(3):
    p = t[f'encoder/block_{i}']
    want = want + length(np.asarray(outs[i]).mean(1)) * p['keep'] @ p['kernel']
  np.testing.assert_allclose(tuned.apply(theta, held, IMAGES), want, atol=1e-4)


def test_selection_keeps_a_share_whatever_the_order():
  model, held = vit()
  tuned, theta = attached(model, held, jpeft.head2toe(64), IMAGES)
  fresh = jax.jit(tuned.init)(jax.random.key(5), held)['head2toe']
  t, n = theta['head2toe'], sum(s['keep'].size for s in theta['head2toe'].values())
  chosen = select(t, 0.1, fresh)
  assert sum(float(s['keep'].sum()) for s in chosen.values()) == int(0.1 * n)
  kept = [
    float(jnp.linalg.norm(t[p]['kernel'][i]))
    for p, s in chosen.items()
    for i in np.flatnonzero(s['keep'])
  ]
  rest = [
    float(jnp.linalg.norm(t[p]['kernel'][i]))
    for p, s in chosen.items()
    for i in np.flatnonzero(1 - s['keep'])
  ]
  assert min(kept) >= max(rest)
  flip = lambda t: {p: {**s, 'kernel': s['kernel'][::-1]} for p, s in t.items()}
  other = select(flip(t), 0.1, flip(fresh))
  for path, s in chosen.items():
    np.testing.assert_array_equal(s['keep'], other[path]['keep'][::-1])


def test_a_frozen_factor_stays_and_tokens_keep_r_numbers():
  model = Bert(width=32, depth=1, heads=4, mlp_dim=64, vocab=50, pool='tokens')
  held = noisy(model.init(jax.random.key(0), TOKENS), 0.05)
  tuned = jpeft.attach(model, jpeft.lora_fa(3, targets='.*/fc2|embed/word'), held, TOKENS)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  np.testing.assert_array_equal(tuned.apply(theta, held, TOKENS), model.apply(held, TOKENS))
  assert jpeft.summary(tuned).trainable == 3 * 32 * 2
  grads = jax.grad(lambda t: jnp.square(tuned.apply(t, held, TOKENS)).sum())(theta)
  grads = {path: t for path, (t,) in ((p, t.values()) for p, t in grads['lora_fa'].items())}
  assert len(grads) == 2
  assert all(not t['a'].any() and t['b'].any() for t in grads.values())

  def shapes(method):
    tuned = jpeft.attach(model, method, held, TOKENS)
    _, vjp = jax.vjp(
      lambda t: tuned.apply(t, held, TOKENS), jax.jit(tuned.init)(jax.random.key(0), held)
    )
    return [x.shape for x in jax.tree.leaves(vjp)]

  hidden = (2, 6, 64)  # what fc2 reads
  both = (shapes(jpeft.lora_fa(3, targets='.*/fc2')), shapes(jpeft.lora(3, targets='.*/fc2')))
  assert hidden not in both[0] and (2, 6, 3) in both[0] and hidden in both[1]


def test_the_correction_solves_for_the_product():
  rng = np.random.default_rng(0)
  a, g = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
  q = np.linalg.qr(a)[0]
  tx = correction(scale=2.0)
  run = lambda a, tx=tx: tx.update(
    {'x': {'kernel': {'a': jnp.zeros(a.shape), 'b': jnp.asarray(g)}}, 'y': jnp.ones(2)},
    tx.init(None),
    {'x': {'kernel': {'a': jnp.asarray(a), 'b': 0}}, 'y': 0},
  )[0]
  np.testing.assert_allclose(run(a)['x']['kernel']['b'], np.linalg.inv(a.T @ a) @ g / 4, rtol=1e-3)
  np.testing.assert_allclose(run(q, correction())['x']['kernel']['b'], g, rtol=1e-5)
  np.testing.assert_array_equal(run(a)['y'], 1)
  stacked = run(np.stack([a, q]))['x']['kernel']['b']
  np.testing.assert_allclose(stacked[0], run(a)['x']['kernel']['b'], rtol=1e-4)
  with pytest.raises(ValueError, match='reads a off the parameters'):
    optax.chain(tx).update({}, (tx.init(None),))


def test_a_start_that_needs_both_factors():
  with pytest.raises(ValueError, match='needs both factors trained'):
    jpeft.lora_fa(init='pissa')
