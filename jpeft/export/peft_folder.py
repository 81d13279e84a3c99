"""What an adapter folder holds: factors or scales of matrices, and arrays trained whole."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Site, Sites, Weight
from jpeft.thetas import on_matrix

from .peft_config import (
  CONFIG,
  IA3,
  LN_TUNING,
  LORA,
  PROMPTS,
  VERA,
  alpha_of,
  rank_of,
  rows_trained,
  scaled,
  start_of,
)
from .peft_kin import KIN, Adapted, Making
from .peft_names import BASE, UNWRAPPED, Arrays, Fold, module_of
from .peft_prompts import ROWS

FILE = 'adapter_model.safetensors'
PARTS = {
  'a': 'lora_A.weight',
  'b': 'lora_B.weight',
  'm': 'lora_magnitude_vector',
  'bias': 'lora_B.bias',
}
TABLE_PARTS = {**PARTS, 'a': 'lora_embedding_A', 'b': 'lora_embedding_B'}
_PART_OF = {name: part for table in (PARTS, TABLE_PARTS) for part, name in table.items()}
SCALES = 'ia3_l'
NORMS = 'ln_tuning_layers'
_FACTOR = re.compile(r'(.+)\.(' + '|'.join(map(re.escape, _PART_OF)) + ')')
_VECTORS = {'vera_lambda_d': 'd', 'vera_lambda_b': 'e'}
_VECTOR = re.compile(r'.+\.vera_lambda_[db]')
_PAIR = {'base_model.vera_A': 'a', 'base_model.vera_B': 'b'}
TOKENS_DELTA = 'trainable_tokens_delta'  # the new rows of a table, no differences
_TOKENS = re.compile(rf'(.+?)(?:\.token_adapter)?\.{TOKENS_DELTA}')
HEAD = 'lm_head'  # the module that is the word table of a tied model
_PROBE = 32  # rows and columns of a matrix on which two computations are compared


@dataclasses.dataclass
class Factors:
  """What a folder says of one matrix w [fan_in, fan_out].

  Attributes:
    module: its name in the folder.
    rank: by the config.
    alpha: by the config.
    scale: s, by the config.
    parts: a [fan_in, r], b [r, fan_out]; of DoRA m [fan_out]; a0 and b0 of a start that peft takes
      out of w first; bias [fan_out] of what is added to the output.
  """

  module: str
  rank: int
  alpha: float
  scale: float
  parts: dict[str, np.ndarray]

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w, beside the bias."""
    parts = self.parts
    v = w + self.scale * (parts['a'] @ parts['b'])
    if 'a0' in parts:
      v = v - self.scale * (parts['a0'] @ parts['b0'])
    if 'm' in parts:
      v = parts['m'] / np.linalg.norm(v, axis=0) * v
    return v

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared."""
    return _spread(self.parts['a'].shape[0]), _spread(self.parts['b'].shape[1])

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Factors':
    """What is said of some rows and columns of w."""
    return dataclasses.replace(self, parts=self.cut_theta(self.parts, rows, columns))

  def cut_theta(
    self, theta: Mapping[str, Any], rows: np.ndarray, columns: np.ndarray
  ) -> dict[str, np.ndarray]:
    """theta of a rule for some rows and columns of w."""
    found = {}
    for part, x in theta.items():
      x = np.asarray(x, np.float32)
      if part in ('a', 'a0'):
        found[part] = x[rows]
      else:  # b, b0, m
        found[part] = x[..., columns]
    return found


@dataclasses.dataclass
class Scales:
  """(IA)^3 of one matrix w [fan_in, fan_out], as a folder says it.

  Attributes:
    module: its name in the folder.
    outputs: whether outputs are scaled; else inputs.
    l: the scales.
  """

  module: str
  outputs: bool
  l: np.ndarray

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w, beside the bias."""
    return w * (self.l if self.outputs else self.l[:, None])

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns on which it is compared; the other size of w makes no difference."""
    return _spread(len(self.l)), _spread(len(self.l))

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Scales':
    """What is said of some rows and columns of w."""
    return dataclasses.replace(self, l=self.cut_theta(self.l, rows, columns))

  def cut_theta(self, theta: Any, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """theta of a rule for some rows and columns of w."""
    return np.asarray(theta, np.float32)[columns if self.outputs else rows]


@dataclasses.dataclass
class Vectors:
  """VeRA of one matrix w [fan_in, fan_out], as a folder says it.

  Attributes:
    module: its name in the folder.
    parts: d [r], e [fan_out]; a [fan_in, r] and b [r, fan_out], cut out of the shared pair.
    whole: whether it is compared on whole matrices, for a rule that draws a pair for each shape.
  """

  module: str
  parts: dict[str, np.ndarray]
  whole: bool = False

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w."""
    parts = self.parts
    return w + (parts['a'] * parts['d']) @ parts['b'] * parts['e']

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared: the first, since a rule cuts its pair so."""
    sizes = self.parts['a'].shape[0], self.parts['b'].shape[1]
    if self.whole:
      return np.arange(sizes[0]), np.arange(sizes[1])
    return np.arange(min(sizes[0], _PROBE)), np.arange(min(sizes[1], _PROBE))

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Vectors':
    """What is said of some rows and columns of w."""
    parts = self.parts
    own = self.cut_theta({'d': parts['d'], 'e': parts['e']}, rows, columns)
    pair = {'a': parts['a'][rows], 'b': parts['b'][:, columns]}
    return dataclasses.replace(self, parts={**own, **pair})

  def cut_theta(
    self, theta: Mapping[str, Any], rows: np.ndarray, columns: np.ndarray
  ) -> dict[str, np.ndarray]:
    """theta of a rule for some rows and columns of w."""
    return {'d': np.asarray(theta['d']), 'e': np.asarray(theta['e'])[columns]}


@dataclasses.dataclass
class Folder:
  """The content of a folder, by our paths.

  Attributes:
    where: the file, for messages.
    factors: {path of an array: {layer: its factors}}.
    scales: {path of an array: {layer: its scales}}.
    vectors: {path of an array: {layer: its vectors}}.
    kin: {path of an array: {layer: what is said of it}}, of kinds with tensors of their own.
    pair: a [largest fan_in, r] and b [r, largest fan_out] that the vectors share.
    whole: {path of an array: {layer: array}} of what was trained whole.
    rows: `prompt_embeddings` of prompts and prefixes; else None.
  """

  where: Any
  factors: dict[str, dict[int, Factors]] = dataclasses.field(default_factory=dict)
  scales: dict[str, dict[int, Scales]] = dataclasses.field(default_factory=dict)
  vectors: dict[str, dict[int, Vectors]] = dataclasses.field(default_factory=dict)
  kin: dict[str, dict[int, Adapted]] = dataclasses.field(default_factory=dict)
  pair: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  whole: dict[str, dict[int, np.ndarray]] = dataclasses.field(default_factory=dict)
  rows: np.ndarray | None = None


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
    _check_kind(where, key, bool(match), config)
    kin = KIN.get(config.get('peft_type', LORA))
    own = kin and kin.split(key)
    if own:
      _add_kin(found, *own, x, config, arrays)
    elif match:
      _add_factor(found, match[1], _PART_OF[match[2]], x, config, arrays)
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
      _check_base(where, key, x, arrays)
    else:
      plain = key.replace('.base_layer.', '.').replace(f'.{NORMS}.', '.')
      path, layer = arrays.home(plain, where)
      found.whole.setdefault(path, {})[layer] = arrays.places[path][0].leaf.ours(x)
  for path, layers in found.factors.items():
    for layer, factors in layers.items():
      _check_factors(found, path, factors, config)
      start = start_of(config)
      if start is not None:
        _add_start(found, path, layer, factors, start, arrays)
      if 'bias' in factors.parts:
        _add_bias(found, path, layer, factors, arrays)
  _add_pair(found, config, arrays)
  _add_tokens(found, tokens, config, arrays)
  if base == UNWRAPPED and found.rows is None:
    raise ValueError(f'{where} lacks {ROWS}, the rows of {config["peft_type"]}')
  _check_unread(found, config, arrays)
  _check_tied(found, config, arrays, head)
  return found


def _check_kind(where: Any, key: str, factor: bool, config: Mapping) -> None:
  """Raises a ValueError if a tensor is of another kind than the config says."""
  kind = LORA
  if key.endswith(f'.{SCALES}'):
    kind = IA3
  elif f'.{NORMS}.' in key:
    kind = LN_TUNING
  elif 'vera_' in key:
    kind = VERA
  elif not factor:
    kinds = [kin.kind for kin in KIN.values() if kin.split(key)]
    if not kinds:
      return  # trained whole, beside any kind
    (kind,) = kinds
  told = config.get('peft_type', LORA)
  if kind != told:
    raise ValueError(f'{where}: {key!r} is of {kind}, and adapter_config.json says {told}')


def _add_factor(
  found: Folder, module: str, part: str, x: np.ndarray, config: Mapping, arrays: Arrays
) -> None:
  path, layer = arrays.home(f'{module}.weight', found.where)
  layers = found.factors.setdefault(path, {})
  if layer not in layers:
    rank, alpha = rank_of(config, module), alpha_of(config, module)
    scale = scaled(rank, alpha, bool(config.get('use_rslora')))
    layers[layer] = Factors(module, rank, alpha, scale, {})
  layers[layer].parts[part] = Fold(arrays.places[path][0]).ours(part, x)


def _add_kin(
  found: Folder, module: str, part: str, x: np.ndarray, config: Mapping, arrays: Arrays
) -> None:
  path, layer = arrays.home(f'{module}.weight', found.where)
  layers = found.kin.setdefault(path, {})
  if layer not in layers:
    shape = arrays.places[path][0].shape
    kin = KIN[config['peft_type']]
    if len(shape) != 2 or path.endswith('/embedding'):
      raise ValueError(
        f'{found.where}: {kin.kind} of {path!r}: kinds other than LoRA are read of linear layers '
        'alone'
      )
    making = Making(kin.kind, tuple(kin.told(config, module).items()))
    layers[layer] = Adapted(module, making, (shape[0], shape[1]), {})
  layers[layer].parts[part] = x


def _check_factors(found: Folder, path: str, factors: Factors, config: Mapping) -> None:
  """Raises a ValueError if a part is missing, or the config has another rank."""
  needed = set('abm' if config.get('use_dora') else 'ab')
  missing = needed - factors.parts.keys()
  if missing:
    raise ValueError(f'{found.where}: {path!r} lacks {", ".join(sorted(missing))}')
  rank = factors.parts['a'].shape[-1]
  if rank != factors.rank:
    raise ValueError(
      f'{found.where}: {path!r} is of rank {rank}, and adapter_config.json says {factors.rank}'
    )


def _check_base(where, key: str, x: np.ndarray, arrays: Arrays) -> None:
  """Raises a ValueError if a table that is stored beside its factors is not the backbone's."""
  path, layer = arrays.home(key.replace('.base_layer.', '.'), where)
  place, _ = arrays.places[path]
  same = place.leaf.ours(x).shape == place.shape
  base = arrays.layers(path)
  if same and base is not None:
    # It may be stored in bfloat16.
    same = np.allclose(place.leaf.ours(x), base[layer], atol=0.01 * np.abs(base[layer]).max())
  if not same:
    raise ValueError(
      f'{where}: {key!r} is not what this backbone has there (a vocabulary that was resized?): '
      'load the backbone that the adapter was trained on'
    )


def _add_start(
  found: Folder, path: str, layer: int, factors: Factors, start: str, arrays: Arrays
) -> None:
  """Adds a0 and b0: what peft took out of a kernel before it trained a and b."""
  place, _ = arrays.places[path]
  if path.endswith('/embedding') or len(place.shape) != 2:
    return  # peft takes the kernels of linear layers apart, and no other
  base = arrays.layers(path)
  if base is None:
    raise ValueError(
      f'{found.where}: init_lora_weights={start!r} needs the kernel {path!r} of the backbone '
      'itself, neither its shape nor its 4-bit codes'
    )
  if not factors.scale > 0:
    raise ValueError(
      f'{found.where}: {path!r} has alpha={factors.alpha}, and {start} no start of such a scale'
    )
  w = np.asarray(base[layer], np.float32)
  if start == 'pissa':
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[: factors.rank] / factors.scale)
    a, b = u[:, : factors.rank] * root, root[:, None] * vt[: factors.rank]
  else:  # OLoRA: of the transpose, w.T = q r
    q, r = np.linalg.qr(w.T)
    a, b = r[: factors.rank].T, q[:, : factors.rank].T
  factors.parts |= {'a0': a, 'b0': b}


def _add_bias(found: Folder, path: str, layer: int, factors: Factors, arrays: Arrays) -> None:
  """Adds what is added to the output of a layer to the layer's own bias."""
  added = factors.scale * factors.parts.pop('bias')
  bias = f'{path.rpartition("/")[0]}/bias'
  if bias not in arrays.places:
    raise ValueError(f'{found.where}: lora_bias adds to {path!r}, whose layer has no bias here')
  own = found.whole.setdefault(bias, {})
  if layer not in own:
    base = arrays.layers(bias)
    if base is None:
      raise ValueError(f'{found.where}: lora_bias needs {bias!r} of the backbone, not its shape')
    own[layer] = base[layer]
  own[layer] = own[layer] + added


def _add_pair(found: Folder, config: Mapping, arrays: Arrays) -> None:
  """Adds to the vectors of each matrix what it has of the shared pair."""
  if not found.vectors:
    return
  if found.pair.keys() != {'a', 'b'}:
    raise ValueError(
      f'{found.where} lacks the projections vera_A and vera_B, which torch alone can draw again: '
      'have peft save them (save_projection=True)'
    )
  a, b = found.pair['a'], found.pair['b']
  for path, layers in found.vectors.items():
    for vectors in layers.values():
      missing = {'d', 'e'} - vectors.parts.keys()
      if missing:
        raise ValueError(f'{found.where}: {path!r} lacks {", ".join(sorted(missing))}')
      if a.shape[1] != config['r'] or len(vectors.parts['d']) != config['r']:
        raise ValueError(f'{found.where}: {path!r} is not of the rank {config["r"]} of {CONFIG}')
      fan_in, fan_out = arrays.places[path][0].shape
      vectors.parts |= {'a': a[:fan_in], 'b': b[:, :fan_out]}


def _add_tokens(
  found: Folder, tokens: Mapping[str, np.ndarray], config: Mapping, arrays: Arrays
) -> None:
  """Adds tables some rows of which were trained, as wholes."""
  named = config.get('token_indices') or config.get('trainable_token_indices')
  if named and not tokens:
    raise ValueError(f'{found.where} lacks the rows of tables that {CONFIG} names: {named}')
  own = {module: x for module, x in tokens.items() if module not in arrays.copies}
  for module, x in own.items():
    path, layer = arrays.home(f'{module}.weight', found.where)
    rows = list(rows_trained(config, module))
    base = arrays.layers(path)
    if len(rows) != len(x):
      raise ValueError(
        f'{found.where} has {len(x)} rows for {module!r}, and {CONFIG} names {len(rows)}'
      )
    if base is None:
      raise ValueError(
        f'{found.where}: rows of {module!r} go into those of the backbone, which has only the '
        'shape of it'
      )
    if path in found.factors or path in found.whole:
      raise ValueError(
        f'{found.where}: {module!r} is trained both whole, or by factors, and by rows'
      )
    leaf = arrays.places[path][0].leaf
    new = np.array(leaf.theirs(base[layer]), np.float32)
    new[rows] = x
    found.whole[path] = {layer: leaf.ours(new)}
  for module in tokens.keys() - own.keys():
    if not any(np.array_equal(tokens[module], x) for x in own.values()):
      raise ValueError(
        f'{found.where}: {module!r} is the word table of this backbone, and its rows change alone: '
        'train them in the table itself'
      )


def _check_unread(found: Folder, config: Mapping, arrays: Arrays) -> None:
  """Raises a ValueError if something acts on a table that transformers does not read there."""
  path = arrays.unread_table
  adapted = path in found.factors
  saved = path in found.whole and _is_saved(arrays.places[path][1][0], config)
  if path is not None and (adapted or saved):
    raise ValueError(
      f'{found.where}: {module_of(arrays.places[path][1][0])!r} of T5 is read by no layer in '
      'transformers, so that in peft this adapter has no effect'
    )


def _is_saved(key: str, config: Mapping) -> bool:
  """Whether modules_to_save names the module of a key, so that peft has a copy of it."""
  names = config.get('modules_to_save') or ()
  return any(f'.{name}.' in f'.{module_of(key)}.' for name in names)


def _check_tied(
  found: Folder, config: Mapping, arrays: Arrays, head: Mapping[str, np.ndarray]
) -> None:
  """Raises a ValueError if the word table and the head of a tied model would part.

  Args:
    found: what there is of the table.
    config: of the folder.
    arrays: of the backbone.
    head: {end of a key: array} of what there is of the head.
  """
  path = arrays.tied
  if path is None:
    return
  factors = found.factors.get(path, {}).get(0)
  whole = found.whole.get(path, {}).get(0)
  parted = None
  if config.get('use_dora') and factors is not None:
    parted = 'have magnitudes of their own'
  elif not _same_head(head, factors, whole):
    parted = 'are changed in different ways'
  elif config.get('ensure_weight_tying') or head:
    return
  elif factors is not None or _is_saved(arrays.places[path][1][0], config):
    parted = 'part, since peft changes the table alone (ensure_weight_tying=False)'
  if parted is not None and (head or factors is not None or whole is not None):
    raise ValueError(
      f'{found.where}: the head of this backbone is its word table, and in peft the two {parted}: '
      'load the adapter on jpeft.models.untied(pretrained)'
    )


def _same_head(
  head: Mapping[str, np.ndarray], factors: Factors | None, whole: np.ndarray | None
) -> bool:
  """Whether the head has what the table has, if it has anything."""
  head = {end: x for end, x in head.items() if not end.startswith('base_layer.')}
  want = tied_head(factors.parts if factors else {}, whole)
  if not head:
    return True
  return head.keys() == want.keys() and all(np.array_equal(x, want[end]) for end, x in head.items())


def tied_head(parts: Mapping[str, np.ndarray], whole: np.ndarray | None) -> dict[str, np.ndarray]:
  """{end of a key: array} of a head that has what its table has, by parts or whole."""
  if whole is not None:
    return {'weight': whole}
  if not parts:
    return {}
  # The kernel [d, V] of the head is the table [V, d] transposed: a b becomes b.T a.T.
  return {PARTS['a']: np.asarray(parts['b']), PARTS['b']: np.asarray(parts['a'])}


# ---- What the folder says beside what rules compute.


def lone_site(path: str, array: str, shape: tuple[int, int]) -> Site:
  """A site with one kernel or table, for asking a rule what it makes of it."""
  use = 'gather' if array == 'embedding' else 'dot_general'
  leaf = Leaf(shape, jnp.dtype('float32'), use, ins=(0,))
  return Site(path, '', {array: leaf}, {}, None, (), (), (), None, None, (), {}, Sites())


def check_same(
  where: Any,
  stored: Factors | Scales | Vectors | Adapted,
  rule: Weight,
  site: Site,
  array: str,
  t: Any,
) -> None:
  """Raises a ValueError unless a rule makes of matrices what a folder says.

  Both get a random matrix in place of some rows and columns of the kernel.

  Args:
    where: the file, for the message.
    stored: by the folder.
    rule: that adapts the matrix here.
    site: where.
    array: name of the matrix in the site.
    t: theta of the rule for this layer.
  """
  rows, columns = stored.probe()
  w = np.random.default_rng(0).standard_normal((len(rows), len(columns))).astype(np.float32)
  want = stored.cut(rows, columns).weight(w)
  t = jax.tree.map(jnp.asarray, stored.cut_theta(t, rows, columns))
  found = np.asarray(on_matrix(rule, site, array, t, jnp.asarray(w)))
  bound = 1e-4 * np.abs(want - w).max() + 1e-5 * np.abs(want).max()
  apart = np.abs(found - want).max()
  if not apart <= bound:
    raise ValueError(
      f'{where}: by its config {stored.module!r} computes something else than {rule.name!r} at '
      f'{site.path!r} does (largest difference {apart:.2g} on a random matrix): such a folder '
      'cannot hold what this rule computes'
    )


def _spread(size: int) -> np.ndarray:
  """Up to _PROBE numbers below a size, evenly spread."""
  return np.unique(np.linspace(0, size - 1, min(size, _PROBE)).astype(int))
