"""Binary adapters: the quantiser and its gradient, codebooks, the paper's sizes, merging."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.adapter.binary import (
  bi_adaptformer,
  bi_head,
  bi_lora,
  codebook,
  from_bits,
  moments,
  quantized,
  to_bits,
)
from tests.fixtures import leaf_paths, noisy
from tests.methods.small import IMAGES, vit
from tests.methods.weight.test_snell import vit_base

W = jnp.array([[0.3, -0.1], [0.1, 0.5]])
RNG = np.random.default_rng(0)
LATENT = jnp.asarray(0.2 * RNG.normal(size=(7, 5)) + 0.1, jnp.float32)
BOTH = pytest.mark.parametrize('make', [bi_adaptformer, bi_lora])


def attached(method, **fields):
  """(model, tuned, variables, theta off its start)."""
  model, variables = vit(**fields)
  tuned = jpeft.attach(model, method, variables, IMAGES)
  return model, tuned, variables, noisy(jax.jit(tuned.init)(jax.random.key(0), variables), 0.1)


def test_the_worked_example():
  mean, std = moments(W)
  assert mean == pytest.approx(0.2) and std == pytest.approx(0.2581989)
  expected = [[0.3741525, 0.0258475], [0.0258475, 0.3741525]]
  np.testing.assert_allclose(quantized(W, 1), expected, atol=1e-6)


def test_codebooks():
  np.testing.assert_allclose(codebook(1), [-0.6744898, 0.6744898], atol=1e-6)
  expected = [-1.2657203, -0.3777542, 0.3777542, 1.2657203]
  np.testing.assert_allclose(codebook(2), expected, atol=1e-6)
  for bits in (1, 2, 3, 4):
    values = np.array(codebook(bits))
    assert len(values) == 2**bits and np.all(np.diff(values) > 0)
    np.testing.assert_allclose(values, -values[::-1], atol=1e-12)


@pytest.mark.parametrize('bits', [1, 2, 3])
def test_every_weight_is_the_nearest_number(bits):
  mean, std = moments(LATENT)
  standard = (LATENT - mean) / (std + 1e-5)
  values = np.array(codebook(bits))
  chosen = values[np.abs(np.asarray(standard)[..., None] - values).argmin(-1)]
  np.testing.assert_allclose(quantized(LATENT, bits), mean + std * chosen, atol=1e-6)


def test_ties_and_equal_weights():
  tied = jnp.array([[-1.0, 0], [0, 1]])
  value = 0.6744898 * (2 / 3) ** 0.5
  np.testing.assert_allclose(quantized(tied, 1), [[-value, value], [value, value]], rtol=1e-6)
  same = jnp.full((3, 4), 0.7)
  value, grad = jax.value_and_grad(lambda w: quantized(w, 1).sum())(same)
  assert value == pytest.approx(0.7 * 12) and jnp.isfinite(grad).all()


def test_scales_and_shifts_pass_through():
  for scale, shift in ((2.0, 0.0), (0.3, 5.0), (1.0, -0.4)):
    found = quantized(scale * LATENT + shift, 1)
    np.testing.assert_allclose(found, scale * quantized(LATENT, 1) + shift, atol=1e-5)


@pytest.mark.parametrize('bits', [1, 2])
def test_the_gradient_crosses_mean_and_deviation(bits):
  upstream = np.asarray(RNG.normal(size=LATENT.shape), np.float64)
  grad = jax.grad(lambda w: jnp.sum(upstream * quantized(w, bits)))(LATENT)
  w = np.asarray(LATENT, np.float64)
  std = w.std(ddof=1)
  apart = (w - w.mean()) / (std + 1e-5)
  q = np.asarray((quantized(LATENT, bits) - moments(LATENT)[0]) / moments(LATENT)[1])
  of_std = (w - w.mean()) / ((w.size - 1) * std)
  straight = std / (std + 1e-5) * (upstream - upstream.mean())
  through_std = (upstream * q).sum() - std / (std + 1e-5) * (upstream * apart).sum()
  expected = upstream.mean() + straight + through_std * of_std
  np.testing.assert_allclose(grad, expected, atol=1e-5)
  assert grad.sum() == pytest.approx(upstream.sum(), abs=1e-5)


@pytest.mark.parametrize('bits', [1, 3])
@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
@BOTH
def test_what_is_stored_gives_the_same_bits(make, fields, bits):
  """With the weights that means, deviations and codes give, in numpy."""
  method = jpeft.chain(make(3, bits, scale=1.0), jpeft.tune('{head}', name='head'))
  model, tuned, variables, theta = attached(method, depth=2, **fields)
  data = to_bits(theta, bits)
  whole = jpeft.chain(make(3, 32, scale=1.0), jpeft.tune('{head}', name='head'))
  read = jpeft.attach(model, whole, variables, IMAGES)
  found = from_bits(data, tuned.shapes, bits)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, read.shapes)

  def decoded(path, latent):
    if path[-1].key != 'latent':
      return latent
    mean, std = (np.asarray(x) for x in moments(latent))
    standard = (np.asarray(latent) - mean) / (std + np.float32(1e-5))
    values = np.asarray(codebook(bits), np.float32)
    edges = (values[1:] + values[:-1]) / 2
    return jnp.asarray(mean + std * values[np.searchsorted(edges, standard, side='right')])

  expected = jax.tree_util.tree_map_with_path(decoded, theta)
  logits = read.apply(found, variables, IMAGES)
  np.testing.assert_array_equal(logits, read.apply(expected, variables, IMAGES))
  np.testing.assert_allclose(logits, tuned.apply(theta, variables, IMAGES), atol=1e-5)
  assert np.abs(logits - model.apply(variables, IMAGES)).max() > 1e-3


@pytest.mark.parametrize(
  ('make', 'width', 'weights', 'matrices'),
  [(bi_adaptformer, 32, 589_824, 24), (bi_lora, 32, 1_179_648, 48), (bi_lora, 1, 36_864, 48)],
)
def test_the_sizes_of_the_paper(make, width, weights, matrices, tmp_path):
  base = vit_base(scan=True)
  tuned = jpeft.attach(base.model, make(width), *base.shapes)
  assert jpeft.summary(tuned).trainable == weights
  theta = jax.tree.map(lambda x: jnp.zeros(x.shape).at[..., 0].set(1), tuned.shapes)
  file = tmp_path / 'theta.bits'
  file.write_bytes(to_bits(theta))
  assert file.stat().st_size == weights // 8 + 8 * matrices
  if make is bi_adaptformer:
    assert file.stat().st_size == 73_728 + 192  # 72 KiB, and mean and deviation of each matrix


def test_data_of_another_method_are_refused():
  _, tuned, _, theta = attached(bi_lora(2), depth=1)
  other = attached(bi_lora(4), depth=1)[1]
  with pytest.raises(ValueError, match='bytes are no theta of this method in 1 bits a weight'):
    from_bits(to_bits(theta), other.shapes)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_codes_are_written_lowest_bit_first(bits):
  theta = {'a': {'latent': LATENT[:2, :4]}}
  mean, std = moments(theta['a']['latent'])
  values = np.array(codebook(bits))
  standard = np.asarray((LATENT[:2, :4] - mean) / (std + 1e-5)).reshape(-1)
  places = np.abs(standard[:, None] - values).argmin(-1)
  number = sum(int(place) << (bits * i) for i, place in enumerate(places))
  assert to_bits(theta, bits)[:bits] == number.to_bytes(bits, 'little')
  np.testing.assert_array_equal(
    np.frombuffer(to_bits(theta, bits)[bits:], '<f4'), [mean.item(), std.item()]
  )


@BOTH
def test_whole_weights_start_as_the_backbone(make):
  model, variables = vit(depth=1)
  tuned = jpeft.attach(model, make(4, 32), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  out = tuned.apply(theta, variables, IMAGES)
  np.testing.assert_array_equal(out, model.apply(variables, IMAGES))


@BOTH
def test_weights_of_one_bit_start_close_to_the_backbone(make):
  model, variables = vit(depth=1)
  tuned = jpeft.attach(model, make(4), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  for path, latent in leaf_paths(theta).items():
    bound = 2e-3 if '/up/' in path else 32**-0.5
    assert 0.5 * bound < jnp.abs(latent).max() <= bound
  far = np.abs(tuned.apply(theta, variables, IMAGES) - model.apply(variables, IMAGES)).max()
  assert 0 < far < 1e-2


def test_the_adapter_by_hand():
  """y = u + MLP(LN u) + s ReLU(u Q(down)) Q(up), no biases."""
  model, tuned, variables, theta = attached(bi_adaptformer(3, scale=0.5), depth=1)
  streams = {}

  def see(t, call, x, *args, **kwargs):
    streams['u'] = x
    return call(x, *args, **kwargs)

  def after(t, call, *args, **kwargs):
    streams['out'] = call(*args, **kwargs)
    return streams['out']

  around = jpeft.chain(
    jpeft.at('{norm2}', jpeft.Call('see', see)), jpeft.at('{block}', jpeft.Call('after', after))
  )
  jpeft.attach(model, around, variables, IMAGES).apply({}, variables, IMAGES)
  plain = dict(streams)
  both = jpeft.attach(model, jpeft.chain(bi_adaptformer(3, scale=0.5), around), variables, IMAGES)
  both.apply(theta, variables, IMAGES)
  (t,) = theta['bi_adaptformer'].values()
  down, up = (quantized(t[part]['latent'], 1) for part in ('down', 'up'))
  expected = plain['out'] + 0.5 * jax.nn.relu(plain['u'] @ down) @ up
  np.testing.assert_allclose(streams['out'], expected, atol=1e-5)


def test_low_rank_merges():
  model, tuned, variables, theta = attached(bi_lora(4, scale=2.0))
  out = tuned.apply(theta, variables, IMAGES)
  merged = model.apply(tuned.merge(theta, variables), IMAGES)
  np.testing.assert_allclose(merged, out, atol=1e-5)
  assert np.abs(out - model.apply(variables, IMAGES)).max() > 1e-2


def test_a_head_of_one_bit():
  model, tuned, variables, theta = attached(bi_head(), depth=1)
  assert jpeft.summary(tuned).trainable == 32 * 5
  assert tuned.memory == 'no backbone backprop' and tuned.method[0][1].head
  merged = tuned.merge(theta, variables)['params']['head']
  latent = theta['bi_head']['head']['kernel']['latent']
  np.testing.assert_allclose(merged['kernel'], quantized(latent, 1), atol=1e-6)
  assert not merged['bias'].any()
  out = tuned.apply(theta, variables, IMAGES)
  features = model.clone(num_classes=None).apply(variables, IMAGES)
  np.testing.assert_allclose(out, features @ quantized(latent, 1), atol=1e-5)


def test_dropout_falls_on_the_bottleneck():
  x = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
  model = nn.Dense(3)
  variables = model.init(jax.random.key(0), x)
  tuned = jpeft.attach(model, bi_lora(4, dropout=1.0, targets=''), variables, x)
  theta = tuned.init(jax.random.key(0), variables)
  dropped = tuned.apply(theta, variables, x, rngs={'dropout': jax.random.key(0)})
  np.testing.assert_array_equal(dropped, model.apply(variables, x))


@pytest.mark.parametrize(
  ('make', 'hyperparameters', 'message'),
  [
    (bi_adaptformer, {'bits': 9}, 'bi_adaptformer: bits=9 must be 1 to 8, or 32'),
    (bi_adaptformer, {'bottleneck': 0}, 'bi_adaptformer: bottleneck=0 must be a whole number'),
    (bi_lora, {'bits': 0}, 'bi_lora: bits=0 must be 1 to 8, or 32'),
    (bi_lora, {'rank': 0}, 'bi_lora: rank=0 must be a whole number'),
    (bi_lora, {'dropout': 2}, r'bi_lora: dropout=2 must lie in \[0, 1\]'),
    (bi_head, {'bits': 16}, 'bi_head: bits=16 must be 1 to 8, or 32'),
  ],
)
def test_hyperparameters_are_checked(make, hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    make(**hyperparameters)
