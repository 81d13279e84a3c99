"""Kinds of peft whose updates come of low-rank products: LoHa, LoKr, HiRA, AdaLoRA."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.methods import adalora, hira, loha, lokr

from .peft_config import ADALORA, HIRA, LOHA, LOKR, rank_of
from .peft_kind import RANKS, Kin, Tensors, ranked, transposed


def _loha_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['rank'],
    'alpha': told['alpha'],
    'rank_dropout': 0.0,
    'module_dropout': 0.0,
    'use_effective_conv2d': False,
    'init_weights': True,
  }


def _loha_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  one = tensors['b1'] @ tensors['a1']
  other = tensors['b2'] @ tensors['a2']
  return w + told['alpha'] / told['rank'] * one * other


LOHAS = Kin(
  LOHA,
  loha,
  {'b1': 'hada_w1_a', 'a1': 'hada_w1_b', 'b2': 'hada_w2_a', 'a2': 'hada_w2_b'},
  ranked('alpha'),
  _loha_fields,
  _loha_change,
  RANKS,
  transposed,
  transposed,
)


def _lokr_told(config: Mapping, module: str) -> dict[str, Any]:
  told = ranked('alpha')(config, module)
  factor, both = config.get('decompose_factor', -1), bool(config.get('decompose_both'))
  return {**told, 'factor': factor, 'both': both}


def _lokr_fields(told: Mapping) -> dict[str, Any]:
  own = {'decompose_both': told['both'], 'decompose_factor': told['factor']}
  return {**_loha_fields(told), **own, 'rank_dropout_scale': False}


def _lokr_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  factors = []
  for number in '12':
    if f'w{number}' in tensors:
      factors.append(tensors[f'w{number}'])
    else:
      factors.append(tensors[f'b{number}'] @ tensors[f'a{number}'])
  return w + told['alpha'] / told['rank'] * np.kron(*factors)


LOKRS = Kin(
  LOKR,
  lokr,
  {
    'w1': 'lokr_w1',
    'b1': 'lokr_w1_a',
    'a1': 'lokr_w1_b',
    'w2': 'lokr_w2',
    'b2': 'lokr_w2_a',
    'a2': 'lokr_w2_b',
  },
  _lokr_told,
  _lokr_fields,
  _lokr_change,
  RANKS,
  transposed,
  transposed,
)


def _hira_told(config: Mapping, module: str) -> dict[str, Any]:
  return {'rank': rank_of(config, module) if config else None}


def _hira_fields(told: Mapping) -> dict[str, Any]:
  return {'r': told['rank'], 'hira_dropout': 0.0, 'fan_in_fan_out': False, 'init_weights': True}


def _hira_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  return w + w * (tensors['v'] @ tensors['u'])


HIRAS = Kin(
  HIRA,
  hira,
  {'u': 'hira_A', 'v': 'hira_B'},
  _hira_told,
  _hira_fields,
  _hira_change,
  {'rank': 'rank_pattern'},
  transposed,
  transposed,
)


def _adalora_told(config: Mapping, module: str) -> dict[str, Any]:
  if not config:
    return {'rank': None, 'alpha': None}
  rank, alpha = config['init_r'], config['lora_alpha']
  return {'rank': rank, 'alpha': alpha if alpha > 0 else rank}


def _adalora_fields(told: Mapping) -> dict[str, Any]:
  return {
    'init_r': told['rank'],
    'lora_alpha': told['alpha'],
    'lora_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'total_step': 1,  # peft opens no folder without it
    'tinit': 0,
    'tfinal': 0,
  }


def _adalora_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  scale = told['alpha'] / (told['rank'] + 1e-5)
  return w + scale * tensors['b'] @ (tensors['e'] * tensors['a'])


def _adalora_ours(tensors: Tensors, told: Mapping) -> dict[str, np.ndarray]:
  """peft leaves out of the file what rank_pattern leaves out."""
  left_out = max(0, told['rank'] - len(tensors['a']))
  return {
    'a': np.pad(tensors['a'].T, ((0, 0), (0, left_out))),
    'e': np.pad(tensors['e'][:, 0], (0, left_out)),
    'b': np.pad(tensors['b'].T, ((0, left_out), (0, 0))),
  }


def _adalora_theirs(t: Tensors) -> dict[str, np.ndarray]:
  return {**transposed({'a': t['a'], 'b': t['b']}), 'e': t['e'][:, None]}


ADALORAS = Kin(
  ADALORA,
  adalora,
  {'a': 'lora_A', 'e': 'lora_E', 'b': 'lora_B'},
  _adalora_told,
  _adalora_fields,
  _adalora_change,
  {},
  _adalora_ours,
  _adalora_theirs,
)
