"""ViT weights of the original JAX code (arXiv:2010.11929, AugReg arXiv:2106.10270): one .npz file.

The names of its arrays are turned into those of Hugging Face, and their sizes into a config. Arrays
are read as data, one at a time; objects are refused.
"""

import functools
import math
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from einops import EinopsError, rearrange

from jpeft import textfiles

from .layout import Part
from .safetensors import sha256

NPZ_SUFFIX = '.npz'
# What zipfile and numpy raise of a damaged file.
_BROKEN = (
  *(EOFError, MemoryError, NotImplementedError, OSError, OverflowError, RuntimeError, SyntaxError),
  *(TypeError, ValueError, KeyError, struct.error, tokenize.TokenError),
  *(zipfile.BadZipFile, zlib.error),
)
_HEADER = 2**16  # bytes that the header of an array may take
_SHRINKS = 100  # times that an array may be larger than the file; weights hardly shrink
_BLOCK = r'Transformer/encoderblock_(\d+)/'
_ATTENTION = 'MultiHeadDotProductAttention_1'
_OUTSIDE = {
  'cls': 'vit.embeddings.cls_token',
  'embedding': 'vit.embeddings.patch_embeddings.projection',
  'Transformer/posembed_input/pos_embedding': 'vit.embeddings.position_embeddings',
  'Transformer/encoder_norm': 'vit.layernorm',
  'pre_logits': 'vit.pooler.dense',
  'head': 'classifier',
}
_INSIDE = {
  'LayerNorm_0': 'layernorm_before',
  'LayerNorm_2': 'layernorm_after',
  f'{_ATTENTION}/query': 'attention.attention.query',
  f'{_ATTENTION}/key': 'attention.attention.key',
  f'{_ATTENTION}/value': 'attention.attention.value',
  f'{_ATTENTION}/out': 'attention.output.dense',
  'MlpBlock_3/Dense_0': 'intermediate.dense',
  'MlpBlock_3/Dense_1': 'output.dense',
}
_LEAVES = {'kernel': 'weight', 'bias': 'bias', 'scale': 'weight'}
# {what tells the sizes of a ViT: its axes}
_NEEDED = {
  'cls': 3,
  'embedding/kernel': 4,
  'Transformer/posembed_input/pos_embedding': 3,
  f'Transformer/encoderblock_0/{_ATTENTION}/query/kernel': 3,
  'Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel': 2,
}
# A classifier behind pre_logits, of the first files trained on ImageNet-21k.
_BEHIND = 'pre_logits_classifier'


class VitNpz:
  """One .npz file of a ViT, with the attributes of a `Checkpoint`.

  Attributes:
    folder: the file.
    shapes: {Hugging Face key: shape} of every array.
    files: {file name: sha256}; computed when first read.

  Raises:
    ValueError: it is no .npz file, holds objects, or is of another model.
  """

  def __init__(self, path: str | Path):
    self.folder = Path(path)
    found = _headers(self.folder)
    missing = [name for name, axes in _NEEDED.items() if len(found.get(name, ())) != axes]
    if missing or any(name.startswith('conv_root') for name in found):
      raise ValueError(
        f'{self.folder} is no plain ViT of the original JAX code: it has '
        f'{", ".join(sorted(found)[:3])}'
      )
    self._shapes = found
    self._names = {_key(name, 'pre_logits/kernel' in found): name for name in found}
    self.shapes = {}
    for key, name in self._names.items():
      # No data is allocated: broadcasting a scalar gives an array of stride zero.
      try:
        self.shapes[key] = _theirs(name, np.broadcast_to(np.float32(0), found[name])).shape
      except EinopsError as error:
        raise ValueError(
          f'{self.folder}: {name!r} of shape {list(found[name])} is no array of a ViT'
        ) from error

  @functools.cached_property
  def files(self) -> dict[str, str]:
    return {self.folder.name: sha256(self.folder)}

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """What the shapes say, as a Hugging Face config."""
    patch, _, _, width = self._shapes['embedding/kernel']
    depth = 1 + max(int(match[1]) for name in self._shapes if (match := re.match(_BLOCK, name)))
    block = 'Transformer/encoderblock_0'
    rows = self.shapes[_OUTSIDE['Transformer/posembed_input/pos_embedding']][1]
    architecture = 'ViTModel'
    if 'classifier.weight' in self.shapes:
      architecture = 'ViTForImageClassification'
    return {
      'model_type': 'vit',
      'architectures': [architecture],
      'hidden_size': width,
      'num_hidden_layers': depth,
      'num_attention_heads': self._shapes[f'{block}/{_ATTENTION}/query/kernel'][1],
      'intermediate_size': self._shapes[f'{block}/MlpBlock_3/Dense_0/kernel'][1],
      'patch_size': patch,
      'image_size': patch * math.isqrt(rows - 1),
      'num_channels': 3,
      'hidden_act': 'gelu_pytorch_tanh',  # that of jax.nn
      'layer_norm_eps': 1e-6,
      'qkv_bias': True,
      'hidden_dropout_prob': 0.0,
      'attention_probs_dropout_prob': 0.0,
    }

  def read(self, key: str, part: Part | None = None) -> np.ndarray:
    """One array, as Hugging Face stores it, or a part of it."""
    array = self._read(key)
    return array if part is None else part.of(array)

  def _read(self, key: str) -> np.ndarray:
    name = self._names[key]
    try:
      with np.load(self.folder, allow_pickle=False) as arrays:
        array = arrays[name]
    except _BROKEN as error:
      raise ValueError(f'{self.folder}: {name!r} cannot be read ({error})') from error
    if array.dtype == 'V2':  # numpy has no bfloat16
      array = array.view(ml_dtypes.bfloat16)
    return _theirs(name, array)


def _headers(path: Path) -> dict[str, tuple[int, ...]]:
  """{name: shape} of the arrays of a file.

  Raises:
    ValueError: it cannot be read, or holds objects.
  """
  shapes = {}
  size = textfiles.check_regular(path)
  try:
    with zipfile.ZipFile(path) as file:
      for member in file.namelist():
        with file.open(member) as data:
          version = np.lib.format.read_magic(data)
          read = np.lib.format.read_array_header_1_0
          if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
          shape, _, dtype = read(data)
        if dtype.hasobject:
          raise ValueError(f'{member} holds objects, which are not read')
        _check_size(file.getinfo(member), math.prod(shape) * dtype.itemsize, size)
        shapes[member.removesuffix('.npy')] = shape
  except _BROKEN as error:
    raise ValueError(f'{path} is no readable .npz file ({error})') from error
  return shapes


def _check_size(member: zipfile.ZipInfo, wanted: int, size: int) -> None:
  """Raises a ValueError if a member is not as large as its array, or unpacks to far more.

  Args:
    member: of the file.
    wanted: bytes of its array.
    size: of the file.
  """
  if not wanted <= member.file_size <= wanted + _HEADER:
    raise ValueError(f'{member.filename} has {member.file_size:,} bytes for {wanted:,} of numbers')
  if member.file_size > _SHRINKS * size:
    raise ValueError(
      f'{member.filename} would unpack to {member.file_size:,} bytes of a small file'
    )


def _key(name: str, has_pre_logits: bool) -> str:
  """The Hugging Face key of an array; its own name if there is none."""
  module, _, leaf = name.rpartition('/')
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  if leaf not in _LEAVES:
    return name
  block = re.match(_BLOCK, name)
  if block is None:
    base = _OUTSIDE.get(module)
    if module == 'head' and has_pre_logits:
      base = _BEHIND
  else:
    base = _INSIDE.get(module.removeprefix(block[0]))
    if base is not None:
      base = f'vit.encoder.layer.{block[1]}.{base}'
  return name if base is None else f'{base}.{_LEAVES[leaf]}'


def _theirs(name: str, array: np.ndarray) -> np.ndarray:
  """An array of the file as Hugging Face stores it."""
  if name == 'embedding/kernel':
    return rearrange(array, 'h w i o -> o i h w')
  if name.endswith('/out/kernel'):
    return rearrange(array, 'h k d -> d (h k)')
  if _ATTENTION in name and name.endswith('/kernel'):
    return rearrange(array, 'd h k -> (h k) d')
  if _ATTENTION in name and not name.endswith('/out/bias'):
    return rearrange(array, 'h k -> (h k)')
  if name.endswith('/kernel'):
    return array.T
  return array
