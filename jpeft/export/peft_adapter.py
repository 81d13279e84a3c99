"""The methods of jpeft in the adapter folders of Hugging Face's peft, where both have them.

Such a folder has adapter_config.json and adapter_model.safetensors. peft names an array by a module
of the base model, and keeps the factors of a matrix [out, in] transposed: `lora_A` [r, in] and
`lora_B` [out, r], where jpeft has a [in, r] and b [r, out].

What is read and what is written is compared with the rules: for every matrix, what peft computes by
the config of the folder is what the rule makes of it. Where rules do other things than that
(prompts, prefixes, rules without theta), the model is run with the method and with the folder.
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

from jpeft.core import Method, Rule, Site, Tuned, Weight, chain
from jpeft.methods import dora, ia3, lora, prefix, prompt_tuning, tune, vera, vera_pair
from jpeft.models import Place, Pretrained, read_tensors, write_tensors
from jpeft.thetas import on_matrix
from jpeft.writing import filled, write

from .bottlenecks import is_of_adapters, load_bottlenecks, save_bottlenecks
from .compare import check_outputs
from .peft_config import (
  CONFIG,
  IA3,
  LN_TUNING,
  LORA,
  PREFIX_TUNING,
  PROMPT_TUNING,
  PROMPTS,
  TOKENS,
  VERA,
  read_config,
  scaled,
  start_of,
)
from .peft_folder import (
  FILE,
  HEAD,
  NORMS,
  PARTS,
  SCALES,
  TABLE_PARTS,
  TOKENS_DELTA,
  Factors,
  Folder,
  Vectors,
  base_of,
  check_same,
  lone_site,
  read_folder,
  tied_head,
)
from .peft_kin import KIN, Adapted, Making, config_of, making_of
from .peft_names import NEW, UNWRAPPED, Arrays, Fold, joined, layers_of, module_of
from .peft_prompts import ROWS, read_rows, taken_apart, write_rows

PEFT, ADAPTERS = LAYOUTS = ('peft', 'adapters')

# Names of the two forms of (IA)^3, and of VeRA, among the rules that are read.
OUTPUTS, INPUTS, SHARED = 'outputs', 'inputs', 'shared'

# ---- Writing.


def save_adapter(
  folder: str | pathlib.Path,
  pretrained: Pretrained,
  theta: Mapping,
  alpha: float | None = None,
  rslora: bool = False,
  base: str | None = None,
  tuned: Tuned | None = None,
  names: str = NEW,
  layout: str = PEFT,
) -> None:
  """Writes theta as peft does: of one method, and of modules trained whole beside it.

  The method is LoRA, DoRA, VeRA, (IA)^3, prompt tuning, prefix tuning of a decoder, or one of
  `peft_kin`, such as LoHa. Norms that are trained without any of them are written as peft's
  LN_TUNING, and rows of a table as TRAINABLE_TOKENS. VeRA of kernels of several shapes, each
  around a random pair of its own, is written as VeRA of as many times the rank around one.

  Rules at different sites may differ in rank and scale: the folder says so in rank_pattern and
  alpha_pattern. A start that takes the matrix apart (PiSSA, OLoRA) is written as LoRA of twice the
  rank: the base model holds the whole matrix. A table that is the head as well is written with
  ensure_weight_tying.

  Args:
    folder: where to; made if needed.
    pretrained: the backbone that theta was trained on.
    theta: {rule: {site path: arrays}}.
    alpha: of a method with one rule; left out it is asked of the rules of `tuned`.
    rslora: of the method: the config then gives scales as alpha / sqrt(rank).
    base: name or path of the base model, for whoever opens the folder.
    tuned: the method on the backbone. Needed unless theta is of one rule that acts in all layers,
      whose alpha is given.
    layout: 'peft'; or 'adapters' for houlsby, pfeiffer, parallel and adaptformer as the `adapters`
      library writes them, with the head if it was trained.
    names: of the modules: 'transformers>=5' as transformers from 5 on calls them in memory,
      'transformers<5' as files do. They differ for ViTs of any kind.

  Raises:
    ValueError: theta holds what such folders cannot.
  """
  if layout not in LAYOUTS:
    raise ValueError(f'layout={layout!r} is none of {", ".join(map(repr, LAYOUTS))}')
  if layout == ADAPTERS:
    if alpha is not None or rslora:
      raise ValueError("save_adapter: alpha and rslora are of LoRA, not of layout='adapters'")
    save_bottlenecks(pathlib.Path(folder), pretrained, theta, tuned, base)
    return
  arrays = Arrays(pretrained, names)
  trained = theta
  if tuned is not None:
    theta = tuned.expand(theta)
  folder = pathlib.Path(folder)
  content = _content(folder / FILE, arrays, theta, alpha, rslora, tuned)
  config = _adapter_config(content, arrays, rslora, base)
  start = base_of(config)
  tensors = {start + key: x for key, x in content.tensors.items()} | content.shared
  tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
  written = read_folder(folder / FILE, config, tensors, arrays)
  if tuned is not None:
    _check_written(written, arrays, theta, tuned)
    _check_outputs(written, config, arrays, theta, tuned, trained)
  with filled(folder) as part:
    write_tensors(part / FILE, tensors)
    write(part / CONFIG, json.dumps(config, indent=2) + '\n')


@dataclasses.dataclass
class _Content:
  """What a folder gets.

  Attributes:
    tensors: {name in the file: array}.
    kind: peft_type of the folder.
    adapted: {module: (rank, alpha)} of LoRA and DoRA.
    kin: {module: its kind and hyperparameters} of kinds with tensors of their own.
    scaled: {module: whether its outputs are scaled} of (IA)^3.
    whole: modules that are trained whole.
    norms: those of them that are norms, of LN_TUNING.
    biases: whether biases are trained of modules that are not.
    tied: whether a table changes that is the head as well.
    shared: {name in the file: array} of what belongs to no module.
    told: what the config says of that.
    tokens: {module of a table: its rows that are trained}.
  """

  kind: str
  tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  scaled: dict[str, bool] = dataclasses.field(default_factory=dict)
  kin: dict[str, Making] = dataclasses.field(default_factory=dict)
  adapted: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  whole: set[str] = dataclasses.field(default_factory=set)
  norms: set[str] = dataclasses.field(default_factory=set)
  biases: bool = False
  tied: bool = False
  shared: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  told: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def _content(
  file: pathlib.Path,
  arrays: Arrays,
  theta: Mapping,
  alpha: float | None,
  rslora: bool,
  tuned: Tuned | None,
) -> _Content:
  """What theta is in a folder."""
  prompts, title, sites, theta = taken_apart(theta)
  _check_places(arrays, theta)
  content = _Content(_kind(theta, arrays, prompts, tuned))
  if prompts is not None:
    if tuned is None:
      raise ValueError(f'save_adapter: give tuned=, which says what {title!r} does with its rows')
    rows, content.told = write_rows(file, prompts, title, sites, arrays)
    content.shared[ROWS] = rows
  _check_scales(theta, alpha, tuned)
  pairs = _Pairs(arrays)
  trained: dict[str, tuple[Sequence[str], list[np.ndarray]]] = {}  # {path: (keys, layers)}
  for name, path, array, values in _entries(theta):
    where = f'{path}/{array}'
    adapts = isinstance(values, Mapping)
    if where == arrays.unread_table and adapts:
      raise ValueError(
        f'theta has {name!r} at {path!r}: in transformers no layer of T5 reads the module of this '
        'table, so that peft cannot adapt it'
      )
    place, every = arrays.places[where]
    keys = _chosen(every, name, path, tuned)
    _check_layers(values, place.stacked, keys, path)
    if _is_scales(values, place):
      outputs = _of_outputs(name, path, array, values, arrays, tuned)
      _add_scales(content, keys, outputs, layers_of(values, place))
      continue
    if not adapts:
      trained[where] = keys, layers_of(values, place)
      continue
    making = _making(tuned, name, path)
    if making is not None:
      _add_kin(content, making, place, [module_of(key) for key in keys], values)
      continue
    if _is_vera(values):
      rule = _drawing_rule(tuned, name, path)
      pairs.add(rule, place, [module_of(key) for key in keys], values)
      continue
    scale = _scale(name, path, array, values, alpha, rslora, tuned)
    _add_factors(content, arrays, where, values, keys, scale, rslora)
  if content.kind == VERA:
    pairs.write(content)
  if content.kin:
    content.told = config_of(content.kin)
  _add_trained(content, arrays, trained)
  return content


def _check_places(arrays: Arrays, theta: Mapping) -> None:
  """Raises a ValueError if theta is of other things than arrays of the backbone."""
  for name, path, array, _ in _entries(theta):
    if f'{path}/{array}' not in arrays.places:
      raise ValueError(
        f'theta has {name!r} at {path or "the model"!r}, and no array {array!r} of the pretrained '
        'files is there: an adapter folder holds whole modules; of a generated method, give tuned='
      )


def _kind(theta: Mapping, arrays: Arrays, prompts: str | None, tuned: Tuned | None) -> str:
  """peft_type of the folder that holds theta, beside prompts or a prefix if there are some.

  Raises:
    ValueError: there is none, or several are needed.
  """
  kinds = set() if prompts is None else {prompts}
  norms = tables = False
  for name, path, array, values in _entries(theta):
    place, _ = arrays.places[f'{path}/{array}']
    making = _making(tuned, name, path)
    if making is not None:
      kinds.add(making.kind)
    elif _is_scales(values, place):
      kinds.add('(IA)^3')
    elif not isinstance(values, Mapping):
      norms = norms or _is_norm(place)
      tables = tables or array == 'embedding'
      _check_shape(values, place)
    elif {'a', 'b'} <= values.keys() <= {'a', 'b', 'm', 'a0', 'b0'}:
      kinds.add('DoRA' if 'm' in values else 'LoRA')
    elif _is_vera(values):
      kinds.add('VeRA')
    else:
      listed = ', '.join(kin.factory for kin in KIN.values())
      raise ValueError(
        f'theta holds {", ".join(values)} for {path!r}: an adapter folder holds LoRA or DoRA, or '
        f'with tuned= one of {listed}'
      )
  if len(kinds) > 1:
    raise ValueError(
      f'theta holds both {" and ".join(sorted(kinds, reverse=True))}: an adapter folder is of one '
      'of them'
    )
  if kinds:
    (kind,) = kinds
    return {'(IA)^3': IA3, 'VeRA': VERA, 'LoRA': LORA, 'DoRA': LORA}.get(kind, kind)
  if norms:
    return LN_TUNING
  if tables:
    return TOKENS
  raise ValueError(
    'theta holds neither LoRA nor DoRA, VeRA, (IA)^3, prompts, a prefix, norms or rows of a table: '
    'an adapter folder is of one of them'
  )


def _making(tuned: Tuned | None, name: str, path: str) -> Making | None:
  """The kind and hyperparameters of the rule of a name at a site, if peft has tensors for it."""
  if tuned is None:
    return None
  for rule, site in tuned.rules:
    if (rule.name, site.path) == (name, path) and isinstance(rule, Weight):
      return making_of(rule)
  return None


def _add_kin(
  content: _Content, making: Making, place: Place, modules: Sequence[str], values: Mapping
) -> None:
  """Adds the tensors of one array.

  Raises:
    ValueError: peft has no such adapter of the array, or there are two.
  """
  kin = making.kin
  if len(place.shape) != 2:
    raise ValueError(f'{kin.factory} of {place.path!r}: it is written of linear layers alone')
  split = {part: layers_of(values[part], place) for part in values if part in kin.parts}
  for number, module in enumerate(modules):
    if module in content.kin:
      raise ValueError(f'theta has {kin.factory} twice at {module!r}: a folder holds one')
    content.kin[module] = making
    tensors = kin.theirs({part: layers[number] for part, layers in split.items()})
    content.tensors |= {f'{module}.{kin.parts[part]}': x for part, x in tensors.items()}


def _is_vera(values: Mapping) -> bool:
  """Whether theta has the two vectors of VeRA for a kernel."""
  return values.keys() == {'d', 'e'}


def _drawing_rule(tuned: Tuned | None, name: str, path: str) -> Rule:
  """The rule of VeRA at a site, which knows its random pair.

  Raises:
    ValueError: there is none, or it was made by another factory.
  """
  if tuned is None:
    raise ValueError(f'save_adapter: give tuned=, whose rules know the random pair of {name!r}')
  rule, _ = _rule_of(tuned, name, path)
  if rule.origin is None or rule.origin.factory != 'vera':
    raise ValueError(
      f'{name!r} at {path!r} is no rule of jpeft.vera: nothing tells its random pair'
    )
  return rule


class _Pairs:
  """VeRA of several layers around the one pair a, b that peft has for all of them.

  Of a pair of its own each shape of kernels gets a block of the rank: d is zero in the others.
  """

  def __init__(self, arrays: Arrays):
    self.arrays = arrays
    self.blocks: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
    self.vectors: dict[str, tuple[Any, np.ndarray, np.ndarray]] = {}  # {module: (block, d, e)}

  def add(self, rule: Rule, place: Place, modules: Sequence[str], values: Mapping) -> None:
    """Adds the vectors of one array.

    Raises:
      ValueError: peft has no VeRA of such an array, or two at it.
    """
    if len(place.shape) != 2:
      raise ValueError(f'VeRA of {place.path!r}: peft has it of linear layers alone')
    hyper = rule.origin.hyperparameters if rule.origin else {}
    given = hyper['projections']
    block = (rule.name,) if given is not None else (rule.name, *place.shape)
    if block not in self.blocks:
      pair = given if given is not None else vera_pair(hyper['seed'], hyper['rank'], *place.shape)
      self.blocks[block] = np.asarray(pair[0]), np.asarray(pair[1])
    layers = (layers_of(np.asarray(values[part]), place) for part in 'de')
    for module, d, e in zip(modules, *layers, strict=True):
      if module in self.vectors:
        raise ValueError(f'theta has VeRA twice at {module!r}: an adapter folder holds one')
      self.vectors[module] = block, d, e

  def write(self, content: _Content) -> None:
    """Writes the pair and all vectors."""
    ranks = {block: a.shape[1] for block, (a, _) in self.blocks.items()}
    shapes = [
      self.arrays.places[self.arrays.home(f'{m}.weight', m)[0]][0].shape for m in self.vectors
    ]
    fan_in, fan_out = (max(sizes) for sizes in zip(*shapes, strict=True))
    rank = sum(ranks.values())
    a, b = np.zeros((fan_in, rank), np.float32), np.zeros((rank, fan_out), np.float32)
    starts = {}
    start = 0
    for block, (own_a, own_b) in self.blocks.items():
      end = start + ranks[block]
      a[: len(own_a), start:end] = own_a[:fan_in]
      b[start:end, : own_b.shape[1]] = own_b[:, :fan_out]
      starts[block] = start
      start = end
    for module, (block, d, e) in self.vectors.items():
      whole = np.zeros(rank, np.float32)
      whole[starts[block] : starts[block] + ranks[block]] = d
      content.tensors[f'{module}.vera_lambda_d'] = whole
      content.tensors[f'{module}.vera_lambda_b'] = e
    content.shared |= {f'{UNWRAPPED}vera_A': a.T, f'{UNWRAPPED}vera_B': b.T}
    content.told = {
      'r': rank,
      'target_modules': sorted(self.vectors),
      'projection_prng_key': 0,
      'save_projection': True,
      'vera_dropout': 0.0,
      'bias': 'none',
      'fan_in_fan_out': False,
    }


def _is_scales(values: Any, place: Place) -> bool:
  """Whether theta has one number for each input or output of a kernel."""
  if isinstance(values, Mapping) or len(place.shape) < 2:
    return False
  return np.ndim(values) == 1 + place.stacked


def _is_norm(place: Place) -> bool:
  """Whether an array is the scale of a norm."""
  return place.path.endswith('/scale') and place.leaf.suffix == '.weight'


def _check_shape(values: Any, place: Place) -> None:
  """Raises a ValueError if theta has another array than that of the backbone."""
  shape = np.shape(values)[1:] if place.stacked else np.shape(values)
  if shape != place.shape:
    raise ValueError(
      f'theta has an array {list(shape)} for {place.path!r}, which is {list(place.shape)}: an '
      'adapter folder holds arrays that were trained whole'
    )


def _check_scales(theta: Mapping, alpha: float | None, tuned: Tuned | None) -> None:
  """Raises a ValueError if nothing says how the factors of each rule are scaled."""
  if tuned is not None:
    return
  adapters = {
    name
    for name, _, _, values in _entries(theta)
    if isinstance(values, Mapping) and not _is_vera(values)
  }
  if not adapters:
    return
  if alpha is None:
    raise ValueError('save_adapter: give tuned=, whose rules are asked for their alphas, or alpha=')
  if len(adapters) > 1:
    raise ValueError(
      f'theta holds several adapters ({", ".join(sorted(adapters))}), and one alpha may not be '
      'that of all: give tuned=, whose rules are asked for theirs'
    )


def _scale(name, path, array, values, alpha, rslora, tuned) -> float:
  """s of w + s a b: of the rule in `tuned`, else by alpha."""
  rank = np.shape(values['a'])[-1]
  if tuned is None:
    return scaled(rank, alpha, rslora)
  rule, site = _rule_of(tuned, name, path)
  scale = _asked(rule, site, array, values)
  if alpha is not None and not np.isclose(scale, scaled(rank, alpha, rslora), rtol=1e-4):
    raise ValueError(
      f'alpha={alpha} with rslora={rslora} scales a b by {scaled(rank, alpha, rslora):.6g}, and '
      f'{name!r} at {path!r} by {scale:.6g}: leave alpha out, it is asked of the rules'
    )
  return scale


def _rule_of(tuned: Tuned, name: str, path: str) -> tuple[Weight, Site]:
  """The rule of a name at a site."""
  found: Rule | None = None
  for rule, site in tuned.rules:
    if (rule.name, site.path) == (name, path):
      found = rule
      break
  if not isinstance(found, Weight) or found.outer:
    raise ValueError(
      f'{name!r} at {path!r} is no change of weights alone: an adapter folder holds LoRA or DoRA'
    )
  return found, site


def _asked(rule: Weight, site: Site, array: str, values: Mapping) -> float:
  """s of w + s a b, asked of the rule itself on a small matrix.

  Of DoRA, whose columns have other lengths than those of w + s a b, the directions tell.
  """
  rng = np.random.default_rng(0)
  rank = np.shape(values['a'])[-1]
  w, a, b = (rng.standard_normal(shape) for shape in ((16, 16), (16, rank), (rank, 16)))
  parts = {'a': a, 'b': b}
  if 'm' in values:
    parts['m'] = np.ones(16)
  if 'a0' in values:
    parts |= {'a0': np.zeros_like(a), 'b0': np.zeros_like(b)}
  t = {part: jnp.asarray(x, jnp.float32) for part, x in parts.items()}
  new = np.asarray(on_matrix(rule, site, array, t, jnp.asarray(w, jnp.float32)), np.float64)
  product = a @ b
  if 'm' in values:
    # new_i / new_j = (w + s a b)_i / (w + s a b)_j for the rows i and j of a column
    left = new[:1] * w[1:] - new[1:] * w[:1]
    right = new[1:] * product[:1] - new[:1] * product[1:]
  else:
    left, right = new - w, product
  return float((left * right).sum() / (right**2).sum())


def _add_factors(
  content: _Content, arrays: Arrays, where: str, values: Mapping, keys, scale: float, rslora: bool
) -> None:
  """Adds the factors of one array."""
  place, _ = arrays.places[where]
  values = {part: np.asarray(x) for part, x in values.items()}
  if 'a0' in values:
    # a b - a0 b0 is LoRA of twice the rank.
    values = {
      'a': np.concatenate([values['a'], values['a0']], -1),
      'b': np.concatenate([values['b'], -values['b0']], -2),
    }
  rank = values['a'].shape[-1]
  alpha = _plain(scale * rank ** (0.5 if rslora else 1))
  modules = [module_of(key) for key in keys]
  for module in modules:
    if module in content.adapted:
      raise ValueError(
        f'theta has two adapters at {where!r}: an adapter folder holds one; jpeft.thetas.concat '
        'makes one of two, and two folders hold each'
      )
    content.adapted[module] = rank, alpha
  table = TABLE_PARTS if where.endswith('/embedding') else PARTS
  for part, x in values.items():
    for module, layer in zip(modules, layers_of(x, place), strict=True):
      content.tensors[f'{module}.{table[part]}'] = Fold(place).theirs(part, layer)
  if where == arrays.tied:
    if 'm' in values:
      raise ValueError(
        f'DoRA of {where!r}, which is the head of the model as well: peft gives the two magnitudes '
        'of their own; load the backbone through jpeft.models.untied'
      )
    content.tied = True
    content.tensors |= {f'{HEAD}.{end}': x for end, x in tied_head(values, None).items()}


def _of_outputs(name, path, array, values, arrays: Arrays, tuned: Tuned | None) -> bool:
  """Whether theta scales the outputs of a kernel, and not its inputs."""
  place, _ = arrays.places[f'{path}/{array}']
  if tuned is not None:
    rule, site = _rule_of(tuned, name, path)
    scaled_ones = on_matrix(rule, site, array, jnp.array([2.0, 3.0]), jnp.ones((2, 2)))
    return bool(scaled_ones[0, 1] == 3)
  size, (fan_in, fan_out) = np.shape(values)[-1], place.shape[-2:]
  if fan_in == fan_out:
    raise ValueError(
      f'theta has {size} numbers for {path!r}, whose inputs and outputs are as many: give tuned=, '
      'whose rules tell which of them are scaled'
    )
  return size == fan_out


def _add_scales(content: _Content, keys, outputs: bool, layers: Sequence[np.ndarray]) -> None:
  """Adds the scales of one array."""
  for key, l in zip(keys, layers, strict=True):
    module = module_of(key)
    if module in content.scaled:
      raise ValueError(f'theta scales {module!r} twice: an adapter folder has one scale for it')
    content.scaled[module] = outputs
    content.tensors[f'{module}.{SCALES}'] = l[:, None] if outputs else l[None]


def _plain(number: float) -> float:
  """A number that a float32 computation gave, as it was most likely written."""
  short = float(f'{number:.5g}')
  if abs(short - number) <= 2e-6 * abs(number):
    return short
  return number


def _add_trained(content: _Content, arrays: Arrays, trained: Mapping) -> None:
  """Adds what was trained whole: modules, and biases of other modules."""
  owned: dict[str, set[str]] = {}  # {module: paths of its arrays}
  for path, (_, keys) in arrays.places.items():
    for key in keys:
      owned.setdefault(module_of(key), set()).add(path)
  adapted = {
    *content.adapted,
    *content.scaled,
    *content.kin,
    *content.told.get('target_modules', ()),
  }
  for path, (keys, layers) in trained.items():
    place, _ = arrays.places[path]
    rows = _rows_of(content, arrays, path, layers)
    if rows is not None:
      module = module_of(keys[0])
      content.tokens[module] = rows
      middle = '' if content.kind == TOKENS else '.token_adapter'
      content.tensors[f'{module}{middle}.{TOKENS_DELTA}'] = place.leaf.theirs(layers[0])[rows]
      continue
    if path == arrays.tied and content.kind != LORA:
      raise ValueError(
        f'{path!r} is the head of the model as well, which peft keeps so beside LoRA alone: load '
        'the backbone through jpeft.models.untied'
      )
    for key, layer in zip(keys, layers, strict=True):
      module = module_of(key)
      if owned[module] <= trained.keys() and module not in adapted:
        content.whole.add(module)
        if content.kind == LN_TUNING and any(_is_norm(arrays.places[p][0]) for p in owned[module]):
          content.norms.add(module)
          key = f'{module}.{NORMS}{place.leaf.suffix}'
      elif path.endswith('/bias') and content.kind == LORA:
        content.biases = True
        if module in adapted:
          key = f'{module}.base_layer.bias'
      elif module in adapted:
        raise ValueError(
          f'theta trains {path!r} and adapts it: an adapter folder holds one of the two'
        )
      else:
        raise ValueError(
          f'theta trains only a part of {path.rpartition("/")[0]!r}, with {path!r}: an adapter '
          'folder holds modules trained whole, and biases beside LoRA'
        )
      content.tensors[key] = place.leaf.theirs(layer)
    if path == arrays.tied:
      content.tied = True
      content.tensors[f'{HEAD}.weight'] = content.tensors[keys[0]]


def _rows_of(
  content: _Content, arrays: Arrays, path: str, layers: Sequence[np.ndarray]
) -> list[int] | None:
  """The rows of a table that differ from the backbone's, where the folder has them alone.

  So it is where peft has no other way, and where they are fewer than half.

  Raises:
    ValueError: peft has no way at all.
  """
  needed = content.kind == TOKENS or path == arrays.unread_table
  if not path.endswith('/embedding') or content.kind not in (LORA, TOKENS):
    if path == arrays.unread_table:
      raise ValueError(
        f'theta trains {path!r}, which in transformers is a module that no layer of T5 reads: '
        'peft trains rows of it alone, or beside LoRA'
      )
    return None
  base = arrays.layers(path)
  if base is None:
    if not needed:
      return None
    raise ValueError(
      f'theta trains {path!r}, of which peft holds the rows that differ from those of the '
      'backbone: give the backbone itself, not its shapes'
    )
  differ = np.flatnonzero((np.asarray(layers[0]) != np.asarray(base[0])).any(1)).tolist()
  if needed and not differ:
    return [0]
  return differ if needed or 0 < len(differ) < len(base[0]) / 2 else None


def _adapter_config(
  content: _Content, arrays: Arrays, rslora: bool, base: str | None
) -> dict[str, Any]:
  """The values of adapter_config.json."""
  task = _task_type(content, arrays)
  targets = sorted(content.norms or content.scaled or content.kin or content.adapted)
  config: dict[str, Any] = {
    'peft_type': content.kind,
    'task_type': task,
    'base_model_name_or_path': base,
    'inference_mode': True,
    'target_modules': targets,
    'modules_to_save': sorted(content.whole - content.norms) or None,
  }
  if content.kind == IA3:
    inputs = sorted(module for module, outputs in content.scaled.items() if not outputs)
    config |= {'feedforward_modules': inputs, 'fan_in_fan_out': False, 'init_ia3_weights': True}
  if content.kind == LORA:
    config |= _lora_config(content, arrays, rslora)
  if content.kind in PROMPTS:
    del config['target_modules']
  if content.kind == TOKENS:
    if len(content.tokens) > 1:
      raise ValueError(
        f'theta trains rows of {", ".join(content.tokens)}: an adapter folder of rows alone holds '
        'those of one table'
      )
    ((module, rows),) = content.tokens.items()
    config |= {'target_modules': [module], 'token_indices': rows}
  elif content.tokens:
    config['trainable_token_indices'] = content.tokens
  return config | content.told


def _lora_config(content: _Content, arrays: Arrays, rslora: bool) -> dict[str, Any]:
  """The values that LoRA alone has: the most frequent rank and alpha, and what differs."""
  adapted = dict(content.adapted)
  common, _ = Counter(adapted.values()).most_common(1)[0]
  rank, alpha = common
  if content.tied and arrays.tied is not None:
    table = module_of(arrays.places[arrays.tied][1][0])
    if table in adapted:
      adapted[HEAD] = adapted[table]
  odd = {module: pair for module, pair in adapted.items() if pair != common}
  return {
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': 0.0,
    'bias': 'all' if content.biases else 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'use_rslora': rslora,
    'use_dora': any(key.endswith(PARTS['m']) for key in content.tensors),
    'rank_pattern': {module: pair[0] for module, pair in odd.items() if pair[0] != rank},
    'alpha_pattern': {module: pair[1] for module, pair in odd.items() if pair[1] != alpha},
    'ensure_weight_tying': content.tied,
  }


def _task_type(content: _Content, arrays: Arrays) -> str | None:
  """peft's name of what the model does; None leaves it open.

  Of a classifier peft saves and wants the whole head, as one module. If all or a part of it was
  trained, `content` gets the rest of it as it is.
  """
  architecture = arrays.table.architectures[1]
  if architecture.endswith('ForCausalLM'):
    return 'CAUSAL_LM'
  if content.kind in PROMPTS and architecture.endswith('ForConditionalGeneration'):
    return 'SEQ_2_SEQ_LM'
  if not architecture.endswith('ForSequenceClassification'):
    return None
  head = {path: (place, keys) for path, (place, keys) in arrays.places.items() if place.head}
  modules = {module_of(key) for _, keys in head.values() for key in keys}
  adapted = {
    *content.adapted,
    *content.scaled,
    *content.kin,
    *content.told.get('target_modules', ()),
  }
  if modules & adapted:
    return None
  if not modules & content.whole and content.kind not in PROMPTS:
    return None
  rest = {}
  for path, (place, keys) in head.items():
    layers = arrays.layers(path)
    if keys[0] in content.tensors:
      continue
    if layers is None:
      return None
    rest[keys[0]] = place.leaf.theirs(layers[0])
  content.tensors |= rest
  content.whole = (content.whole - modules) | {module.partition('.')[0] for module in modules}
  return 'SEQ_CLS'


def _check_written(written: Folder, arrays: Arrays, theta: Mapping, tuned: Tuned) -> None:
  """Raises a ValueError unless a folder that is to be written says what the rules compute."""
  *_, rest = taken_apart(theta)
  drawn = set()  # (rule, shape) of the random pairs that were compared, on a whole matrix
  for name, path, array, values in _entries(rest):
    rule, site = _rule_of(tuned, name, path)
    where = f'{path}/{array}'
    place, _ = arrays.places[where]
    stored = _matrix(written, where)
    chosen = tuned.site_of(name, path).chosen
    for i, t in enumerate(_each_layer(values, arrays, where)):
      if stored is None:
        _check_trained(rule, site, array, t)
        continue
      # An unrolled block is a place of its own, whose only layer is 0.
      said = stored[chosen[i] if chosen is not None and place.stacked else i]
      if _draws(rule, said):
        if (name, place.shape) in drawn:
          continue
        drawn.add((name, place.shape))
        said = dataclasses.replace(said, whole=True)
      check_same(written.where, said, rule, site, array, t)


def _draws(rule: Weight, said: Any) -> bool:
  """Whether a rule of VeRA draws a pair for each shape, so that no smaller matrix tells it."""
  given = rule.origin and rule.origin.hyperparameters.get('projections')
  return isinstance(said, Vectors) and given is None


def _matrix(folder: Folder, where: str) -> Any:
  """What a folder says of each layer of a matrix; None if it is trained whole."""
  for found in (folder.factors, folder.scales, folder.vectors, folder.kin):
    if where in found:
      return found[where]
  return None


def _check_outputs(
  written: Folder, config: Mapping, arrays: Arrays, theta: Mapping, tuned: Tuned, trained: Mapping
) -> None:
  """Raises a ValueError unless the model computes with the folder what it does with the method.

  It is run where rules were not compared matrix by matrix: those that wrap calls, and those without
  theta. `theta` is what rules read, `trained` what `tuned.apply` takes.
  """
  others = {
    (rule.name, site.path or 'the model')
    for rule, site in tuned.rules
    if not isinstance(rule, Weight) or site.path not in theta.get(rule.name, {})
  }
  if not others:
    return
  acting = ', '.join(f'{name!r} at {path!r}' for name, path in sorted(others)[:3])
  method, own = _as_rules(written, config, arrays, None)
  check_outputs(acting, arrays.pretrained, tuned, trained, method, own)


def _check_trained(rule: Weight, site: Site, array: str, t: np.ndarray) -> None:
  """Raises a ValueError unless a rule puts theta in the place of an array."""
  others = {name: jnp.full(leaf.shape, 0.37, leaf.dtype) for name, leaf in site.leaves.items()}
  new = rule.apply({array: jnp.asarray(t)}, site, others)
  if array not in new or not np.array_equal(new[array], t):
    raise ValueError(
      f'{rule.name!r} at {site.path!r} does more than train {array!r}: an adapter folder holds '
      'arrays that were trained whole'
    )


def _each_layer(values: Any, arrays: Arrays, where: str) -> list[Any]:
  """theta of single layers of an array."""
  place, _ = arrays.places[where]
  if not isinstance(values, Mapping):
    return layers_of(values, place)
  split = {part: layers_of(x, place) for part, x in values.items()}
  count = len(next(iter(split.values())))
  return [{part: layers[i] for part, layers in split.items()} for i in range(count)]


# ---- Reading.


def load_adapter(
  folder: str | pathlib.Path, pretrained: Pretrained, name: str | None = None
) -> tuple[Method, dict]:
  """(method, theta) of an adapter folder: LoRA, DoRA, (IA)^3, VeRA, prompts, a prefix, modules.

  Further kinds, such as LoHa, OFT and AdaLoRA, are read of linear layers alone.

  Layers of a scanned stack share a rule: where the folder has other ranks or alphas in some of
  them, factors are padded by zeros and b is scaled.

  Args:
    folder: as peft, `save_adapter` or the `adapters` library writes it; of the latter bottleneck
      adapters and the head.
    pretrained: the backbone to put it on. Of PiSSA, OLoRA, lora_bias and trained rows of a
      table its weights are read.
    name: of the adapter in theta; another for each of several that are chained. Left out it is
      'lora', 'ia3', 'vera', 'loha' and so on, 'prefix' or 'prompt_tuning', and modules saved whole
      are 'modules'.

  Returns:
    The method to `attach` to `pretrained.model`, and its theta in float32.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the adapter is of another kind, damaged, or not of this backbone.
  """
  folder = pathlib.Path(folder)
  if is_of_adapters(folder):
    return load_bottlenecks(folder, pretrained, name)
  config = read_config(folder)
  arrays = Arrays(pretrained)
  found = read_folder(folder / FILE, config, read_tensors(folder / FILE), arrays)
  return _as_rules(found, config, arrays, name)


def _as_rules(
  found: Folder, config: Mapping, arrays: Arrays, name: str | None
) -> tuple[Method, dict]:
  """(method, theta) of what a folder holds."""
  rules: dict[Any, dict] = {}  # {(rank, alpha), 'modules' or 'bias': {site path: arrays}}
  for where, layers in found.factors.items():
    pair, values = _assembled(found, arrays, where, layers, bool(config.get('use_rslora')))
    site, _, array = where.rpartition('/')
    rules.setdefault(pair, {}).setdefault(site, {})[array] = values
  pairs = list(rules)
  for where, scales in found.scales.items():
    ordered = _complete(found, arrays, where, scales)
    side = OUTPUTS if ordered[0].outputs else INPUTS
    site, _, array = where.rpartition('/')
    numbers = jnp.asarray(joined([one.l for one in ordered], arrays.places[where][0]))
    rules.setdefault(side, {}).setdefault(site, {})[array] = numbers
  for where, vectors in found.vectors.items():
    ordered = _complete(found, arrays, where, vectors)
    site, _, array = where.rpartition('/')
    place, _ = arrays.places[where]
    entries = {part: jnp.asarray(joined([v.parts[part] for v in ordered], place)) for part in 'de'}
    rules.setdefault(SHARED, {}).setdefault(site, {})[array] = entries
  for where, adapted in found.kin.items():
    making, values = _of_kin(found, arrays, where, adapted)
    site, _, array = where.rpartition('/')
    rules.setdefault(making, {}).setdefault(site, {})[array] = values
  for where, whole in _whole(found, arrays).items():
    site, _, array = where.rpartition('/')
    kind = 'modules'
    if not all(f'{site}/{other}' in found.whole for other in arrays.owned(where)):
      kind = array
    rules.setdefault(kind, {}).setdefault(site, {})[array] = whole
  if found.rows is not None:
    kind = PREFIX_TUNING if config['peft_type'] == PREFIX_TUNING else PROMPT_TUNING
    read = read_rows(found.where, kind, found.rows, config, arrays)
    rules[kind] = jax.tree.map(jnp.asarray, read)
  makings = [kind for kind in rules if isinstance(kind, Making)]
  titles = {kind: _title(kind, name, pairs, makings) for kind in rules}
  method = _method(rules, titles, config, found.pair)
  theta: dict[str, dict] = {}
  for kind, sites in rules.items():
    theta.setdefault(titles[kind], {}).update(sites)
  _check_read(found, arrays, method, theta)
  return method, theta


def _assembled(
  found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Factors], rslora: bool
) -> tuple[tuple[int, float], dict[str, jax.Array]]:
  """((rank, alpha) of a rule, its theta) of the factors of all layers of an array."""
  ordered = _complete(found, arrays, where, layers)
  rank = max(factors.rank for factors in ordered)
  alpha = next(factors.alpha for factors in ordered if factors.rank == rank)
  if not alpha > 0:
    alpha = rank**0.5 if rslora else rank  # a scale of 1: what peft scales by goes into b
  scale = scaled(rank, alpha, rslora)
  padded = [_padded(factors, rank, scale) for factors in ordered]
  place, _ = arrays.places[where]
  return (rank, alpha), {
    part: jnp.asarray(joined([parts[part] for parts in padded], place), jnp.float32)
    for part in padded[0]
  }


def _of_kin(
  found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Adapted]
) -> tuple[Making, dict[str, jax.Array]]:
  """(the kind and hyperparameters of a rule, its theta) of all layers of an array.

  Raises:
    ValueError: layers of a stack differ in their hyperparameters.
  """
  ordered = _complete(found, arrays, where, layers)
  making = ordered[0].making
  for other in ordered:
    if other.making != making:
      raise ValueError(
        f'{found.where} has {dict(other.making.told)} at {other.module!r} and {dict(making.told)} '
        f'at {ordered[0].module!r}, which share a rule: load the backbone with scan=False'
      )
  each = [adapted.theta(found.where) for adapted in ordered]
  place, _ = arrays.places[where]
  return making, {part: jnp.asarray(joined([t[part] for t in each], place)) for part in each[0]}


def _padded(factors: Factors, rank: int, scale: float) -> dict[str, np.ndarray]:
  """The parts of a matrix, with a rank and a scale that may differ from its own."""
  more = rank - factors.rank
  found = {}
  for part, x in factors.parts.items():
    if part in ('a', 'a0'):
      x = np.pad(x, ((0, 0), (0, more)))
    elif part in ('b', 'b0'):
      x = np.pad(x, ((0, more), (0, 0)))
      if factors.scale != scale:
        x = x * (factors.scale / scale)
    found[part] = x
  return found


def _complete(found: Folder, arrays: Arrays, where: str, layers: Mapping[int, Any]) -> list:
  """What there is of each layer of an array, in their order."""
  _, keys = arrays.places[where]
  for i, key in enumerate(keys):
    if i not in layers:
      raise ValueError(
        f'{found.where} adapts some layers of {where!r} and not {key!r}: load the backbone with '
        'scan=False'
      )
  return [layers[i] for i in range(len(keys))]


def _whole(found: Folder, arrays: Arrays) -> dict[str, jax.Array]:
  """{path: array} of what was trained whole."""
  stacked = {}
  for where, layers in found.whole.items():
    ordered = _complete(found, arrays, where, layers)
    stacked[where] = jnp.asarray(joined(ordered, arrays.places[where][0]), jnp.float32)
  return stacked


def _method(rules: Mapping, titles: Mapping, config: Mapping, pair: Mapping) -> Method:
  """The method whose theta this is."""
  start = start_of(config)
  options: dict[str, Any] = {'rslora': bool(config.get('use_rslora'))}
  make = dora if config.get('use_dora') else lora
  if start is not None:
    options['init'] = start
  methods = []
  for kind, sites in rules.items():
    targets = '|'.join(map(re.escape, sites))
    if kind == OUTPUTS:
      methods.append(ia3(targets, None, name=titles[kind]))
    elif kind == SHARED:
      projections = jnp.asarray(pair['a']), jnp.asarray(pair['b'])
      methods.append(vera(config['r'], targets, projections=projections, name=titles[kind]))
    elif isinstance(kind, Making):
      methods.append(kind.method(targets, titles[kind]))
    elif kind == PREFIX_TUNING:
      methods.append(prefix(config['num_virtual_tokens'], targets=targets, name=titles[kind]))
    elif kind == PROMPT_TUNING:
      methods.append(prompt_tuning(config['num_virtual_tokens'], name=titles[kind]))
    elif kind == INPUTS:
      methods.append(ia3(None, targets, name=titles[kind]))
    elif kind == 'modules':
      methods.append(tune(targets, name=titles[kind]))
    elif isinstance(kind, str):
      methods.append(tune(targets, re.escape(kind), name=titles[kind]))
    else:
      rank, alpha = kind
      methods.append(make(rank, alpha, targets, name=titles[kind], **options))
  return chain(*methods)


def _title(kind: Any, name: str | None, pairs: Sequence, makings: Sequence[Making]) -> str:
  """The name of a rule: the first of several ranks has that of the adapter, others add theirs."""
  if kind in (OUTPUTS, INPUTS):
    return name or 'ia3'
  if isinstance(kind, Making):
    number = makings.index(kind)
    own = name or kind.kin.factory
    return own if number == 0 else f'{own}_{number + 1}'
  named = {SHARED: 'vera', PREFIX_TUNING: 'prefix', PROMPT_TUNING: 'prompt_tuning'}
  if kind in named:
    return name or named[kind]
  if isinstance(kind, str):
    return kind if name is None else f'{name}_{kind}'
  name = name or 'lora'
  return name if kind == pairs[0] else '{}_r{}_alpha{:g}'.format(name, *kind)


def _check_read(found: Folder, arrays: Arrays, method: Method, theta: Mapping) -> None:
  """Raises a ValueError unless the rules that were made compute what the folder says."""
  for name, path, array, values in _entries(theta):
    where = f'{path}/{array}'
    stored = _matrix(found, where)
    if stored is None:
      continue
    site = lone_site(path, array, (1, 1))
    rule = _acting(method, name, path)
    for layer, t in enumerate(_each_layer(values, arrays, where)):
      check_same(found.where, stored[layer], rule, site, array, t)


def _acting(method: Method, name: str, path: str) -> Weight:
  """The rule of a name that a method puts at a site."""
  for targets, rule in method:
    if isinstance(rule, Weight) and rule.name == name and re.fullmatch(targets, path):
      return rule
  raise ValueError(f'no rule {name!r} acts at {path!r}')


# ---- Both.


def _entries(theta: Mapping) -> Iterator[tuple[str, str, str, Any]]:
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


def _check_layers(values, stacked: bool, keys: Sequence[str], path: str) -> None:
  """Raises a ValueError if theta has other layers than those that are written."""
  if not stacked:
    return
  count = len(jax.tree.leaves(values)[0])
  if count != len(keys):
    raise ValueError(
      f'theta has {count} layers for {path!r}, and the model {len(keys)}: of a method in some '
      'layers (layers=) give tuned='
    )
