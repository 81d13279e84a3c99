"""Kinds of peft whose kernels share arrays of the file: VB-LoRA its bank, RandLoRA its bases."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.methods import bases_of, mixed, randlora, vb_lora

from .peft_config import RANDLORA, VBLORA
from .peft_kind import Kin, Shared, Tensors, as_stored
from .peft_names import UNWRAPPED


def _vblora_told(config: Mapping, module: str) -> dict[str, Any]:
  return {
    'rank': config.get('r'),
    'vectors': config.get('num_vectors'),
    'length': config.get('vector_length'),
    'topk': config.get('topk'),
  }


def _vblora_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['rank'],
    'num_vectors': told['vectors'],
    'vector_length': told['length'],
    'topk': told['topk'],
    'save_only_topk_weights': False,
    'vblora_dropout': 0.0,
    'fan_in_fan_out': False,
    'bias': 'none',
  }


def _vblora_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  a = _pieces(tensors['logits_a'], tensors['bank'], told['topk'])  # [r, fan_in / b, b]
  b = _pieces(tensors['logits_b'], tensors['bank'], told['topk'])  # [fan_out / b, r, b]
  rank = a.shape[0]
  return w + b.swapaxes(1, 2).reshape(-1, rank) @ a.reshape(rank, -1)


def _pieces(logits: np.ndarray, bank: np.ndarray, topk: int) -> np.ndarray:
  chosen = np.argsort(-logits, -1, kind='stable')[..., :topk]
  largest = np.take_along_axis(logits, chosen, -1)
  shares = np.exp(largest - largest.max(-1, keepdims=True))
  return ((shares / shares.sum(-1, keepdims=True))[..., None] * bank[chosen]).sum(-2)


def _vblora_expand(t: Mapping, tensors: Tensors, told: Mapping) -> Mapping:
  return mixed(t, tensors['bank'], told['topk'])


def _bank_written(hyper: Mapping, common: Mapping, shapes: Sequence) -> dict[str, np.ndarray]:
  return {'bank': common['bank']}


VBLORAS = Kin(
  VBLORA,
  vb_lora,
  {'logits_a': 'vblora_logits_A', 'logits_b': 'vblora_logits_B'},
  _vblora_told,
  _vblora_fields,
  _vblora_change,
  {},
  as_stored,
  as_stored,
  Shared(
    {'bank': f'{UNWRAPPED}vblora_vector_bank'},
    _bank_written,
    theta=dict,
    expand=_vblora_expand,
  ),
)


def whole_logits(
  where: Any, tensors: Mapping[str, np.ndarray], config: Mapping
) -> dict[str, np.ndarray]:
  """The tensors of a folder that has the largest logits alone, with logits [.., h] in their place.

  peft stores for each piece the numbers of its k vectors and the first k - 1 of their weights.
  Logits of all others are the least float32, which no mixture gets.

  Raises:
    ValueError: one of the two is missing, or they do not fit each other or the bank.
  """
  least = np.finfo(np.float32).min
  found = {}
  for name, x in tensors.items():
    if name.endswith('_topk_weights'):
      continue
    if not name.endswith('_topk_indices'):
      found[name] = x
      continue
    start = name.removesuffix('_topk_indices')
    weights = tensors.get(f'{start}_topk_weights')
    chosen = np.asarray(x).astype(np.int64)
    count = config['num_vectors']
    fits = chosen.ndim == 3 and chosen.size and 0 <= chosen.min() and chosen.max() < count
    if weights is None or not fits or weights.shape != (*chosen.shape[:2], chosen.shape[2] - 1):
      raise ValueError(
        f'{where}: {name} [.., k] of numbers below {count} needs {start}_topk_weights [.., k - 1]'
      )
    rest = 1 - weights.sum(-1, keepdims=True)
    shares = np.maximum(np.concatenate([weights, rest], -1), np.finfo(np.float32).tiny)
    logits = np.full((*chosen.shape[:2], count), least, np.float32)
    np.put_along_axis(logits, chosen, np.log(shares), -1)
    found[start] = logits
  return found


def _randlora_told(config: Mapping, module: str) -> dict[str, Any]:
  return {'rank': config.get('r'), 'alpha': config.get('randlora_alpha')}


def _randlora_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['rank'],
    'randlora_alpha': told['alpha'],
    'projection_prng_key': 0,
    'save_projection': True,
    'sparse': False,
    'very_sparse': False,
    'randlora_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
  }


def _randlora_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  fan_out, fan_in = w.shape
  small, large = sorted(w.shape)
  rank, count = tensors['l'].shape
  rows = tensors['l'][:, :, None] * tensors['a'][:, :, :small] * tensors['g'][None]
  columns = tensors['b'][:large, :count].reshape(large, -1)
  update = columns @ rows.reshape(rank * count, small)  # [larger side, smaller side]
  return w + told['alpha'] / told['rank'] * (update if fan_in <= fan_out else update.T)


def _bases_written(
  hyper: Mapping, common: Mapping, shapes: Sequence[tuple[int, int]]
) -> dict[str, np.ndarray]:
  """The bases of the largest sides, as peft makes room for them."""
  rank = hyper['rank']
  small, large = sorted(max(sides) for sides in zip(*shapes, strict=True))
  count = math.ceil(small / rank)
  a, b = hyper['bases'] or bases_of(hyper['seed'], rank, small, large)
  made = {
    'a': np.zeros((rank, 1, small), np.float32),
    'b': np.zeros((large, count, rank), np.float32),
  }
  # Given bases may be of fewer or more numbers than peft makes room for: no layer reads the rest.
  a, b = np.asarray(a)[:, None, :small], np.asarray(b)[:large, :count]
  made['a'][:, :, : a.shape[2]] = a
  made['b'][: len(b), : b.shape[1]] = b
  return made


def _bases_given(tensors: Tensors) -> dict[str, Any]:
  return {'bases': (tensors['a'][:, 0], tensors['b'])}


RANDLORAS = Kin(
  RANDLORA,
  randlora,
  {'l': 'randlora_lambda', 'g': 'randlora_gamma'},
  _randlora_told,
  _randlora_fields,
  _randlora_change,
  {},
  as_stored,
  as_stored,
  Shared(
    {'a': f'{UNWRAPPED}randlora_A', 'b': f'{UNWRAPPED}randlora_B'},
    _bases_written,
    given=_bases_given,
  ),
)
