"""Kinds of peft that turn what enters a kernel: OFT and BOFT."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.methods import boft, oft

from .peft_config import BOFT, OFT
from .peft_kind import Kin, Tensors, as_stored


def _oft_told(config: Mapping, module: str) -> dict[str, Any]:
  terms = 0
  if config.get('use_cayley_neumann', True):
    terms = config.get('num_cayley_neumann_terms', 5)
  return {
    'block': config.get('oft_block_size') or 32,
    'blocks': config.get('r') or None,
    'shared': bool(config.get('block_share')),
    'terms': terms,
  }


def _oft_fields(told: Mapping) -> dict[str, Any]:
  return {
    'r': told['blocks'] or 0,
    'oft_block_size': 0 if told['blocks'] else told['block'],
    'block_share': told['shared'],
    'use_cayley_neumann': told['terms'] > 0,
    'num_cayley_neumann_terms': told['terms'] or 5,
    'coft': False,
    'module_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
    'peft_version': '0.18.0',  # the first that has the series so
  }


def _oft_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  q = tensors['q']
  size = int((1 + (1 + 8 * q.shape[1]) ** 0.5) / 2)
  skew = np.zeros((len(q), size, size))
  skew[:, *np.triu_indices(size, 1)] = q
  skew -= skew.swapaxes(1, 2)
  terms = told['terms']
  powers = [np.linalg.matrix_power(skew, number) for number in range(max(terms, 2))]
  if terms:
    blocks = powers[0] + 2 * sum(powers[1 : terms - 1]) + powers[terms - 1]
  else:
    blocks = (powers[0] - skew) @ np.linalg.inv(powers[0] + skew)
  return _by_blocks(w, blocks)


OFTS = Kin(
  OFT, oft, {'q': 'oft_R.weight'}, _oft_told, _oft_fields, _oft_change, {}, as_stored, as_stored
)


def _boft_told(config: Mapping, module: str) -> dict[str, Any]:
  return {
    'block': config.get('boft_block_size', 4),
    'factors': config.get('boft_n_butterfly_factor', 1),
  }


def _boft_fields(told: Mapping) -> dict[str, Any]:
  return {
    'boft_block_size': told['block'],
    'boft_block_num': 0,
    'boft_n_butterfly_factor': told['factors'],
    'boft_dropout': 0.0,
    'fan_in_fan_out': False,
    'init_weights': True,
    'bias': 'none',
  }


def _boft_change(tensors: Tensors, w: np.ndarray, told: Mapping) -> np.ndarray:
  size = told['block']
  skew = (tensors['r'] - tensors['r'].swapaxes(-1, -2)) / 2
  for factor, q in enumerate(skew):
    blocks = (np.eye(size) - q) @ np.linalg.inv(np.eye(size) + q)
    places = np.arange(w.shape[1])
    if factor:  # every 2^(factor + 1) halves of blocks: the even ones, and the odd ones
      places = places.reshape(-1, 2**factor, 2, size // 2).swapaxes(1, 2).reshape(-1)
    turned = np.empty_like(w)
    turned[:, places] = w
    w = _by_blocks(turned, blocks)[:, places]
  return w * tensors['g']


def _boft_ours(tensors: Tensors, told: Mapping) -> dict[str, np.ndarray]:
  return {'r': tensors['r'], 'g': tensors['g'].reshape(-1)}


def _boft_theirs(t: Tensors) -> dict[str, np.ndarray]:
  return {'r': t['r'], 'g': t['g'][:, None]}


BOFTS = Kin(
  BOFT,
  boft,
  {'r': 'boft_R', 'g': 'boft_s'},
  _boft_told,
  _boft_fields,
  _boft_change,
  {},
  _boft_ours,
  _boft_theirs,
)


def _by_blocks(w: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """w [fan_out, fan_in] times the transpose of a block-diagonal matrix; one block is for all."""
  size = blocks.shape[-1]
  tiles = w.reshape(len(w), -1, size)
  blocks = np.broadcast_to(blocks, (tiles.shape[1], size, size))
  return np.einsum('obj,bij->obi', tiles, blocks).reshape(w.shape)
