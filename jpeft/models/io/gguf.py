"""GGUF files read as data: header, metadata and tensors, in the names and layout of Hugging Face.

Quantized tensors are rows of blocks of 32 weights, each block with a float16 scale d, and a float16
minimum m where there is one; byte j of a block holds the 4-bit codes of weights j (low) and j + 16.
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

from .safetensors import sha256

FILE = 'model.gguf'
_MAGIC, _VERSIONS, _ALIGNMENT = b'GGUF', (2, 3), 32
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
_STRING, _ARRAY = 8, 9


class Format(NamedTuple):
  """How a type of tensor lies in the file.

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


def _plain(dtype):
  return lambda blocks: np.ascontiguousarray(blocks).view(dtype).astype(np.float32)


def _scale(blocks, i):
  return np.ascontiguousarray(blocks[:, 2 * i : 2 * i + 2]).view(np.float16).astype(np.float32)


def _codes(data):
  return np.concatenate([data & 15, data >> 4], 1).astype(np.float32)


FORMATS = {
  0: Format('F32', 1, 4, _plain(np.float32)),
  1: Format('F16', 1, 2, _plain(np.float16)),
  2: Format('Q4_0', 32, 18, lambda b: _scale(b, 0) * (_codes(b[:, 2:]) - 8)),
  3: Format('Q4_1', 32, 20, lambda b: _scale(b, 0) * _codes(b[:, 4:]) + _scale(b, 1)),
  8: Format('Q8_0', 32, 34, lambda b: _scale(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8)),
  30: Format('BF16', 1, 2, _plain(ml_dtypes.bfloat16)),
}

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
ARCHITECTURES = ('llama', 'qwen2', 'qwen3')


class _Tensor(NamedTuple):
  format: Format
  shape: tuple[int, ...]
  start: int


class Gguf:
  """One GGUF file, with the attributes of a `Checkpoint`; data is read when asked for.

  Attributes:
    folder: the file.
    metadata: {key: value}.
    shapes: {Hugging Face key: shape} of every tensor.
    files: {file name: sha256}; computed when first read.

  Raises:
    ValueError: it is no GGUF file, was cut, says what cannot be, or holds a type that is not
      supported.
  """

  def __init__(self, path: str | Path):
    self.folder = Path(path)
    self._data = (
      np.memmap(self.folder, np.uint8, 'r') if self.folder.stat().st_size else np.empty(0, np.uint8)
    )
    try:
      self.metadata, self._tensors = _parse(self._data)
    except _Unsupported as error:
      raise ValueError(f'{self.folder}: {error}') from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, _Damaged) as error:
      raise ValueError(
        f'{self.folder} is no readable GGUF file ({error}); it is damaged or was not copied whole'
      ) from error
    self.shapes = {self._key(name): tensor.shape for name, tensor in self._tensors.items()}
    self._names = {self._key(name): name for name in self._tensors}

  @functools.cached_property
  def files(self) -> dict[str, str]:
    return {self.folder.name: sha256(self.folder)}

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """The metadata as a Hugging Face config.

    Raises:
      ValueError: an architecture that is not supported, or one that tells too little.
    """
    kind = self.metadata.get('general.architecture')
    if kind not in ARCHITECTURES:
      raise ValueError(
        f'{self.folder}: the architecture {kind!r} is none of {", ".join(ARCHITECTURES)}'
      )
    try:
      return self._config(kind)
    except KeyError as error:
      raise ValueError(
        f'{self.folder} has no {f"{kind}.{error.args[0]}"!r} in its metadata'
      ) from error

  def _config(self, kind: str) -> dict[str, Any]:
    told = {key.removeprefix(f'{kind}.'): value for key, value in self.metadata.items()}
    heads, width = told['attention.head_count'], told['embedding_length']
    size = told.get('attention.key_length', width // heads)
    scaling = told.get('rope.scaling.type', 'none')
    eps = float(
      str(np.float32(told['attention.layer_norm_rms_epsilon']))
    )  # 1e-5, not the float32 next to it
    return {
      'model_type': kind,
      'hidden_size': width,
      'num_hidden_layers': told['block_count'],
      'num_attention_heads': heads,
      'num_key_value_heads': told.get('attention.head_count_kv', heads),
      'head_dim': size,
      'intermediate_size': told['feed_forward_length'],
      'vocab_size': self.shapes.get('model.embed_tokens.weight', (0,))[0],
      'max_position_embeddings': told['context_length'],
      'rms_norm_eps': eps,
      'rope_theta': told.get('rope.freq_base', 10000.0),
      'rope_scaling': None
      if scaling == 'none'
      else {'rope_type': scaling, 'factor': told['rope.scaling.factor']},
      'partial_rotary_factor': told.get('rope.dimension_count', size) / size,
      'tie_word_embeddings': 'lm_head.weight' not in self.shapes,
      **{
        name: self.metadata[f'tokenizer.ggml.{name}']
        for name in ('bos_token_id', 'eos_token_id')
        if f'tokenizer.ggml.{name}' in self.metadata
      },
    }

  def read(self, key: str) -> np.ndarray:
    """One tensor as float32, in the layout of Hugging Face."""
    array = self.tensor(self._names[key])
    for part, heads in (('q_proj', 'num_attention_heads'), ('k_proj', 'num_key_value_heads')):
      if f'.{part}.' in key and self.config['model_type'] == 'llama':
        # The writer turned two halves of a head into neighbouring pairs.
        pairs = array.reshape(self.config[heads], -1, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array

  def tensor(self, name: str) -> np.ndarray:
    """One tensor by its own name, as float32."""
    form, shape, start = self._tensors[name]
    blocks = self._data[start : start + _size(form, shape)].reshape(-1, form.bytes)
    return form.decode(blocks).reshape(shape)

  def _key(self, name: str) -> str:
    """The name that Hugging Face gives a tensor; one that is not known stays."""
    stem, _, kind = name.rpartition('.')
    block = re.fullmatch(r'blk\.(\d+)\.(\w+)', stem)
    if block and block[2] in _BLOCK:
      return f'model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}'
    return f'{_TOP[stem]}.{kind}' if stem in _TOP else name


class _Unsupported(Exception):
  """What a file holds cannot be read here."""


class _Damaged(Exception):
  """What a file says cannot be."""


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Tensor]]:
  reader = _Reader(memoryview(data))
  if bytes(data[:4]) != _MAGIC:
    raise _Damaged(f'it begins with {bytes(data[:4])!r}')
  reader.at = 4
  version, tensors, entries = reader.number('I'), reader.number('Q'), reader.number('Q')
  if version not in _VERSIONS:
    raise _Damaged(f'version {version} is none of {_VERSIONS}')
  metadata = {}
  for _ in range(entries):
    key = reader.text()
    metadata[key] = reader.value(reader.number('I'))
  heads = {}
  for _ in range(tensors):
    name = reader.text()
    shape = tuple(reader.number('Q') for _ in range(reader.number('I')))[::-1]
    heads[name] = shape, reader.number('I'), reader.number('Q')
  align = metadata.get('general.alignment', _ALIGNMENT)
  if not isinstance(align, int) or align < 1:
    raise _Damaged(f'general.alignment is {align!r}')
  start = -(-reader.at // align) * align
  found = {}
  for name, (shape, kind, offset) in heads.items():
    if kind not in FORMATS:
      raise _Unsupported(
        f'{name!r} has the type {kind}, which is not supported; supported are '
        + ', '.join(f'{form.name} ({i})' for i, form in FORMATS.items())
      )
    form = FORMATS[kind]
    if not shape or shape[-1] % form.weights:
      raise _Damaged(
        f'{name!r} of shape {list(shape)} cannot be cut into {form.name} blocks of {form.weights}'
      )
    if start + offset + _size(form, shape) > len(data):
      raise _Damaged(f'{name!r} ends at byte {start + offset + _size(form, shape)} of {len(data)}')
    found[name] = _Tensor(form, shape, start + offset)
  return metadata, found


def _size(form: Format, shape: tuple[int, ...]) -> int:
  return math.prod(shape) // form.weights * form.bytes


class _Reader:
  """Numbers and texts of a header, one after the other."""

  def __init__(self, data: memoryview):
    self.data, self.at = data, 0

  def number(self, code: str):
    size = struct.calcsize(f'<{code}')
    (value,) = struct.unpack_from(f'<{code}', self.data, self.at)
    self.at += size
    return value

  def text(self) -> str:
    size = self.number('Q')
    if size > len(self.data) - self.at:
      raise _Damaged(f'a text of {size} bytes at byte {self.at} of {len(self.data)}')
    self.at += size
    return bytes(self.data[self.at - size : self.at]).decode()

  def value(self, kind: int):
    if kind == _STRING:
      return self.text()
    if kind == _ARRAY:
      inner, count = self.number('I'), self.number('Q')
      if count > len(self.data) - self.at:
        raise _Damaged(f'a list of {count} at byte {self.at} of {len(self.data)}')
      return [self.value(inner) for _ in range(count)]
    if kind not in _SCALARS:
      raise _Damaged(f'the type of value {kind} at byte {self.at}')
    return self.number(_SCALARS[kind])
