"""The files of bitsandbytes (0.43 and later): NF4 and FP4 kernels to their tensors and back.

Both ways byte for byte. A layer P has P.weight (uint8 [n / 2, 1], the even element in the high
nibble, rows of [out, in]), P.weight.absmax, P.weight.quant_map, with double quantization
P.weight.nested_absmax and P.weight.nested_quant_map, and P.weight.quant_state.bitsandbytes__nf4 (or
fp4), a JSON text as bytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import jsonfiles
from jpeft.core import Leaf
from pallas_kernels import codes as arithmetic
from pallas_kernels import pack, unpack

from .boxes import Quantized
from .formats import GROUP, MAP, Format, Fp4, Nf4

_STATE = 'quant_state.bitsandbytes__'
_FORMATS = {'nf4': Nf4, 'fp4': Fp4}
_DTYPES = ('float16', 'bfloat16', 'float32')
_SCHEMA = {
  'quant_type': str,
  'blocksize': int,
  'dtype': str,
  'shape': [int],
  'nested_blocksize?': int,
  'nested_dtype?': str,
  'nested_offset?': float,
}


def to_bitsandbytes(box: Quantized, name: str) -> dict[str, np.ndarray]:
  """The tensors of one quantized Dense kernel.

  Args:
    box: of a matrix [in, out], not of a stack; of a scanned layer take one with jax.tree.map(lambda
      x: x[i], box).
    name: of the weight on disk, such as 'model.layers.0.self_attn.q_proj.weight'.

  Raises:
    ValueError: int4, which bitsandbytes does not have, or a stack.
  """
  form = box.form
  shape = (box.leaf.fan_in, box.leaf.fan_out)
  if form.name not in _FORMATS:
    raise ValueError(f'bitsandbytes has no format {form.name!r}, only nf4 and fp4')
  if box.shape != box.leaf.shape or box.leaf.batch:
    raise ValueError(
      f'{name}: a stack of kernels of shape {list(box.shape)} has no place in one tensor'
    )
  state = {
    'quant_type': form.name,
    'blocksize': form.block,
    'dtype': str(np.dtype(box.dtype)),
    'shape': shape[::-1],
  }
  tensors = {
    name: _packed(box.arrays['codes'], form, shape),
    f'{name}.absmax': _in_rows(np.asarray(box.arrays['absmax']), form, shape),
    f'{name}.quant_map': arithmetic.VALUES[form.name],
  }
  if form.double:
    tensors[f'{name}.nested_absmax'] = np.asarray(box.arrays['nested'])
    tensors[f'{name}.nested_quant_map'] = MAP
    state['nested_blocksize'] = GROUP
    state['nested_dtype'] = 'float32'
    state['nested_offset'] = float(box.arrays['offset'])
  text = json.dumps(state).encode()
  tensors[f'{name}.{_STATE}{form.name}'] = np.frombuffer(text, np.uint8)
  return tensors


def from_bitsandbytes(tensors: Mapping[str, np.ndarray], name: str) -> Quantized:
  """The kernel [in, out] of a quantized weight.

  Args:
    tensors: of a file.
    name: of the weight in it, such as 'model.layers.0.self_attn.q_proj.weight'.

  Raises:
    ValueError: the tensors are missing, do not fit each other, or are of a kind that is not
      supported.
  """
  state = _state(tensors, name)
  form = _form(state)
  fan_out, fan_in = state['shape']
  shape = (fan_in, fan_out)
  size = fan_in * fan_out

  wanted = [name, f'{name}.absmax']
  if form.double:
    wanted.append(f'{name}.nested_absmax')
  missing = [key for key in wanted if key not in tensors]
  if missing:
    raise ValueError(f'the quantized weight {name!r} has no {missing[0]!r} beside it')
  packed = np.ascontiguousarray(tensors[name]).view(np.uint8).reshape(-1)
  absmax = np.asarray(tensors[f'{name}.absmax'])
  if packed.size != -(-size // 2) or absmax.size != -(-size // form.block):
    raise ValueError(
      f'{name!r} of shape {state["shape"]} has {packed.size} bytes of codes and {absmax.size} '
      'scales'
    )
  codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:size]
  arrays = {
    'codes': pack(jnp.asarray(_in_memory(codes, form, shape)), fill=form.zero),
    'absmax': jnp.asarray(_in_memory(absmax, form, shape)),
  }
  if form.double:
    arrays['nested'] = jnp.asarray(tensors[f'{name}.nested_absmax'])
    arrays['offset'] = jnp.asarray(state['nested_offset'], jnp.float32)
  leaf = Leaf(shape, jnp.dtype(state['dtype']), 'dot_general', ins=(0,))
  return Quantized(arrays, form, leaf, ())


def _state(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
  """The quant_state of a weight."""
  for key, tensor in tensors.items():
    if key.startswith(f'{name}.{_STATE}'):
      where = f'the quant_state of {name!r}'
      state = jsonfiles.parsed(np.asarray(tensor).tobytes(), where)
      _check_state(state, where)
      return state
  raise ValueError(f'{name!r} has no quant_state of bitsandbytes beside it')


def _check_state(state: Any, where: str) -> None:
  """Raises a ValueError for a quant_state that is none, or of a kind that is not supported."""
  jsonfiles.check(state, {'quant_type': str}, where)
  kind = state['quant_type']
  if kind not in _FORMATS:
    raise ValueError(f'{where} is of the type {kind!r}, only nf4 and fp4 are supported')
  jsonfiles.check(state, _SCHEMA, where)
  if len(state['shape']) != 2 or min(*state['shape'], state['blocksize']) < 1:
    raise ValueError(
      f'{where}: the shape {state["shape"]!r:.60} or the block of {state["blocksize"]} is none'
    )
  if state['dtype'] not in _DTYPES:
    raise ValueError(f'{where}: dtype must be one of {", ".join(_DTYPES)}')
  groups = state.get('nested_blocksize')
  if 'nested_offset' in state and groups != GROUP:
    raise ValueError(f'{where} has groups of {groups} scales, only {GROUP} is supported')


def _form(state: dict[str, Any]) -> Format:
  """The format that a quant_state describes."""
  return _FORMATS[state['quant_type']](state['blocksize'], 'nested_offset' in state)


def _packed(codes: jax.Array, form: Format, shape: tuple[int, int]) -> np.ndarray:
  """Codes of a box as bitsandbytes packs them: [ceil(in * out / 2), 1]."""
  rows = _in_rows(np.asarray(unpack(codes)), form, shape)[: shape[0] * shape[1]]
  filled = np.append(rows, [form.zero] * (rows.size % 2)).astype(np.uint8)
  return (filled[::2] << 4 | filled[1::2])[:, None]


def _in_rows(x: np.ndarray, form: Format, shape: tuple[int, int]) -> np.ndarray:
  """Codes or scales of a box in the order of the rows of [out, in]."""
  if form.aligned(shape):
    x = x.T
  return x.reshape(-1)


def _in_memory(x: np.ndarray, form: Format, shape: tuple[int, int]) -> np.ndarray:
  """The inverse of `_in_rows`."""
  if form.aligned(shape):
    return x.reshape(shape[1], -1).T
  return x
