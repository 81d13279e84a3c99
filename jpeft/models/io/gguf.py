"""GGUF files read as data: header, metadata and tensors, in the names and layout of Hugging Face.

Quantized tensors are rows of blocks. Those of 32 weights have a float16 scale d, and a float16
minimum m where there is one; byte j of a block holds the 4-bit codes of weights j (low) and j + 16.
Blocks with more to them (5 bits, K, IQ, TQ) are decoded by the package gguf.
"""

import functools
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange

from jpeft import jsonfiles, textfiles
from jpeft.lazy import extra

from ..nn import Rope
from .layout import Part
from .safetensors import sha256

GGUF_FILE = 'model.gguf'
_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless the metadata has another

# Types of metadata values: those of numbers with their code in `struct`, texts, and lists.
_SCALARS = {
  0: 'B',
  1: 'b',
  2: 'H',
  3: 'h',
  4: 'I',
  5: 'i',
  6: 'f',
  7: '?',
  10: 'Q',
  11: 'q',
  12: 'd',
}
_STRING = 8
_ARRAY = 9


class Format(NamedTuple):
  """How a type of tensor is stored.

  Attributes:
    name: as GGUF calls it.
    weights: in a block.
    bytes: of a block.
    decode: blocks [n, bytes] -> float32 [n, weights].
  """

  name: str
  weights: int
  bytes: int
  decode: Callable[[np.ndarray], np.ndarray]


def _numbers(blocks: np.ndarray, dtype) -> np.ndarray:
  """Bytes [n, b] read as numbers of a type: float32 [n, b / size of the type]."""
  return np.ascontiguousarray(blocks).view(dtype).astype(np.float32)


def _codes(data: np.ndarray) -> np.ndarray:
  """The 4-bit codes in bytes [n, 16]: float32 [n, 32], the low halves of the bytes first."""
  return np.concatenate([data & 15, data >> 4], 1).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
  """d (code - 8)."""
  return _numbers(blocks[:, :2], np.float16) * (_codes(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
  """d code + m."""
  scale = _numbers(blocks[:, :2], np.float16)
  minimum = _numbers(blocks[:, 2:4], np.float16)
  return scale * _codes(blocks[:, 4:]) + minimum


def _q8_0(blocks: np.ndarray) -> np.ndarray:
  """d code, codes of 8 bits."""
  return _numbers(blocks[:, :2], np.float16) * _numbers(blocks[:, 2:], np.int8)


def _q8_k(blocks: np.ndarray) -> np.ndarray:
  """d code, codes of 8 bits, and a float32 d; sums of the codes follow, which are not needed."""
  return _numbers(blocks[:, :4], np.float32) * _numbers(blocks[:, 4:260], np.int8)


def _by_package(blocks: np.ndarray, name: str) -> np.ndarray:
  """What the package gguf reads in blocks of a format.

  Raises:
    ModuleNotFoundError: it is not installed; one sentence that names the extra.
    _Unsupported: it is older than the format.
  """
  with extra('gguf'):
    import gguf
  try:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
  except (KeyError, NotImplementedError) as error:
    raise _Unsupported(
      f'the installed package gguf reads no {name}: install a newer one'
    ) from error


def _packaged(name: str, weights: int, size: int) -> Format:
  return Format(name, weights, size, functools.partial(_by_package, name=name))


# By the number of the type in the file.
FORMATS = {
  0: Format('F32', 1, 4, functools.partial(_numbers, dtype=np.float32)),
  1: Format('F16', 1, 2, functools.partial(_numbers, dtype=np.float16)),
  2: Format('Q4_0', 32, 18, _q4_0),
  3: Format('Q4_1', 32, 20, _q4_1),
  6: _packaged('Q5_0', 32, 22),
  7: _packaged('Q5_1', 32, 24),
  8: Format('Q8_0', 32, 34, _q8_0),
  10: _packaged('Q2_K', 256, 84),
  11: _packaged('Q3_K', 256, 110),
  12: _packaged('Q4_K', 256, 144),
  13: _packaged('Q5_K', 256, 176),
  14: _packaged('Q6_K', 256, 210),
  15: Format('Q8_K', 256, 292, _q8_k),
  16: _packaged('IQ2_XXS', 256, 66),
  17: _packaged('IQ2_XS', 256, 74),
  18: _packaged('IQ3_XXS', 256, 98),
  19: _packaged('IQ1_S', 256, 50),
  20: _packaged('IQ4_NL', 32, 18),
  21: _packaged('IQ3_S', 256, 110),
  22: _packaged('IQ2_S', 256, 82),
  23: _packaged('IQ4_XS', 256, 136),
  28: Format('F64', 1, 8, functools.partial(_numbers, dtype=np.float64)),
  29: _packaged('IQ1_M', 256, 56),
  30: Format('BF16', 1, 2, functools.partial(_numbers, dtype=ml_dtypes.bfloat16)),
  34: _packaged('TQ1_0', 256, 54),
  35: _packaged('TQ2_0', 256, 66),
  39: _packaged('MXFP4', 32, 17),
}
# Weights that are decoded at a time: what a decoder makes on its way is several times as large.
_PIECE = 2**22

# Names of modules in GGUF -> in Hugging Face: within a block, and outside of blocks.
_BLOCK = {
  'attn_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
# No weights: what each pair of features of a head turns slower by.
_SLOWER = 'rope_freqs.weight'
ARCHITECTURES = ('llama', 'qwen2', 'qwen3')


# Of the metadata, behind the name of the architecture.
_CONFIG = {
  **dict.fromkeys(('attention.head_count?', 'attention.head_count_kv?', 'embedding_length?'), int),
  **dict.fromkeys(('attention.key_length?', 'block_count?', 'context_length?'), int),
  **dict.fromkeys(('feed_forward_length?', 'rope.dimension_count?'), int),
  **dict.fromkeys(('rope.freq_base?', 'attention.layer_norm_rms_epsilon?'), float),
  **dict.fromkeys(('rope.scaling.factor?', 'rope.scaling.original_context_length?'), float),
  'rope.scaling.type?': str,
}


class _Tensor(NamedTuple):
  """One tensor of the file: its format, its shape, and its bytes, from `start` up to `end`."""

  format: Format
  shape: tuple[int, ...]
  start: int
  end: int


class _Unsupported(Exception):
  """The file is sound, but has something that cannot be read here."""


class _Damaged(Exception):
  """The file contradicts itself."""


# What reading a damaged header raises; lists may be nested too deeply.
_BROKEN = (
  *(struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError),
  _Damaged,
)
_LONGEST = 2**24  # items of a list, which take far more memory than in the file


class Gguf:
  """One GGUF file, with the attributes of a `Checkpoint`; a tensor is read by `read`.

  Attributes:
    folder: the file.
    metadata: {key: value}.
    shapes: {Hugging Face key: shape} of every weight.
    files: {file name: sha256}; computed when first read.

  Raises:
    ValueError: it is no GGUF file, was cut, contradicts itself, or has a type of tensor that is not
      supported.
  """

  def __init__(self, path: str | Path):
    self.folder = Path(path)
    self._data = np.empty(0, np.uint8)
    if textfiles.check_regular(self.folder):  # an empty file cannot be mapped
      self._data = np.memmap(self.folder, np.uint8, 'r')
    try:
      self.metadata, self._tensors = _parse(self._data)
    except _Unsupported as error:
      raise ValueError(f'{self.folder}: {error}') from error
    except _BROKEN as error:
      raise ValueError(
        f'{self.folder} is no readable GGUF file ({error}); it is damaged or was not copied whole'
      ) from error
    self._names = {_hugging_face_key(name): name for name in self._tensors if name != _SLOWER}
    self.shapes = {key: self._tensors[name].shape for key, name in self._names.items()}

  @functools.cached_property
  def files(self) -> dict[str, str]:
    return {self.folder.name: sha256(self.folder)}

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The metadata as a Hugging Face config.

    Raises:
      ValueError: an architecture that is not supported, or a value that is missing.
    """
    kind = self.metadata.get('general.architecture')
    if kind not in ARCHITECTURES:
      raise ValueError(
        f'{self.folder}: the architecture {kind!r} is none of {", ".join(ARCHITECTURES)}'
      )
    try:
      return self._config(kind)
    except KeyError as error:
      missing = f'{kind}.{error.args[0]}'
      raise ValueError(f'{self.folder} has no {missing!r} in its metadata') from error

  def _config(self, kind: str) -> dict[str, Any]:
    values = {key.removeprefix(f'{kind}.'): value for key, value in self.metadata.items()}
    jsonfiles.check(values, _CONFIG, f'{self.folder}: the metadata of {kind!r}')
    heads = values['attention.head_count']
    if heads < 1:
      raise ValueError(f'{self.folder}: its metadata has {heads} heads')
    width = values['embedding_length']
    head_dim = values.get('attention.key_length', width // heads)
    # By way of the text, since the config has 1e-5 and not the float32 next to it.
    eps = float(str(np.float32(values['attention.layer_norm_rms_epsilon'])))
    rope_scaling = None
    if values.get('rope.scaling.type', 'none') != 'none':
      rope_scaling = {
        'rope_type': values['rope.scaling.type'],
        'factor': values['rope.scaling.factor'],
      }
      if 'rope.scaling.original_context_length' in values:
        original = values['rope.scaling.original_context_length']
        rope_scaling['original_max_position_embeddings'] = original
    if _SLOWER in self._tensors:
      rope_scaling = self._slower(values.get('rope.freq_base', 10000.0))
    config = {
      'model_type': kind,
      'hidden_size': width,
      'num_hidden_layers': values['block_count'],
      'num_attention_heads': heads,
      'num_key_value_heads': values.get('attention.head_count_kv', heads),
      'head_dim': head_dim,
      'intermediate_size': values['feed_forward_length'],
      'vocab_size': self.shapes.get('model.embed_tokens.weight', (0,))[0],
      'max_position_embeddings': values['context_length'],
      'rms_norm_eps': eps,
      'rope_theta': values.get('rope.freq_base', 10000.0),
      'rope_scaling': rope_scaling,
      'partial_rotary_factor': values.get('rope.dimension_count', head_dim) / head_dim,
      'tie_word_embeddings': 'lm_head.weight' not in self.shapes,
    }
    for name in ('bos_token_id', 'eos_token_id'):
      if f'tokenizer.ggml.{name}' in self.metadata:
        config[name] = self.metadata[f'tokenizer.ggml.{name}']
    return config

  def _slower(self, theta: float) -> dict[str, Any]:
    """The rotary positions of Llama 3.1 and later, whose factors the file has as an array.

    Raises:
      ValueError: factors of another rule.
    """
    factors = self.tensor(_SLOWER)
    size = 2 * factors.size
    told = {'factor': float(factors.max()), 'low': 1.0, 'high': 4.0, 'original': 8192}
    plain = Rope(theta).frequencies(size)
    slow = Rope(theta, 'llama3', **told).frequencies(size)
    if not np.allclose(plain / slow, factors, rtol=1e-3):
      raise ValueError(
        f'{self.folder}: {_SLOWER!r} has other factors than Llama 3 has for rotary positions, '
        'which is not supported'
      )
    return {
      'rope_type': 'llama3',
      'factor': told['factor'],
      'low_freq_factor': told['low'],
      'high_freq_factor': told['high'],
      'original_max_position_embeddings': told['original'],
    }

  def read(self, key: str, part: Part | None = None) -> np.ndarray:
    """One tensor as float32, in the layout of Hugging Face, or a part of it."""
    array = self._read(key)
    return array if part is None else part.of(array)

  def _read(self, key: str) -> np.ndarray:
    array = self.tensor(self._names[key])
    if self.config['model_type'] != 'llama':
      return array
    # The writer of Llama files turned the two halves of each head's rows into neighbouring pairs.
    for part, heads in (('q_proj', 'num_attention_heads'), ('k_proj', 'num_key_value_heads')):
      if f'.{part}.' in key:
        if len(array) % (2 * self.config[heads]):
          raise ValueError(
            f'{self.folder}: {key!r} of {len(array)} rows is not that of {self.config[heads]} heads'
          )
        array = rearrange(array, '(h i j) ... -> (h j i) ...', h=self.config[heads], j=2)
    return array

  def tensor(self, name: str) -> np.ndarray:
    """One tensor by its own name, as float32.

    Raises:
      ModuleNotFoundError: its format needs the package gguf, which is not installed.
      ValueError: the installed one does not know the format.
    """
    tensor = self._tensors[name]
    form = tensor.format
    blocks = self._data[tensor.start : tensor.end].reshape(-1, form.bytes)
    array = np.empty((len(blocks), form.weights), np.float32)
    step = _PIECE // form.weights
    try:
      for first in range(0, len(blocks), step):
        array[first : first + step] = form.decode(blocks[first : first + step])
    except _Unsupported as error:
      raise ValueError(f'{self.folder}: {name!r} is stored as {form.name}, and {error}') from error
    return array.reshape(tensor.shape)


def _hugging_face_key(name: str) -> str:
  """The key that Hugging Face gives a tensor; the same name if it is unknown."""
  stem, _, kind = name.rpartition('.')
  block = re.fullmatch(r'blk\.(\d+)\.(\w+)', stem)
  if block and block[2] in _BLOCK:
    return f'model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}'
  if stem in _TOP:
    return f'{_TOP[stem]}.{kind}'
  return name


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Tensor]]:
  """(metadata, {name: tensor}) of the bytes of a file."""
  magic = bytes(data[:4])
  if magic != _MAGIC:
    raise _Damaged(f'it begins with {magic!r}')
  reader = _Reader(memoryview(data), at=4)
  version = reader.number('I')
  tensors = reader.number('Q')
  entries = reader.number('Q')
  if version not in _VERSIONS:
    raise _Damaged(f'version {version} is none of {_VERSIONS}')
  metadata = {}
  for _ in range(entries):
    key = reader.text()
    metadata[key] = reader.value(reader.number('I'))
  heads = {}
  for _ in range(tensors):
    name = reader.text()
    axes = reader.number('I')
    shape = tuple(reader.number('Q') for _ in range(axes))[::-1]  # the file has the last axis first
    kind = reader.number('I')
    offset = reader.number('Q')
    heads[name] = (shape, kind, offset)
  align = metadata.get('general.alignment', _ALIGNMENT)
  if not isinstance(align, int) or align < 1:
    raise _Damaged(f'general.alignment is {align!r}')
  start = -(-reader.at // align) * align  # of the first tensor: the end of the header, rounded up
  found = {}
  for name, (shape, kind, offset) in heads.items():
    tensor = _tensor(name, shape, kind, start + offset)
    if tensor.end > len(data):
      raise _Damaged(f'{name!r} ends at byte {tensor.end} of {len(data)}')
    found[name] = tensor
  return metadata, found


def _tensor(name: str, shape: tuple[int, ...], kind: int, start: int) -> _Tensor:
  """A tensor of a type, by the type's number, that begins at byte `start`."""
  if kind not in FORMATS:
    supported = ', '.join(f'{form.name} ({i})' for i, form in FORMATS.items())
    raise _Unsupported(
      f'{name!r} has the type {kind}, which is not supported; supported are {supported}'
    )
  form = FORMATS[kind]
  if not shape or shape[-1] % form.weights:
    raise _Damaged(
      f'{name!r} of shape {list(shape)} cannot be cut into {form.name} blocks of {form.weights}'
    )
  size = math.prod(shape) // form.weights * form.bytes
  return _Tensor(form, shape, start, start + size)


class _Reader:
  """Reads the numbers and texts of a header, one after the other; `at` is the next byte."""

  def __init__(self, data: memoryview, at: int):
    self.data = data
    self.at = at

  def number(self, code: str):
    """A number of a type, by its code in `struct`."""
    (value,) = struct.unpack_from(f'<{code}', self.data, self.at)
    self.at += struct.calcsize(f'<{code}')
    return value

  def text(self) -> str:
    size = self.number('Q')
    if size > len(self.data) - self.at:
      raise _Damaged(f'a text of {size} bytes at byte {self.at} of {len(self.data)}')
    text = bytes(self.data[self.at : self.at + size])
    self.at += size
    return text.decode()

  def value(self, kind: int):
    """A value of metadata, by the number of its type."""
    if kind == _STRING:
      return self.text()
    if kind == _ARRAY:
      inner = self.number('I')
      count = self.number('Q')
      # Every item takes a byte at least: a count beyond that would only fill the memory.
      if count > min(len(self.data) - self.at, _LONGEST):
        raise _Damaged(f'a list of {count} at byte {self.at} of {len(self.data)}')
      return [self.value(inner) for _ in range(count)]
    if kind not in _SCALARS:
      raise _Damaged(f'the type of value {kind} at byte {self.at}')
    return self.number(_SCALARS[kind])
