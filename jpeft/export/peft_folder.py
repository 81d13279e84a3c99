"""What an adapter folder holds: factors or scales of matrices, and arrays trained whole."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .peft_bases import whole_logits
from .peft_config import IA3, LN_TUNING, LORA, PROMPTS, VERA, start_of
from .peft_found import Folder
from .peft_kin import KIN
from .peft_matrices import NORMS, PART_OF, SCALES, TOKENS_DELTA, Scales, Vectors
from .peft_names import BASE, UNWRAPPED, Arrays, module_of
from .peft_parts import (
  add_bias,
  add_factor,
  add_kin_part,
  add_pair,
  add_shared,
  add_start,
  add_tokens,
  check_base,
  check_factors,
)
from .peft_prompts import ROWS
from .peft_tied import HEAD, check_tied, check_unread

FILE = 'adapter_model.safetensors'
_FACTOR = re.compile(r'(.+)\.(' + '|'.join(map(re.escape, PART_OF)) + ')')
_VECTORS = {'vera_lambda_d': 'd', 'vera_lambda_b': 'e'}
_VECTOR = re.compile(r'.+\.vera_lambda_[db]')
_PAIR = {'base_model.vera_A': 'a', 'base_model.vera_B': 'b'}
_TOKENS = re.compile(rf'(.+?)(?:\.token_adapter)?\.{TOKENS_DELTA}')


def base_of(config: Mapping) -> str:
  """What is before the keys of the modules in a folder."""
  return UNWRAPPED if config.get('peft_type') in PROMPTS else BASE


def read_folder(
  where: pathlib.Path, config: Mapping, tensors: Mapping[str, np.ndarray], arrays: Arrays
) -> Folder:
  """What the tensors of a folder are by its config.

  Args:
    where: the file of the tensors, for messages.
    config: from `read_config`, or as it is written.
    tensors: {key: array}.
    arrays: of the backbone.

  Raises:
    ValueError: a tensor has no place, is missing or is of another shape than the config says; or
      the backbone cannot compute what peft does.
  """
  found = Folder(where)
  head: dict[str, np.ndarray] = {}  # tensors of the head of a tied model, by what follows its name
  tokens: dict[str, np.ndarray] = {}  # new rows of tables, by their modules
  base = base_of(config)
  kin = KIN.get(config.get('peft_type', LORA))
  if config.get('save_only_topk_weights'):
    tensors = whole_logits(where, tensors, config)
  for name, x in tensors.items():
    key = name.removeprefix(base)
    x = np.asarray(x, np.float32)
    if name == ROWS and base == UNWRAPPED:
      found.rows = x
      continue
    of_tokens = _TOKENS.fullmatch(key)
    if of_tokens:
      tokens[of_tokens[1]] = x
      continue
    if arrays.tied is not None and key.startswith(f'{HEAD}.'):
      head[key.removeprefix(f'{HEAD}.')] = x
      continue
    match = _FACTOR.fullmatch(key)
    check_kind(where, key, bool(match), config)
    part = kin and kin.shared_part(name)
    if part:
      if not np.array_equal(found.shared.setdefault(part, x), x):
        raise ValueError(f'{where}: {name} differs from that of other kernels, which share it')
      continue
    own = kin and kin.split(key)
    if own:
      add_kin_part(found, *own, x, config, arrays)
    elif match:
      add_factor(found, match[1], PART_OF[match[2]], x, config, arrays)
    elif name in _PAIR:
      found.pair[_PAIR[name]] = x.T
    elif _VECTOR.fullmatch(key):
      module, _, part = key.rpartition('.')
      path, layer = arrays.home(f'{module}.weight', where)
      own = found.vectors.setdefault(path, {}).setdefault(layer, Vectors(module, {}))
      own.parts[_VECTORS[part]] = x
    elif key.endswith(f'.{SCALES}'):
      module = module_of(key)
      path, layer = arrays.home(f'{module}.weight', where)
      # [out, 1] and [1, in], and further ones of a convolution.
      found.scales.setdefault(path, {})[layer] = Scales(module, x.shape[0] != 1, x.reshape(-1))
    elif key.endswith('.base_layer.weight'):
      check_base(where, key, x, arrays)
    else:
      plain = key.replace('.base_layer.', '.').replace(f'.{NORMS}.', '.')
      path, layer = arrays.home(plain, where)
      found.whole.setdefault(path, {})[layer] = arrays.places[path][0].leaf.ours(x)
  for path, layers in found.factors.items():
    for layer, factors in layers.items():
      check_factors(found, path, factors, config)
      start = start_of(config)
      if start is not None:
        add_start(found, path, layer, factors, start, arrays)
      if 'bias' in factors.parts:
        add_bias(found, path, layer, factors, arrays)
  add_pair(found, config, arrays)
  add_shared(found, kin)
  add_tokens(found, tokens, config, arrays)
  if base == UNWRAPPED and found.rows is None:
    raise ValueError(f'{where} lacks {ROWS}, the rows of {config["peft_type"]}')
  check_unread(found, config, arrays)
  check_tied(found, config, arrays, head)
  return found


def check_kind(where: Any, key: str, factor: bool, config: Mapping) -> None:
  """Raises a ValueError if a tensor is of another kind than the config says."""
  kind = LORA
  if key.endswith(f'.{SCALES}'):
    kind = IA3
  elif f'.{NORMS}.' in key:
    kind = LN_TUNING
  elif 'vera_' in key:
    kind = VERA
  elif not factor:
    kinds = [kin.kind for kin in KIN.values() if kin.split(key) or kin.shared_part(key)]
    if not kinds:
      return  # trained whole, beside any kind
    (kind,) = kinds
  told = config.get('peft_type', LORA)
  if kind != told:
    raise ValueError(f'{where}: {key!r} is of {kind}, and adapter_config.json says {told}')
