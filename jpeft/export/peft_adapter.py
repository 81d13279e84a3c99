"""LoRA and DoRA in the adapter folders of Hugging Face's peft.

Such a folder has adapter_config.json and adapter_model.safetensors. peft names an array by a module
of the base model, and keeps the factors of a matrix [out, in] transposed: `lora_A` [r, in] and
`lora_B` [out, r], where jpeft has a [in, r] and b [r, out].
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, Tuned, chain
from jpeft.messages import nearest
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
_TABLE_PARTS = {**_PARTS, 'a': 'lora_embedding_A', 'b': 'lora_embedding_B'}
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
  tuned: Tuned | None = None,
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
    tuned: the method on the backbone; needed where it acts in some layers of a scanned stack, or
      where `generated` made it: then the entries are written that its rules read.

  Raises:
    ValueError: theta holds what such folders cannot.
  """
  places = _places(pretrained)
  content = _Content()
  if tuned is not None:
    theta = tuned.expand(theta)
  for name, path, array, values in _entries(theta):
    if f'{path}/{array}' not in places:
      raise ValueError(
        f'theta has {name!r} at {path or "the model"!r}, and no array {array!r} of the pretrained '
        'files is there: an adapter folder holds whole modules; of a generated method, give tuned='
      )
    place, keys = places[f'{path}/{array}']
    keys = _chosen(keys, name, path, tuned)
    _check_layers(values, place, keys, path)
    if isinstance(values, Mapping):
      _add_factors(content, path, array, values, place, keys, alpha, rslora)
    else:
      content.trained.add(f'{path}/{array}')
      content.whole |= {_module(key) for key in keys}
      for key, layer in zip(keys, _layers(values, place), strict=True):
        content.tensors[key] = place.leaf.theirs(layer)
  _check_kind(content)
  _check_whole(content, places)
  config = _adapter_config(content, pretrained, rslora, base)
  tensors = {_BASE + key: np.asarray(x, np.float32) for key, x in content.tensors.items()}
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder / FILE, tensors)
  write(folder / CONFIG, json.dumps(config, indent=2) + '\n')


@dataclasses.dataclass
class _Content:
  """What a folder gets.

  Attributes:
    tensors: {name in the file: array}.
    adapted: {module: (rank, alpha)}.
    whole: modules that are trained whole.
    trained: paths of their arrays.
    dora: for each adapted array, whether it has a magnitude.
  """

  tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  adapted: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  whole: set[str] = dataclasses.field(default_factory=set)
  trained: set[str] = dataclasses.field(default_factory=set)
  dora: set[bool] = dataclasses.field(default_factory=set)


def _add_factors(
  content: _Content, path: str, array: str, values: Mapping, place: Place, keys, alpha, rslora
) -> None:
  """Adds the factors of one array."""
  if not {'a', 'b'} <= values.keys() <= {*_PARTS, 'a0', 'b0'}:
    raise ValueError(
      f'theta holds {", ".join(values)} for {path!r}: an adapter folder holds LoRA or DoRA'
    )
  content.dora.add('m' in values)
  if 'a0' in values:
    # a b - a0 b0 is LoRA of twice the rank. Its scale has the rank in it, so alpha grows with it.
    old = values['a'].shape[-1]
    values = {
      'a': np.concatenate([values['a'], values['a0']], -1),
      'b': np.concatenate([values['b'], -np.asarray(values['b0'])], -2),
    }
    power = 0.5 if rslora else 1
    alpha = alpha * (values['a'].shape[-1] / old) ** power
  modules = [_module(key) for key in keys]
  for module in modules:
    content.adapted[module] = values['a'].shape[-1], float(alpha)
  names = _TABLE_PARTS if array == 'embedding' else _PARTS
  for part, x in values.items():
    for module, layer in zip(modules, _layers(x, place), strict=True):
      content.tensors[f'{module}.{names[part]}'] = _theirs(part, layer, place)


def _check_kind(content: _Content) -> None:
  """Raises a ValueError unless the folder is of either LoRA or DoRA."""
  kinds = 'neither LoRA nor DoRA'
  if content.adapted:
    kinds = 'both LoRA and DoRA'
  if not content.adapted or len(content.dora) > 1:
    raise ValueError(f'theta holds {kinds}: an adapter folder is of one of them')


def _check_whole(content: _Content, places: Mapping) -> None:
  """Raises a ValueError if only some arrays of a module are trained whole."""
  for name, (_, keys) in places.items():
    if name not in content.trained and content.whole & {_module(key) for key in keys}:
      raise ValueError(
        f'theta trains only a part of {name.rpartition("/")[0]!r}, without {name!r}: an adapter '
        'folder holds modules trained whole'
      )


def _adapter_config(
  content: _Content, pretrained: Pretrained, rslora: bool, base: str | None
) -> dict[str, Any]:
  """The values of adapter_config.json: the most frequent rank and alpha, and what differs."""
  common, _ = Counter(content.adapted.values()).most_common(1)[0]
  rank, alpha = common
  odd = {module: pair for module, pair in content.adapted.items() if pair != common}
  return {
    'peft_type': 'LORA',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'use_rslora': rslora,
    'use_dora': True in content.dora,
    'target_modules': sorted(content.adapted),
    'modules_to_save': sorted(content.whole) or None,
    'rank_pattern': {module: pair[0] for module, pair in odd.items()},
    'alpha_pattern': {module: pair[1] for module, pair in odd.items()},
    'task_type': _task_type(pretrained, bool(content.whole)),
  }


def _task_type(pretrained: Pretrained, whole: bool) -> str | None:
  """peft's name of what the model does; None leaves it open."""
  architecture = family_of(pretrained.config).table(pretrained.model).architectures[1]
  if architecture.endswith('ForCausalLM'):
    return 'CAUSAL_LM'
  # Of a classifier peft wants the head in the folder, which is there only if it was trained.
  if architecture.endswith('ForSequenceClassification') and whole:
    return 'SEQ_CLS'
  return None


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
  config = _read_config(folder)
  places = _places(pretrained)
  base = family_of(pretrained.config).table(pretrained.model).base
  parts = _read_parts(folder, places, base)
  theta: dict = {}  # {(rank, alpha) or 'modules': {site path: arrays}}
  for path, found in parts.items():
    site, _, array = path.rpartition('/')
    place, keys = places[path]
    arrays = {part: _joined(folder, path, place, keys, layers) for part, layers in found.items()}
    if 'whole' in arrays:
      theta.setdefault('modules', {}).setdefault(site, {})[array] = arrays['whole']
      continue
    pair = _rank_and_alpha(folder, config, path, _module(keys[0]), arrays)
    theta.setdefault(pair, {}).setdefault(site, {})[array] = arrays
  if 'modules' in theta:
    theta['modules'] = theta.pop('modules')  # last: what adapts comes first
  return _method(theta, config), {_name(key, theta): sites for key, sites in theta.items()}


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  """adapter_config.json, if it describes an adapter that can be read."""
  file = folder / CONFIG
  if not file.exists():
    raise FileNotFoundError(f'{folder} holds no {CONFIG}, so it is no adapter of peft')
  config = read_json(file)
  supported = {'peft_type': 'LORA', 'bias': 'none', 'fan_in_fan_out': False, 'lora_bias': False}
  for key, value in supported.items():
    if config.get(key, value) != value:
      raise ValueError(f'{file}: {key}={config[key]!r} is not supported, only {value!r}')
  start = str(config.get('init_lora_weights'))
  if start.startswith(_CHANGES_BASE):
    raise ValueError(
      f'{file}: init_lora_weights={start!r} adapts what is left of matrices once peft has taken '
      'them apart; have peft convert it to plain LoRA (path_initial_model_for_weight_conversion)'
    )
  missing = {'r', 'lora_alpha'} - config.keys()
  if missing:
    raise ValueError(f'{file} lacks {" and ".join(sorted(missing))}')
  return config


def _read_parts(folder: pathlib.Path, places: Mapping, base: str) -> dict[str, dict]:
  """{path of an array: {part: {layer: array}}} of the tensors in a folder.

  Args:
    folder: of the adapter.
    places: from `_places`.
    base: the prefix by which files of a model with a head differ from those without; it is left
      out, because the layers are the same.
  """
  homes = {}
  for place, keys in places.values():
    for layer, key in enumerate(keys):
      homes[key.removeprefix(base)] = place, layer
  parts: dict[str, dict] = {}
  for name, x in read_tensors(folder / FILE).items():
    key = name.removeprefix(_BASE)
    match = _ARRAY.fullmatch(key)
    if match:
      part = _PART_OF[match[2]]
      wanted = f'{match[1]}.weight'.removeprefix(base)
    elif '.base_layer.' in key:  # beside the factors of a table peft stores the table itself
      continue
    else:
      part = 'whole'
      wanted = key.removeprefix(base)
    if wanted not in homes:
      near = nearest(wanted, homes)
      hint = '' if near is None else f'; the nearest is {near!r}'
      raise ValueError(f'{folder / FILE}: {key!r} has no place in this backbone{hint}')
    place, layer = homes[wanted]
    parts.setdefault(place.path, {}).setdefault(part, {})[layer] = _ours(part, x, place)
  return parts


def _rank_and_alpha(
  folder: pathlib.Path, config: Mapping, path: str, module: str, arrays: Mapping
) -> tuple[int, float]:
  """Rank and alpha of the factors of an array, checked."""
  needed = set('abm' if config.get('use_dora') else 'ab')
  missing = needed - arrays.keys()
  if missing:
    raise ValueError(f'{folder / FILE}: {path!r} lacks {", ".join(sorted(missing))}')
  rank = _of(config.get('rank_pattern'), module, config['r'])
  found = arrays['a'].shape[-1]
  if found != rank:
    raise ValueError(f'{folder / FILE}: {path!r} is of rank {found}, and {CONFIG} says {rank}')
  return rank, _of(config.get('alpha_pattern'), module, config['lora_alpha'])


def _method(theta: Mapping, config: Mapping) -> Method:
  """The method whose theta this is; its keys are (rank, alpha), or 'modules'."""
  make = dora if config.get('use_dora') else lora
  rslora = bool(config.get('use_rslora'))
  methods = []
  for key, sites in theta.items():
    targets = '|'.join(map(re.escape, sites))
    if key == 'modules':
      methods.append(tune(targets, name='modules'))
      continue
    rank, alpha = key
    methods.append(make(rank, alpha, targets, rslora=rslora, name=_name(key, theta)))
  return chain(*methods)


def _name(key, theta: Mapping) -> str:
  """The name of a rule: the first of several ranks is 'lora', others have theirs in it."""
  if key == 'modules':
    return key
  first = next(other for other in theta if other != 'modules')
  if key == first:
    return 'lora'
  return 'lora_r{}_alpha{:g}'.format(*key)


# ---- Arrays here and there.


def _places(pretrained: Pretrained) -> dict[str, tuple[Place, list[str]]]:
  """{path of an array: (its place, its keys on disk, one a layer)} of a backbone."""
  family = family_of(pretrained.config)
  shapes = shapes_of(pretrained.model, family)
  found = keyed(family.table(pretrained.model), shapes)
  return {place.path: (place, keys) for place, keys in found}


def _module(key: str) -> str:
  """The module that an array belongs to, by its key on disk."""
  return key.rpartition('.')[0]


def _entries(theta: Mapping) -> Iterator[tuple[str, str, Any]]:
  """(name of a rule, site path, name of an array, what theta has of it)."""
  for name, sites in theta.items():
    for path, arrays in sites.items():
      for array, values in arrays.items():
        yield name, path, array, values


def _chosen(keys: Sequence[str], name: str, path: str, tuned: Tuned | None) -> Sequence[str]:
  """The names of the layers in which the method acts, of those of all layers."""
  if tuned is None:
    return keys
  chosen = tuned.site_of(name, path).chosen
  if chosen is None:
    return keys
  return [keys[i] for i in chosen]


def _check_layers(values, place: Place, keys: Sequence[str], path: str) -> None:
  """Raises a ValueError if theta has other layers than those that are written."""
  if not place.stacked:
    return
  count = len(jax.tree.leaves(values)[0])
  if count != len(keys):
    raise ValueError(
      f'theta has {count} layers for {path!r}, and the model {len(keys)}: of a method in some '
      'layers (layers=) give tuned='
    )


def _layers(x, place: Place) -> list[np.ndarray]:
  """The arrays of single layers."""
  if place.stacked:
    return list(np.asarray(x))
  return [np.asarray(x)]


def _joined(folder, path: str, place: Place, keys, layers: dict[int, np.ndarray]):
  """The array of all layers; the inverse of `_layers`."""
  for i, key in enumerate(keys):
    if i not in layers:
      raise ValueError(
        f'{folder / FILE} adapts some layers of {path!r} and not {key!r}: load the backbone with '
        'scan=False'
      )
  found = [layers[i] for i in range(len(keys))]
  whole = np.stack(found) if place.stacked else found[0]
  return jnp.asarray(whole, jnp.float32)


def _theirs(part: str, x: np.ndarray, place: Place) -> np.ndarray:
  """a [window * in, r], b [r, out] or m [out] as [r, in, *window], [out, r, 1 ...] or [out]."""
  window = place.shape[:-2]
  if part == 'a':
    x = x.reshape(*window, -1, x.shape[-1])  # [*window, in, r]
    return np.moveaxis(x, (-1, -2), (0, 1))
  if part == 'b':
    return x.T.reshape(*x.T.shape, *(1 for _ in window))
  return x


def _ours(part: str, x: np.ndarray, place: Place) -> np.ndarray:
  """The inverse of `_theirs`; of an array that was trained whole, that of `Leaf.theirs`."""
  if part == 'whole':
    return place.leaf.ours(x)
  if part == 'a':
    return np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, len(x))
  if part == 'b':
    return x.reshape(x.shape[:2]).T
  return x.reshape(-1)


def _of(pattern: Mapping | None, module: str, default):
  """The entry of a rank_pattern or alpha_pattern for a module.

  Its keys are ends of names, or regexes of them.
  """
  for key, value in (pattern or {}).items():
    if re.fullmatch(rf'(?:.*\.)?(?:{key})', module):
      return value
  return default
