"""LoRA and DoRA in the adapter folders of Hugging Face's peft: adapter_config.json and
adapter_model.safetensors.
"""

import difflib
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, chain
from jpeft.methods import dora, lora, tune
from jpeft.models import (
  Place,
  Pretrained,
  family_of,
  keyed,
  read_json,
  read_tensors,
  shapes_of,
  write_tensors,
)
from jpeft.training import write

CONFIG, FILE = 'adapter_config.json', 'adapter_model.safetensors'
_BASE = 'base_model.model.'
_PARTS = {'a': 'lora_A.weight', 'b': 'lora_B.weight', 'm': 'lora_magnitude_vector'}
_TABLE_PARTS = {'a': 'lora_embedding_A', 'b': 'lora_embedding_B'}
_PART_OF = {name: part for table in (_PARTS, _TABLE_PARTS) for part, name in table.items()}
_CHANGES_BASE = ('pissa', 'olora', 'loftq', 'corda')  # starts that change the matrix they adapt
_ARRAY = re.compile(
  r'(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector|lora_embedding_[AB])'
)


def save_adapter(
  folder: str | pathlib.Path,
  pretrained: Pretrained,
  theta: Mapping,
  alpha: float,
  rslora: bool = False,
  base: str | None = None,
) -> None:
  """Writes theta of LoRA or DoRA, and of modules trained whole beside it, as peft does.

  Modules are named as in the base model's files; a transformers that calls them otherwise in memory
  (ViT, from 5 on) does not find them.

  A start that takes the matrix apart (PiSSA, OLoRA) is written as LoRA of twice the rank: the base
  model holds the whole matrix.

  Args:
    folder: where to; made if needed.
    pretrained: the backbone that theta was trained on.
    theta: {rule: {site path: arrays}}.
    alpha: of the method.
    rslora: of the method.
    base: name or path of the base model, for whoever opens the folder.

  Raises:
    ValueError: theta holds what such folders cannot.
  """
  where, tensors, found, trained, whole, kinds = _where(pretrained), {}, {}, set(), set(), set()
  for path, array, t in _entries(theta):
    place, keys = where[f'{path}/{array}']
    modules = [key.rpartition('.')[0] for key in keys]
    if not isinstance(t, Mapping):
      trained.add(f'{path}/{array}')
      whole |= set(modules)
      tensors |= dict(zip(keys, (place.leaf.theirs(x) for x in _layers(t, place)), strict=True))
      continue
    if not {'a', 'b'} <= t.keys() <= {*_PARTS, 'a0', 'b0'}:
      raise ValueError(
        f'theta holds {", ".join(t)} for {path!r}: an adapter folder holds LoRA or DoRA'
      )
    kinds.add('m' in t)
    factor, old = 1.0, t['a'].shape[-1]
    if 'a0' in t:
      t = {
        'a': np.concatenate([t['a'], t['a0']], -1),
        'b': np.concatenate([t['b'], -np.asarray(t['b0'])], -2),
      }
      factor = (t['a'].shape[-1] / old) ** (0.5 if rslora else 1)
    found |= dict.fromkeys(modules, (t['a'].shape[-1], alpha * factor))
    names = _TABLE_PARTS if array == 'embedding' else _PARTS
    for part, x in t.items():
      for module, layer in zip(modules, _layers(x, place), strict=True):
        tensors[f'{module}.{names[part]}'] = _theirs(part, layer, place)
  if not found or len(kinds) > 1:
    raise ValueError(
      f'theta holds {"both LoRA and DoRA" if found else "neither LoRA nor DoRA"}: an adapter folder is '
      'of one of them'
    )
  for name, (_, keys) in where.items():
    if name not in trained and whole & {key.rpartition('.')[0] for key in keys}:
      raise ValueError(
        f'theta trains only a part of {name.rpartition("/")[0]!r}, without {name!r}: an adapter folder '
        'holds modules trained whole'
      )
  (rank, scaled), _ = Counter(found.values()).most_common(1)[0]
  odd = {module: pair for module, pair in found.items() if pair != (rank, scaled)}
  kind = family_of(pretrained.config).table(pretrained.model).architectures[1]
  # Of a classifier peft wants the head in the folder; where it is not trained, the task is left
  # open.
  tasks = {
    'ForCausalLM': 'CAUSAL_LM',
    **({'ForSequenceClassification': 'SEQ_CLS'} if whole else {}),
  }
  task = next((task for name, task in tasks.items() if kind.endswith(name)), None)
  config = {
    'peft_type': 'LORA',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': rank,
    'lora_alpha': scaled,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'use_rslora': rslora,
    'use_dora': True in kinds,
    'target_modules': sorted(found),
    'modules_to_save': sorted(whole) or None,
    'rank_pattern': {module: pair[0] for module, pair in odd.items()},
    'alpha_pattern': {module: pair[1] for module, pair in odd.items()},
    'task_type': task,
  }
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(
    folder / FILE, {_BASE + key: np.asarray(x, np.float32) for key, x in tensors.items()}
  )
  write(folder / CONFIG, json.dumps(config, indent=2) + '\n')


def load_adapter(folder: str | pathlib.Path, pretrained: Pretrained) -> tuple[Method, dict]:
  """(method, theta) of an adapter folder: LoRA or DoRA, and modules saved whole.

  Args:
    folder: as peft, or `save_adapter`, writes it.
    pretrained: the backbone to put it on.

  Returns:
    The method to `attach` to `pretrained.model`, and its theta in float32.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the adapter is of another kind, damaged, or not of this backbone.
  """
  folder = pathlib.Path(folder)
  if not (folder / CONFIG).exists():
    raise FileNotFoundError(f'{folder} holds no {CONFIG}, so it is no adapter of peft')
  config = read_json(folder / CONFIG)
  for key, held in (
    ('peft_type', 'LORA'),
    ('bias', 'none'),
    ('fan_in_fan_out', False),
    ('lora_bias', False),
  ):
    if config.get(key, held) != held:
      raise ValueError(f'{folder / CONFIG}: {key}={config[key]!r} is not supported, only {held!r}')
  if str(start := config.get('init_lora_weights')).startswith(_CHANGES_BASE):
    raise ValueError(
      f'{folder / CONFIG}: init_lora_weights={start!r} adapts what is left of matrices once peft has '
      'taken them apart; have peft convert it to plain LoRA (path_initial_model_for_weight_conversion)'
    )
  if missing := {'r', 'lora_alpha'} - config.keys():
    raise ValueError(f'{folder / CONFIG} lacks {" and ".join(sorted(missing))}')
  tensors = {key.removeprefix(_BASE): x for key, x in read_tensors(folder / FILE).items()}
  where, base = _where(pretrained), family_of(pretrained.config).table(pretrained.model).base
  # Of a model with a head or without: the prefix tells them apart, and the layers are the same.
  homes = {
    key.removeprefix(base): (place, i)
    for place, keys in where.values()
    for i, key in enumerate(keys)
  }
  parts: dict[str, dict] = {}  # {path of an array: {part: {layer: array}}}
  for key, x in tensors.items():
    match = _ARRAY.fullmatch(key)
    if not match and '.base_layer.' in key:  # of an adapted table peft stores the table itself too
      continue
    wanted = (f'{match[1]}.weight' if match else key).removeprefix(base)
    if wanted not in homes:
      near = difflib.get_close_matches(wanted, homes, 1)
      raise ValueError(
        f'{folder / FILE}: {key!r} has no place in this backbone'
        + (f'; the nearest is {near[0]!r}' if near else '')
      )
    place, layer = homes[wanted]
    part = _PART_OF[match[2]] if match else 'whole'
    parts.setdefault(place.path, {}).setdefault(part, {})[layer] = _ours(part, x, place)
  theta: dict[str, dict] = {}
  for path, found in parts.items():
    site, _, array = path.rpartition('/')
    place, keys = where[path]
    arrays = {part: _joined(folder, path, place, keys, layers) for part, layers in found.items()}
    if 'whole' in arrays:
      theta.setdefault('modules', {}).setdefault(site, {})[array] = arrays['whole']
      continue
    if missing := set('abm' if config.get('use_dora') else 'ab') - arrays.keys():
      raise ValueError(f'{folder / FILE}: {path!r} lacks {", ".join(sorted(missing))}')
    module = keys[0].rpartition('.')[0]
    rank = _of(config.get('rank_pattern'), module, config['r'])
    if arrays['a'].shape[-1] != rank:
      raise ValueError(
        f'{folder / FILE}: {path!r} is of rank {arrays["a"].shape[-1]}, and {CONFIG} says {rank}'
      )
    alpha = _of(config.get('alpha_pattern'), module, config['lora_alpha'])
    theta.setdefault((rank, alpha), {}).setdefault(site, {})[array] = arrays
  theta = dict(
    sorted(theta.items(), key=lambda pair: pair[0] == 'modules')
  )  # what adapts, then what stands in
  return _method(theta, config), {_name(key, theta): sites for key, sites in theta.items()}


def _method(theta: Mapping, config: Mapping) -> Method:
  """The method whose theta this is; its keys are (rank, alpha), or 'modules'."""
  make, rslora = dora if config.get('use_dora') else lora, bool(config.get('use_rslora'))
  sites = {key: '|'.join(map(re.escape, found)) for key, found in theta.items()}
  return chain(
    *(
      tune(targets, name='modules')
      if key == 'modules'
      else make(*key, targets, rslora=rslora, name=_name(key, theta))
      for key, targets in sites.items()
    )
  )


def _name(key, theta: Mapping) -> str:
  """The name of a rule: the first of several ranks is 'lora', others tell theirs."""
  adapters = [k for k in theta if k != 'modules']
  return (
    key if key == 'modules' else 'lora' if key == adapters[0] else 'lora_r{}_alpha{:g}'.format(*key)
  )


def _where(pretrained: Pretrained) -> dict[str, tuple[Place, list[str]]]:
  """{path of an array: (its place, its keys on disk)} of a backbone."""
  family = family_of(pretrained.config)
  shapes = shapes_of(pretrained.model, family)
  return {
    place.path: (place, keys) for place, keys in keyed(family.table(pretrained.model), shapes)
  }


def _entries(theta: Mapping) -> Iterator[tuple[str, str, Any]]:
  return (
    (path, array, t)
    for sites in theta.values()
    for path, arrays in sites.items()
    for array, t in arrays.items()
  )


def _layers(x, place: Place) -> list[np.ndarray]:
  return list(np.asarray(x)) if place.stacked else [np.asarray(x)]


def _joined(folder, path: str, place: Place, keys, layers: dict[int, np.ndarray]):
  if missing := [key for i, key in enumerate(keys) if i not in layers]:
    raise ValueError(
      f'{folder / FILE} adapts some layers of {path!r} and not {missing[0]!r}: load the backbone with '
      'scan=False'
    )
  found = [layers[i] for i in range(len(keys))]
  return jnp.asarray(np.stack(found) if place.stacked else found[0], jnp.float32)


def _theirs(part: str, x: np.ndarray, place: Place) -> np.ndarray:
  """a [window * in, r], b [r, out] or m [out] as [r, in, *window], [out, r, 1 ...] or [out]."""
  window = place.shape[:-2]
  if part == 'a':
    return np.moveaxis(x.reshape(*window, -1, x.shape[-1]), (-1, -2), (0, 1))
  return x if part == 'm' else x.T.reshape(*x.T.shape, *(1 for _ in window))


def _ours(part: str, x: np.ndarray, place: Place) -> np.ndarray:
  """The inverse of `_theirs`."""
  if part == 'whole':
    return place.leaf.ours(x)
  if part == 'a':
    return np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, len(x))
  return x.reshape(-1) if part == 'm' else x.reshape(x.shape[:2]).T


def _of(pattern: Mapping | None, module: str, default):
  """What a rank_pattern or alpha_pattern says of a module: its keys are ends of names, or regexes
  of them.
  """
  return next(
    (x for key, x in (pattern or {}).items() if re.fullmatch(rf'(?:.*\.)?(?:{key})', module)),
    default,
  )
