"""Kernels against numpy in float64: interpreted, lowered, and (marked aot) compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.planning.devices import GPUS, TPUS, target
from jpeft.quant import affine, fp4, int4, nf4, quantize
from pallas_kernels import choice, nf4_gpu, nf4_matmul, nf4_tpu, quantize_nf4, reference
from pallas_kernels.codes import FP4, INT4, NF4

LIMIT = {'float32': 1e-5, 'bfloat16': 1e-2}
KERNELS = ('mosaic', 'triton')
SHAPE = (768, 384)  # three steps along each axis of either kernel


@pytest.fixture
def rng():
  return np.random.default_rng()


def drawn(rng, shape, dtype='float32'):
  return jnp.asarray(rng.standard_normal(shape), dtype)


def coded(rng, shape):
  return jax.jit(quantize_nf4)(drawn(rng, shape))


def wide(x):
  return np.asarray(x, np.float64)


def decoded(codes, absmax, table=NF4):
  codes = np.concatenate([np.asarray(codes) & 15, np.asarray(codes) >> 4])
  return wide(table)[codes] * np.repeat(wide(absmax), codes.shape[0] // absmax.shape[0], 0)


def off(found, expected):
  assert found.shape == expected.shape
  return np.linalg.norm(wide(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('dtype', LIMIT)
@pytest.mark.parametrize('kernel', KERNELS)
def test_products_and_their_gradients_are_those_of_the_decoded_matrix(rng, kernel, dtype):
  codes, absmax = coded(rng, SHAPE)
  w, x, g = (
    decoded(codes, absmax),
    drawn(rng, (2, 10, SHAPE[0]), dtype),
    drawn(rng, (2, 10, SHAPE[1]), dtype),
  )
  y, vjp = jax.vjp(lambda x: nf4_matmul(x, codes, absmax, implementation=kernel, interpret=True), x)
  assert y.dtype == vjp(g)[0].dtype == x.dtype
  assert off(y, wide(x) @ w) < LIMIT[dtype] and off(vjp(g)[0], wide(g) @ w.T) < LIMIT[dtype]


@pytest.mark.parametrize('transposed', (False, True))
@pytest.mark.parametrize('module', (nf4_tpu, nf4_gpu))
def test_tiles_of_rows_need_not_divide_them(rng, module, transposed):
  codes, absmax = coded(rng, (256, 256))
  x, tiles = drawn(rng, (37, 256)), {nf4_tpu: (16, 128, 128), nf4_gpu: (16, 64, 2, 4, 2)}[module]
  y = module.matmul(
    x,
    codes,
    absmax,
    values=tuple(map(float, NF4)),
    block=64,
    tiles=tiles,
    transposed=transposed,
    interpret=True,
  )
  w = decoded(codes, absmax)
  assert off(y, wide(x) @ (w.T if transposed else w)) < LIMIT['float32']


@pytest.mark.parametrize(
  ('form', 'table'), ((fp4(), FP4), (int4(), INT4), (nf4(128), NF4)), ids=lambda x: str(x)[:20]
)
@pytest.mark.parametrize('kernel', KERNELS)
def test_other_formats(rng, kernel, form, table):
  arrays = jax.jit(form.encode)(drawn(rng, (256, 128)))
  x = drawn(rng, (3, 256))
  y = nf4_matmul(
    x, arrays['codes'], arrays['absmax'], form=form, implementation=kernel, interpret=True
  )
  assert off(y, wide(x) @ decoded(arrays['codes'], arrays['absmax'], table)) < LIMIT['float32']


@pytest.mark.parametrize('shape', ((192, 128), (256, 72), (64, 5), (320, 128)), ids=str)
def test_any_shape_has_an_implementation(rng, shape):
  codes, absmax = coded(rng, shape)
  x, w = drawn(rng, (7, shape[0])), decoded(codes, absmax)
  y, vjp = jax.vjp(lambda x: nf4_matmul(x, codes, absmax), x)
  assert off(y, wide(x) @ w) < LIMIT['float32'] and off(vjp(y)[0], wide(y) @ w.T) < LIMIT['float32']
  assert choice(7, shape, x.dtype, 'tpu').implementation == 'xla'


def test_nothing_decoded_is_kept_for_the_backward_pass(rng):
  codes, absmax = coded(rng, (256, 128))
  for kernel in ('xla', *KERNELS):
    fn = lambda x: nf4_matmul(x, codes, absmax, implementation=kernel, interpret=True)
    kept = [x for x in jax.tree.leaves(jax.vjp(fn, drawn(rng, (4, 256)))[1]) if hasattr(x, 'dtype')]
    assert sorted((x.shape, x.dtype) for x in kept if x.size > 1) == sorted(
      (x.shape, x.dtype) for x in (codes, absmax)
    )


def test_layers_of_a_scan_and_of_vmap(rng):
  codes, absmax = jax.jit(jax.vmap(quantize_nf4))(drawn(rng, (3, 256, 256)))
  x = drawn(rng, (4, 256))
  one = functools.partial(nf4_matmul, implementation='mosaic', interpret=True)
  y, _ = jax.lax.scan(lambda x, layer: (one(x, *layer), None), x, (codes, absmax))
  each = jax.vmap(one, (None, 0, 0))(x, codes, absmax)
  expected = wide(x)
  for i in range(3):
    w = decoded(codes[i], absmax[i])
    assert off(each[i], wide(x) @ w) < LIMIT['float32']
    expected = expected @ w
  assert off(y, expected) < LIMIT['float32']


@pytest.mark.parametrize('dtype', LIMIT)
def test_quantize_gives_the_bytes_of_the_plain_form(rng, dtype):
  w = drawn(rng, (512, 384), dtype).at[:64, 0].set(0)
  found, plain = quantize_nf4(w, implementation='mosaic', interpret=True), jax.jit(nf4().encode)(w)
  np.testing.assert_array_equal(found[0], plain['codes'])
  np.testing.assert_array_equal(found[1], plain['absmax'])


def test_the_arrays_of_a_box_are_taken_as_they_are(rng):
  import flax.linen as nn

  model, x = nn.Dense(128, use_bias=False), drawn(rng, (3, 256))
  variables = quantize(
    model, nf4(double=True), jax.jit(model.init)(jax.random.key(0), x), x, targets='.*'
  )
  box = variables['params']['kernel']
  absmax = box.form.scales(box.arrays, box.shape)
  y = nf4_matmul(
    x, box.arrays['codes'], absmax, form=box.form, implementation='mosaic', interpret=True
  )
  assert off(y, wide(model.apply(variables, x))) < LIMIT['float32']


@pytest.mark.parametrize(
  ('rows', 'shape', 'dtype', 'platform', 'kernel', 'why'),
  (
    (512, (4096, 4096), 'bfloat16', 'tpu', 'mosaic', 'fewer cycles'),
    (512, (11008, 4096), 'float32', 'tpu', 'mosaic', 'fewer cycles'),
    (65536, (4096, 4096), 'bfloat16', 'tpu', 'xla', 'decoding once'),
    (512, (576, 1536), 'bfloat16', 'tpu', 'xla', 'crosses the middle of 576 rows'),
    (512, (640, 1536), 'bfloat16', 'tpu', 'xla', 'do not both divide'),
    (16, (4096, 4096), 'bfloat16', 'cuda', 'triton', 'few rows'),
    (2048, (4096, 4096), 'bfloat16', 'cuda', 'xla', 'decoding once'),
    (16, (4096, 4104), 'bfloat16', 'cuda', 'xla', '16 does not divide 4104'),
    (16, (4096, 4096), 'float16', 'cuda', 'xla', 'neither'),
    (16, (4096, 4096), 'bfloat16', 'cpu', 'xla', 'no kernel for cpu'),
  ),
)
def test_the_choice_has_its_reason(rows, shape, dtype, platform, kernel, why):
  found = choice(rows, shape, dtype, platform)
  assert found.implementation == kernel and why in found.reason


def test_what_does_not_fit_is_told(rng):
  codes, absmax = coded(rng, (192, 128))
  with pytest.raises(ValueError, match='scales .3, 128. are not of a matrix with 128 rows'):
    nf4_matmul(jnp.ones((2, 128)), codes, absmax)
  with pytest.raises(ValueError, match="called 'cuda'; there are mosaic, triton and xla"):
    nf4_matmul(jnp.ones((2, 192)), codes, absmax, implementation='cuda')
  with pytest.raises(ValueError, match='triton cannot do this product: a block of 64 crosses'):
    nf4_matmul(jnp.ones((2, 192)), codes, absmax, implementation='triton')
  with pytest.raises(ValueError, match='blocks of 64 do not divide 100 rows'):
    quantize_nf4(jnp.ones((100, 128)))
  with pytest.raises(ValueError, match='mosaic cannot quantize .192, 128.'):
    quantize_nf4(jnp.ones((192, 128)), implementation='mosaic')


@pytest.mark.parametrize('form', (int4(minimum=True), affine(), affine(64)), ids=str)
@pytest.mark.parametrize('product', (nf4_matmul, reference))
def test_formats_without_a_table_of_values_are_refused_by_name(rng, product, form):
  arrays = form.encode(drawn(rng, (256, 128)))
  message = f"format '{form.name}', .* as nf4, fp4, int4 have: multiply by form.decode"
  with pytest.raises(ValueError, match=message):
    product(jnp.ones((2, 256)), arrays['codes'], arrays['absmax'], form=form)


def shaped(rows, shape, dtype, sharding=None):
  spec = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  return (
    spec((rows, shape[0]), dtype),
    spec((shape[0] // 2, shape[1]), jnp.uint8),
    spec((shape[0] // 64, shape[1]), jnp.float32),
  )


def step(x, codes, absmax):
  """The product, and the gradient of its square: both directions."""
  return jax.value_and_grad(
    lambda x: jnp.square(nf4_matmul(x, codes, absmax).astype(jnp.float32)).sum()
  )(x)


@pytest.mark.parametrize(
  ('platform', 'call'), (('tpu', 'tpu_custom_call'), ('cuda', '__gpu$xla.gpu.triton'))
)
@pytest.mark.parametrize('dtype', LIMIT)
def test_the_platform_decides_when_the_program_is_lowered(platform, call, dtype):
  for rows, kernels in ((16, 2), (65536, 0)):
    text = (
      jax.jit(step)
      .trace(*shaped(rows, (1024, 512), dtype))
      .lower(lowering_platforms=(platform,))
      .as_text()
    )
    assert text.count(call) == kernels
  assert call not in jax.jit(step).lower(*shaped(16, (1024, 512), dtype)).as_text()


@pytest.mark.aot
@pytest.mark.parametrize('dtype', LIMIT)
@pytest.mark.parametrize('kind', TPUS)
def test_tpu_compiles(kind, dtype):
  sharding = jax.sharding.SingleDeviceSharding(target(f'tpu:{kind}').devices[0])
  for rows, shape in ((1, (11008, 4096)), (3000, (768, 3072))):
    program = jax.jit(step).lower(*shaped(rows, shape, dtype, sharding)).compile()
    assert program.as_text().count('tpu_custom_call') == 2
    matrix, outputs = (n * jnp.dtype(dtype).itemsize for n in (math.prod(shape), rows * shape[1]))
    kept = outputs if kind == 'v5p' else 0  # between the forward and the backward pass
    assert program.memory_analysis().temp_size_in_bytes < matrix + kept
  w = jax.ShapeDtypeStruct((4096, 4096), dtype, sharding=sharding)
  assert 'tpu_custom_call' in jax.jit(quantize_nf4).lower(w).compile().as_text()


@pytest.mark.aot
@pytest.mark.parametrize('dtype', LIMIT)
@pytest.mark.parametrize('kind', GPUS)
def test_gpu_compiles(kind, dtype):
  try:
    gpu = target(f'gpu:{kind}')
  except ImportError as error:
    pytest.skip(str(error))
  sharding = jax.sharding.SingleDeviceSharding(gpu.devices[0])
  for rows, shape in ((1, (4096, 4096)), (16, (11008, 4096)), (64, (4096, 11008))):
    program = jax.jit(step).lower(*shaped(rows, shape, dtype, sharding)).compile(dict(gpu.options))
    assert program.as_text().count('__gpu$xla.gpu.triton') == 2


def test_the_plain_form_is_right(rng):
  codes, absmax = coded(rng, (192, 72))
  x = drawn(rng, (2, 3, 192))
  assert off(reference(x, codes, absmax), wide(x) @ decoded(codes, absmax)) < LIMIT['float32']
