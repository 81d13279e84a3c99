"""Few-bit operations: tables against their equations, bytes of residuals, gradients."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from jpeft.residuals import ops
from jpeft.residuals.codes import decode, derivative_codes, encode, pack, unpack
from jpeft.residuals.derivatives import FUNCTIONS, REGELU2, RESILU2, error, optimal, table

RNG = np.random.default_rng(0)
PLAIN = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': jax.nn.gelu,
  'silu': jax.nn.silu,
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'relu': jax.nn.relu,
}

# (function, bits): (positive borders, levels for x > 0, E), of the optimum.
OPTIMA = {
  ('gelu', 1): ([], [1], 0.141047),
  ('gelu', 2): ([0.452013], [0.674370, 1], 0.045189),
  ('gelu', 3): ([0.325919, 0.710046, 2.416946], [0.627757, 0.874352, 1.088272, 1], 0.011997),
  ('gelu', 4): (
    [0.154960, 0.315115, 0.487260, 0.683078, 0.931218, 2.059210, 2.707240],
    [0.561574, 0.683738, 0.802835, 0.916350, 1.020702, 1.109159, 1.048546, 1],
    0.0031641,
  ),
  ('silu', 1): ([], [1], 0.214978),
  ('silu', 2): ([0.738835], [0.676741, 1], 0.060567),
  ('silu', 3): ([0.509398, 1.130142, 4.713717], [0.624665, 0.863531, 1.065296, 1], 0.017775),
  ('silu', 4): (
    [0.241046, 0.491869, 0.765381, 1.084147, 1.504543, 3.817755, 5.555010],
    [0.559971, 0.678761, 0.793972, 0.902765, 1.001282, 1.082721, 1.034937, 1],
    0.0047186,
  ),
  ('gelu_tanh', 4): (
    [0.155100, 0.315436, 0.487855, 0.684140, 0.933184, 2.064633, 2.703604],
    [0.561628, 0.683893, 0.803069, 0.916623, 1.020962, 1.109339, 1.048928, 1],
    0.0031581,
  ),
}


@pytest.mark.parametrize('name, bits', OPTIMA)
def test_the_optimal_table(name, bits):
  borders, levels, e = OPTIMA[name, bits]
  t = optimal(FUNCTIONS[name], 2**bits // 2)
  half = 2**bits // 2
  np.testing.assert_allclose(t.borders[half:], borders, atol=1e-6)
  np.testing.assert_allclose(t.levels[half:], levels, atol=1e-6)
  np.testing.assert_allclose(t.borders, -np.array(t.borders[::-1]), atol=1e-12)
  np.testing.assert_allclose(np.array(t.levels) + t.levels[::-1], 1, atol=1e-12)
  assert float(f'{error(FUNCTIONS[name], t):.3g}') == float(f'{e:.3g}')


@pytest.mark.parametrize(
  'name, df',
  [
    ('gelu', lambda x: special.ndtr(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    ('silu', lambda x: special.expit(x) * (1 + x * special.expit(-x))),
  ],
)
def test_a_table_is_stationary_and_its_error_is_the_integral(name, df):
  t = table(name)
  ends = [-40.0, *t.borders, 40.0]
  total = 0.0
  for a, b, level in zip(ends[:-1], ends[1:], t.levels, strict=True):
    if abs(a) < 40 and abs(b) < 40:
      assert abs(integrate.quad(df, a, b)[0] / (b - a) - level) < 2e-6
    total += integrate.quad(
      lambda x, level=level: (df(x) - level) ** 2, a, b, epsabs=1e-12, limit=200
    )[0]
  for border, low, high in zip(t.borders, t.levels[:-1], t.levels[1:], strict=True):
    assert abs(df(np.float64(border)) - (low + high) / 2) < 2e-6
  assert abs(error(FUNCTIONS[name], t) / total - 1) < 1e-4


def test_quick_gelu_is_silu_in_other_units_and_relu_is_exact():
  quick, silu = table('quick_gelu'), table('silu')
  np.testing.assert_allclose(np.array(quick.borders) * 1.702, silu.borders)
  assert quick.levels == silu.levels and table('relu') == ((0.0,), (0.0, 1.0))
  with pytest.raises(ValueError, match="no table for 'swish'; there are gelu"):
    table('swish')
  with pytest.raises(ValueError, match='bits=3 must be 1, 2 or 4'):
    table('gelu', 3)


def test_published_tables_that_match_the_function():
  assert round(error(FUNCTIONS['gelu'], REGELU2), 4) == 0.1568
  assert round(error(FUNCTIONS['silu'], RESILU2), 4) == 0.2375


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('shape', [(1,), (7,), (8,), (3, 5), (5, 16), (4, 3, 7), (2, 197, 6)])
def test_codes_survive_and_fill_their_bytes(shape, bits):
  codes = RNG.integers(0, 2**bits, shape)
  packed = pack(jnp.asarray(codes), bits)
  assert packed.dtype == jnp.uint8 and packed.size == math.ceil(math.prod(shape) * bits / 8)
  np.testing.assert_array_equal(unpack(packed, shape, bits), codes)


def test_the_low_nibble_comes_first():
  np.testing.assert_array_equal(pack(jnp.array([1, 2])), [0x21])


@pytest.mark.parametrize('bits, error', [(4, 1 / 30), (8, 1 / 510)])
@pytest.mark.parametrize('shape', [(300,), (3, 64), (2, 5, 2, 40), (2, 7, 129), (4, 1)])
def test_groups_are_within_half_a_step(shape, bits, error):
  x = RNG.normal(size=shape).astype(np.float32) * 10
  kept = encode(jnp.asarray(x), bits)
  near = np.asarray(decode(kept, shape, jnp.float32, bits))
  assert np.abs(near - x).max() <= 1.1 * error * (x.max() - x.min()) + 0.005 * np.abs(x).max()
  groups = kept.step.size
  assert groups <= math.ceil(x.size / min(64, x.size)) + math.prod(shape[:-1])
  np.testing.assert_array_equal(
    decode(encode(jnp.full(shape, 3.0), bits), shape, jnp.float32, bits), 3.0
  )


def residual_bytes(fn, *args) -> int:
  _, vjp = jax.vjp(fn, *args)
  return sum(x.nbytes for x in jax.tree.leaves(vjp))


def test_the_worked_example():
  x = jnp.array([-1.2, -0.3, 0, 0.4, 2.5])
  np.testing.assert_array_equal(derivative_codes(x, table('gelu')), [2, 6, 7, 10, 14])
  y, vjp = jax.vjp(ops.gelu, x)
  np.testing.assert_array_equal(y, jax.nn.gelu(x, approximate=False))
  np.testing.assert_allclose(
    vjp(jnp.ones(5))[0], [-0.109159, 0.316262, 0.438426, 0.802835, 1.048546], atol=1e-6
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', PLAIN)
def test_activations(name, dtype):
  x = jnp.asarray(2 * RNG.normal(size=(3, 5, 37)), dtype)
  fn, n = getattr(ops, name), x.size
  y, vjp = jax.vjp(fn, x)
  want, exact = jax.vjp(PLAIN[name], x)
  np.testing.assert_array_equal(y, want)
  assert residual_bytes(fn, x) == math.ceil(n / (8 if name == 'relu' else 2))
  g = jnp.asarray(RNG.normal(size=x.shape), dtype)
  got, true = (np.asarray(v(g)[0], np.float32) for v in (vjp, exact))
  assert vjp(g)[0].dtype == dtype
  assert np.linalg.norm(got - true) <= (0 if name == 'relu' else 0.05) * np.linalg.norm(true)
  opposite = np.asarray(
    jax.vjp(fn, -x)[1](jnp.ones_like(x))[0] + vjp(jnp.ones_like(x))[0], np.float32
  )
  np.testing.assert_allclose(opposite, 1, atol=1e-2 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize(
  'name, sigma, percent', [('gelu', 0.5, 5.5), ('gelu', 1, 4.2), ('gelu', 2, 3.3)]
)
def test_the_error_of_a_gradient_is_what_the_table_promises(name, sigma, percent):
  x, g = (jnp.asarray(RNG.normal(size=200_000) * s, jnp.float32) for s in (sigma, 1))
  got, want = (np.asarray(jax.vjp(f, x)[1](g)[0]) for f in (getattr(ops, name), PLAIN[name]))
  assert round(100 * np.linalg.norm(got - want) / np.linalg.norm(want), 1) == pytest.approx(
    percent, abs=0.11
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shape, axis', [((3, 4, 5, 50), -1), ((6, 7), 0)])
def test_softmax(shape, axis, dtype):
  x, g = (jnp.asarray(RNG.normal(size=shape), dtype) for _ in range(2))
  fn = lambda x: ops.softmax(x, axis)
  y, vjp = jax.vjp(fn, x)
  want, exact = jax.vjp(lambda x: jax.nn.softmax(x, axis), x)
  np.testing.assert_array_equal(y, want)
  assert residual_bytes(fn, x) == x.size // 2 + 4 * x.size // shape[axis]
  got, true = (np.asarray(v(g)[0], np.float32) for v in (vjp, exact))
  assert 0 < np.linalg.norm(got - true) < 0.08 * np.linalg.norm(true)


def np_norm(x, centred):
  x = x - x.mean(-1, keepdims=True) * centred
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('centred', [True, False])
def test_norms(centred, dtype):
  x, g = (jnp.asarray(RNG.normal(size=(4, 9, 192)), dtype) for _ in range(2))
  gain, shift = (jnp.asarray(1 + 0.1 * RNG.normal(size=192), jnp.float32) for _ in range(2))
  own = ops.layer_norm if centred else ops.rms_norm
  rest = (gain, shift) if centred else (gain,)
  y, vjp = jax.vjp(own, x, *rest)
  wide = np.asarray(x, np.float64)
  want = np_norm(wide, centred) * np.asarray(gain) + np.asarray(shift) * centred
  np.testing.assert_allclose(
    np.asarray(y, np.float64), want, atol=3e-2 if dtype == jnp.bfloat16 else 1e-5
  )

  def plain(x, gain, *shift):
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True) * centred
    return (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain + sum(shift)).astype(
      dtype
    )

  # A step is a fifteenth of the range of 64 normal numbers, 4.7: the normalised x is off by 4.7 /
  # 15 / sqrt(12) = 9 %, and so is the gradient of the gain; that of x sees it only through two
  # means; that of the shift does not.
  exact = 0.01 if dtype == jnp.bfloat16 else 1e-5
  for got, true, most in zip(
    vjp(g), jax.vjp(plain, x, *rest)[1](g), (0.015, 0.11, exact), strict=False
  ):
    assert got.dtype == true.dtype
    got, true = (np.asarray(a, np.float32) for a in (got, true))
    assert np.linalg.norm(got - true) < most * np.linalg.norm(true)
  n = x.size  # codes, two bfloat16 a group of 64, 1 / std a row, the trained vectors
  assert residual_bytes(own, x, *rest) == n // 2 + 4 * n // 64 + 4 * 36 + 4 * 192 * len(rest)


@pytest.mark.parametrize('centred', [True, False])
def test_shared_norms_are_exact_and_keep_what_the_next_layer_keeps(centred):
  x = jnp.asarray(RNG.normal(size=(4, 9, 24)), jnp.float32)
  gain, shift, bias = (jnp.asarray(RNG.normal(size=n), jnp.float32) for n in (24, 24, 5))
  w = jnp.asarray(RNG.normal(size=(24, 5)) / 5, jnp.float32)
  norm = ops.shared_layer_norm if centred else ops.shared_rms_norm
  shift = shift if centred else None
  kernel, folded = ops.fold(gain, shift, w, bias)

  def plain(x):
    x = x - x.mean(-1, keepdims=True) * centred
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain
    return (y if shift is None else y + shift) @ w + bias

  fn = lambda x: norm(x) @ kernel + folded
  g = jnp.asarray(RNG.normal(size=(4, 9, 5)), jnp.float32)
  np.testing.assert_allclose(fn(x), plain(x), atol=1e-5)
  np.testing.assert_allclose(jax.vjp(fn, x)[1](g)[0], jax.vjp(plain, x)[1](g)[0], atol=1e-6)
  trained = lambda x, kernel: norm(x) @ kernel
  assert residual_bytes(trained, x, kernel) == 4 * (
    x.size + 36 + kernel.size
  )  # one array, for norm and matrix
  assert ops.fold(gain, None, w)[1] is None


def test_attention_tells_where_its_scores_are_large():
  short, long = (jax.ShapeDtypeStruct((1, n, 1, 2), jnp.float32) for n in (1023, 1024))
  with warnings.catch_warnings(action='error'):
    jax.eval_shape(ops.attention, short, short, short)
  with pytest.warns(UserWarning, match='scores of 1,024 x 1,024 tokens whole: take jpeft.dot_prod'):
    jax.eval_shape(ops.attention, long, long, long)


def test_attention_keeps_no_probabilities_and_is_exact():
  q, k, v, g = (jnp.asarray(RNG.normal(size=(2, 33, 3, 8)), jnp.float32) for _ in range(4))
  bias = jnp.asarray(RNG.normal(size=(1, 3, 33, 33)), jnp.float32)
  mask = jnp.tril(jnp.ones((33, 33), bool))[None, None]
  own = lambda q, k, v: ops.attention(q, k, v, bias=bias, mask=mask)

  def plain(q, k, v):
    logits = jnp.einsum('bnhk,bmhk->bhnm', q, k) / math.sqrt(8) + bias
    return jnp.einsum('bhnm,bmhk->bnhk', jax.nn.softmax(jnp.where(mask, logits, -1e30)), v)

  y, vjp = jax.vjp(own, q, k, v)
  want, exact = jax.vjp(plain, q, k, v)
  np.testing.assert_allclose(y, want, atol=1e-5)
  for a, b in zip(vjp(g), exact(g), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  shapes = [x.shape for x in jax.tree.leaves(vjp) if x.dtype == jnp.float32 and x.ndim == 4]
  assert sorted(set(shapes)) == [
    (1, 3, 33, 33),
    (2, 33, 3, 8),
  ]  # the bias that was given, and q, k, v
