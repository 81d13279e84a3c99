"""The files of bitsandbytes (0.43 and later): NF4 and FP4 kernels to their tensors and back, byte
for byte.

A layer P has P.weight (uint8 [n / 2, 1], the even element in the high nibble, rows of [out, in]),
P.weight.absmax, P.weight.quant_map, with double quantization P.weight.nested_absmax and
P.weight.nested_quant_map, and P.weight.quant_state.bitsandbytes__nf4 (or fp4), a JSON text as
bytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf
from pallas_kernels import codes as arithmetic
from pallas_kernels import pack, unpack

from .boxes import Quantized
from .formats import GROUP, MAP, Format, Fp4, Nf4

_STATE = 'quant_state.bitsandbytes__'


def to_bitsandbytes(box: Quantized, name: str) -> dict[str, np.ndarray]:
  """The tensors of one quantized Dense kernel.

  Args:
    box: of a matrix [in, out], not of a stack; of a scanned layer take one with jax.tree.map(lambda
      x: x[i], box).
    name: of the weight on disk, such as 'model.layers.0.self_attn.q_proj.weight'.

  Raises:
    ValueError: int4, which bitsandbytes does not have, or a stack.
  """
  form, shape = box.form, (box.leaf.fan_in, box.leaf.fan_out)
  if form.name not in ('nf4', 'fp4'):
    raise ValueError(f'bitsandbytes has no format {form.name!r}, only nf4 and fp4')
  if box.shape != box.leaf.shape or box.leaf.batch:
    raise ValueError(
      f'{name}: a stack of kernels of shape {list(box.shape)} has no place in one tensor'
    )
  codes = _rows(np.asarray(unpack(box.arrays['codes'])), form, shape)[: shape[0] * shape[1]]
  codes = np.append(codes, [form.zero] * (codes.size % 2)).astype(np.uint8)
  state = {
    'quant_type': form.name,
    'blocksize': form.block,
    'dtype': str(np.dtype(box.dtype)),
    'shape': shape[::-1],
  }
  tensors = {
    '': (codes[::2] << 4 | codes[1::2])[:, None],
    'absmax': _rows(np.asarray(box.arrays['absmax']), form, shape),
    'quant_map': arithmetic.VALUES[form.name],
  }
  if form.double:
    tensors |= {'nested_absmax': np.asarray(box.arrays['nested']), 'nested_quant_map': MAP}
    state |= {
      'nested_blocksize': GROUP,
      'nested_dtype': 'float32',
      'nested_offset': float(box.arrays['offset']),
    }
  tensors[_STATE + form.name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  return {f'{name}.{key}'.rstrip('.'): value for key, value in tensors.items()}


def from_bitsandbytes(tensors: Mapping[str, np.ndarray], name: str) -> Quantized:
  """The kernel [in, out] of a quantized weight.

  Args:
    tensors: of a file.
    name: of the weight in it, such as 'model.layers.0.self_attn.q_proj.weight'.

  Raises:
    ValueError: the tensors are missing, do not fit each other, or are of a kind that is not
      supported.
  """
  state_key = next((key for key in tensors if key.startswith(f'{name}.{_STATE}')), None)
  if state_key is None:
    raise ValueError(f'{name!r} has no quant_state of bitsandbytes beside it')
  state = json.loads(bytes(np.asarray(tensors[state_key])))
  kind, double = state['quant_type'], 'nested_offset' in state
  if kind not in ('nf4', 'fp4'):
    raise ValueError(f'{name!r} is of the type {kind!r}, only nf4 and fp4 are supported')
  if double and state['nested_blocksize'] != GROUP:
    raise ValueError(
      f'{name!r} has groups of {state["nested_blocksize"]} scales, only {GROUP} is supported'
    )
  form = {'nf4': Nf4, 'fp4': Fp4}[kind](state['blocksize'], double)
  fan_out, fan_in = state['shape']
  size, shape = fan_in * fan_out, (fan_in, fan_out)
  packed = np.ascontiguousarray(tensors[name]).view(np.uint8).reshape(-1)
  absmax = np.asarray(tensors[f'{name}.absmax'])
  if packed.size != -(-size // 2) or absmax.size != -(-size // form.block):
    raise ValueError(
      f'{name!r} of shape {state["shape"]} has {packed.size} bytes of codes and {absmax.size} scales'
    )
  codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:size]
  arrays = {
    'codes': pack(jnp.asarray(_columns(codes, form, shape)), fill=form.zero),
    'absmax': jnp.asarray(_columns(absmax, form, shape)),
  }
  if double:
    arrays |= {
      'nested': jnp.asarray(tensors[f'{name}.nested_absmax']),
      'offset': jnp.asarray(state['nested_offset'], jnp.float32),
    }
  dtype: Any = jnp.dtype(state['dtype'])
  return Quantized(
    jax.tree.map(jnp.asarray, arrays), form, Leaf(shape, dtype, 'dot_general', ins=(0,)), ()
  )


def _rows(x: np.ndarray, form: Format, shape: tuple[int, int]) -> np.ndarray:
  """Codes or scales in the order of the rows of [out, in]."""
  return (x.T if form.aligned(shape) else x).reshape(-1)


def _columns(x: np.ndarray, form: Format, shape: tuple[int, int]) -> np.ndarray:
  """The inverse of `_rows`."""
  return x.reshape(shape[1], -1).T if form.aligned(shape) else x
