"""4-bit formats against published vectors, a golden file of bitsandbytes, and GGUF."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.core.sites import Leaf
from jpeft.quant import Quantized, fp4, from_bitsandbytes, int4, nf4, to_bitsandbytes
from pallas_kernels.codes import dynamic_map

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'bitsandbytes.npz')
SHAPES = ('rows', 'short', 'odd', 'deep')
FORMATS = {
  'nf4': nf4(),
  'nf4_double': nf4(double=True),
  'fp4': fp4(),
  'fp4_double': fp4(double=True),
}


def encoded(form, w):
  """The box of a weight [out, in], as Dense holds it."""
  kernel = jnp.asarray(w).T
  return Quantized(
    jax.jit(form.encode)(kernel),
    form,
    Leaf(kernel.shape, kernel.dtype, 'dot_general', ins=(0,)),
    (),
  )


def held(shape, name):
  """(the tensors of a golden weight, what bitsandbytes reads in them)."""
  prefix = f'{shape}/{name}/'
  tensors = {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}
  return tensors, tensors.pop('read')


def nibbles(packed):
  return np.stack([packed >> 4, packed & 15], -1).reshape(-1)


def small(n):
  i = np.arange(n)
  return (((37 * i % 101) - 50) / 64).astype('float32')


@pytest.mark.parametrize(
  ('form', 'codes'),
  (
    (nf4(), '04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1'),
    (fp4(), 'bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5b'),
  ),
  ids=('nf4', 'fp4'),
)
def test_a_block_has_the_published_bytes(form, codes):
  tensors = to_bitsandbytes(encoded(form, small(64)[None]), 'w')
  assert tensors['w'].tobytes().hex() == codes and tensors['w.absmax'].tolist() == [0.78125]
  if form.name == 'nf4':
    read = np.asarray(encoded(form, small(64)[None]).unbox())[:6, 0]
    np.testing.assert_allclose(
      read, [-0.78125, -0.22221982, 0.34430456, -0.54390061, -0.07113284, 0.56481004], rtol=1e-7
    )


def test_double_quantization_has_the_published_numbers():
  w = small(32768) * (1 + (29 * (np.arange(32768) // 64)) % 31) / 16
  box = encoded(nf4(double=True), w.astype('float32').reshape(128, 256))
  tensors = to_bitsandbytes(box, 'w')
  state = json.loads(bytes(tensors['w.quant_state.bitsandbytes__nf4']))
  assert state['nested_offset'] == 0.7787151336669922 and state['shape'] == [128, 256]
  np.testing.assert_array_equal(tensors['w.nested_absmax'], np.float32([0.7349567413330078] * 2))
  np.testing.assert_array_equal(tensors['w.absmax'][:8], [0, 250, 240, 231, 221, 212, 203, 193])
  read = np.asarray(jax.jit(Quantized.unbox)(box)).T
  np.testing.assert_allclose(
    read[0, :4], [-0.04892606, -0.01391659, 0.02156219, -0.03406197], rtol=1e-6
  )
  assert abs(read.sum(dtype=np.float64) + 87.829273) < 1e-4


def test_the_eight_bit_map_is_the_published_one():
  values = dynamic_map()
  assert hashlib.sha256(values.astype('<f4').tobytes()).hexdigest() == (
    'e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c'
  )
  np.testing.assert_array_equal(values[[127, 255]], [0, 1])


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('shape', SHAPES)
def test_files_of_bitsandbytes_are_read_and_written_bit_by_bit(shape, name):
  tensors, read = held(shape, name)
  box = from_bitsandbytes(tensors, 'weight')
  for unbox in (Quantized.unbox, jax.jit(Quantized.unbox)):
    got = np.asarray(unbox(box)).T
    assert got.shape == read.shape and got.dtype == read.dtype
    np.testing.assert_array_equal(
      got.view(np.uint32) & 0x7FFFFFFF, read.view(np.uint32) & 0x7FFFFFFF
    )
    np.testing.assert_array_equal(got, read)
  written = to_bitsandbytes(box, 'weight')
  assert written.keys() == tensors.keys()
  for key, want in tensors.items():
    assert written[key].dtype == want.dtype and written[key].shape == want.shape, key
    assert written[key].tobytes() == want.tobytes(), key


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('shape', SHAPES)
def test_weights_are_quantized_as_bitsandbytes_does(shape, name):
  """NF4 byte for byte; of FP4, whose two zeros bitsandbytes itself mixes, the values; of 8-bit
  scales all but those where its quantizer on the CPU, which has a coarse table, misses the nearest
  by one."""
  tensors, _ = held(shape, name)
  mine = to_bitsandbytes(encoded(FORMATS[name], GOLDEN[f'{shape}/w']), 'weight')
  codes, want = nibbles(mine['weight']), nibbles(tensors['weight'])
  if name.startswith('fp4'):
    codes, want = (np.where(x == 8, 0, x) for x in (codes, want))
  np.testing.assert_array_equal(codes, want)
  if name.endswith('double'):
    off = np.abs(mine['weight.absmax'].astype(int) - tensors['weight.absmax'])
    assert off.max() <= 1 and off.sum() <= 2
    np.testing.assert_array_equal(mine['weight.nested_absmax'], tensors['weight.nested_absmax'])
  else:
    np.testing.assert_array_equal(mine['weight.absmax'], tensors['weight.absmax'])


@pytest.mark.parametrize('form', (nf4(), nf4(128), fp4(), int4(), int4(minimum=True)), ids=str)
@pytest.mark.parametrize('shape', ((8, 128), (7, 33)))
def test_what_was_decoded_encodes_to_itself(form, shape):
  box = encoded(form, np.random.default_rng(0).normal(size=shape).astype('float32'))
  again = encoded(form, box.unbox().T)
  np.testing.assert_array_equal(again.unbox(), box.unbox())
  if form.name == 'nf4':
    jax.tree.map(np.testing.assert_array_equal, again.arrays, box.arrays)


def test_the_error_of_a_block_is_bounded_by_its_widest_gap():
  w = np.random.default_rng(0).normal(size=(16, 256)).astype('float32')
  error = np.abs(np.asarray(encoded(nf4(), w).unbox()).T - w).reshape(-1, 64).max(1)
  limit = np.abs(w).reshape(-1, 64).max(1)
  assert (error <= 0.1520 * limit).all() and error.max() > 0.1 * limit.min()
  assert abs(np.sqrt(np.mean((np.asarray(encoded(nf4(), w).unbox()).T - w) ** 2)) - 0.0922) < 0.003


@pytest.mark.parametrize(
  ('form', 'name', 'seed'), ((int4(), 'Q4_0', 3), (int4(minimum=True), 'Q4_1', 4)), ids=str
)
def test_int4_is_that_of_gguf(form, name, seed):
  golden = np.load(Path(__file__).parents[1] / 'models' / 'golden' / 'formats.npz')[name]
  w = (np.random.default_rng(seed).normal(size=(5, 96)) * 10.0 ** np.arange(-3, 2)[:, None]).astype(
    'float32'
  )
  w[1, 32:64] = 0
  np.testing.assert_array_equal(np.asarray(encoded(form, w).unbox()).T, golden)


@pytest.mark.parametrize(
  ('change', 'message'),
  (
    ({'weight': np.zeros((5, 1), np.uint8)}, 'has 5 bytes of codes'),
    (
      {'weight.quant_state.bitsandbytes__nf4': np.frombuffer(b'{"quant_type": "nf3"}', np.uint8)},
      "of the type 'nf3'",
    ),
    ({'weight.quant_state.bitsandbytes__nf4': None}, 'has no quant_state'),
  ),
)
def test_tensors_that_do_not_fit_are_refused(change, message):
  tensors = {k: v for k, v in (held('rows', 'nf4')[0] | change).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    from_bitsandbytes(tensors, 'weight')


def test_what_bitsandbytes_does_not_have_is_refused():
  with pytest.raises(ValueError, match="no format 'int4'"):
    to_bitsandbytes(encoded(int4(), np.zeros((2, 64), np.float32)), 'w')
  with pytest.raises(ValueError, match='block=48 must be a power of two'):
    nf4(48)
