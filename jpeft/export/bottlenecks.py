"""Bottleneck adapters in the folders of the `adapters` library (AdapterHub).

Such a folder has adapter_config.json, adapter.safetensors, and model_head.safetensors with the head
that the adapter was trained with. With h what a sub-layer gives and u what enters it, the library
computes, s being its scaling,

  original_ln_before=False   h + s A(h), then the residual u        jpeft.houlsby
  original_ln_before=True    h + s A(LN(h + u)), then u and LN      jpeft.pfeiffer
  is_parallel=True           h + s A(u), then u                     jpeft.parallel, adaptformer

where in blocks that start with norms the LN in and behind the adapter is left out. There u is the
stream before the norm, which adaptformer reads; where norms come last it is what the MLP reads, as
in parallel. s of the first two goes into the up projection.

pytorch_adapter.bin is a pickle, which may run any program, and is never opened.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Call, Method, Rule, Tuned, chain
from jpeft.messages import did_you_mean
from jpeft.methods import adaptformer, houlsby, parallel, pfeiffer, tune
from jpeft.models import Bert, Pretrained, read_json, read_tensors, write_tensors
from jpeft.writing import filled, write

from .compare import check_outputs
from .peft_config import CONFIG
from .peft_names import OLD, Arrays, joined, layers_of

FILE, PICKLE = 'adapter.safetensors', 'pytorch_adapter.bin'
HEAD_FILE, HEAD_PICKLE = 'model_head.safetensors', 'pytorch_model_head.bin'
HEAD_CONFIG = 'head_config.json'
_VERSION = 'adapters.1.3.0'  # of the layout; without one 'gelu' would be read as an approximation

# {family: {our module in a block: (end of its key, what the module of the adapter has there)}}.
_BERT = {'attention/out': ('.dense', ''), 'mlp/fc2': ('.dense', '')}
_MODULES = {
  'bert': _BERT,
  'roberta': _BERT,
  'vit': {
    'attention/out': ('.attention.output.dense', '.attention_adapters'),
    'mlp/fc2': ('.output.dense', '.output.output_adapters'),
  },
  't5': {
    'attention/out': ('.SelfAttention.o', ''),
    'cross_attention/out': ('.EncDecAttention.o', ''),
    'mlp/fc2': ('.DenseReluDense.wo', ''),
  },
  'llama': {
    'attention/out': ('.self_attn.o_proj', '.attention_adapters'),
    'mlp/fc2': ('.mlp.down_proj', '.output_adapters'),
  },
}
# The switch of the config for each of them.
_SWITCHES = {
  'attention/out': 'mh_adapter',
  'cross_attention/out': 'cross_adapter',
  'mlp/fc2': 'output_adapter',
}
_PARTS = {
  'adapter_down.0.weight': ('down', 'kernel'),
  'adapter_down.0.bias': ('down', 'bias'),
  'adapter_up.weight': ('up', 'kernel'),
  'adapter_up.bias': ('up', 'bias'),
  'scaling': ('scale',),
}
_KEY = re.compile(r'(.+)\.adapters\.([^.]+)\.(.+)')
_NUMBER = re.compile(r'\.(\d+)\.')

# Nonlinearities of the library, by ours; the first is written.
_ACTIVATIONS = {
  'relu': ('relu',),
  'gelu_exact': ('gelu',),
  'gelu': ('gelu_new', 'gelu_pytorch_tanh'),
  'silu': ('swish', 'silu'),
  'tanh': ('tanh',),
}
_READ = (
  'mh_adapter',
  'output_adapter',
  'cross_adapter',
  'reduction_factor',
  'non_linearity',
  'original_ln_before',
  'original_ln_after',
  'residual_before_ln',
  'is_parallel',
  'scaling',
  'leave_out',
)
# How it was trained, and what belongs to switches that are off.
_WITHOUT_EFFECT = (
  'init_weights',
  'init_weights_seed',
  'dropout',
  'stochastic_depth',
  'inv_adapter_reduction_factor',
  'adapter_residual_before_ln',
  'phm_dim',
  'factorized_phm_W',
  'shared_W_phm',
  'shared_phm_rule',
  'factorized_phm_rule',
  'phm_c_init',
  'phm_init_range',
  'learn_phm',
  'hypercomplex_nonlinearity',
  'phm_rank',
  'phm_bias',
)
_UNUSED = {
  'ln_before': 'it adds a norm before the bottleneck',
  'ln_after': 'it adds a norm behind the bottleneck',
  'use_gating': 'it gates the adapter',
  'inv_adapter': 'it adds invertible adapters behind the embedding',
  'phm_layer': 'its projections are sums of Kronecker products',
}
KNOWN = (*_READ, *_WITHOUT_EFFECT, *_UNUSED)
_FORMS = ('houlsby', 'pfeiffer', 'parallel', 'adaptformer')


def is_of_adapters(folder: pathlib.Path) -> bool:
  """Whether a folder is of the `adapters` library and not of peft."""
  file = folder / CONFIG
  if not file.exists():
    return False
  config = read_json(file)
  return 'peft_type' not in config and isinstance(config.get('config'), Mapping)


class _Modules:
  """The modules of a backbone that hold adapters.

  Attributes:
    homes: {module of an adapter: (block, our module in it, layer of the block's stack)}.
    numbers: {(block, layer): number of the layer in the library, the decoder behind the encoder}.
  """

  def __init__(self, where: Any, arrays: Arrays):
    family = arrays.pretrained.family
    if family not in _MODULES:
      raise ValueError(
        f'{where}: bottleneck adapters in the layout of the adapters library are served for '
        f'{", ".join(_MODULES)}, and this backbone is of {family!r}'
      )
    self.arrays = arrays
    self.homes: dict[str, tuple[str, str, int]] = {}
    self.numbers: dict[tuple[str, int], int] = {}
    depth = arrays.pretrained.model.depth
    for path, (_, keys) in arrays.places.items():
      for ours, (end, theirs) in _MODULES[family].items():
        if not path.endswith(f'/{ours}/kernel'):
          continue
        block = path.removesuffix(f'/{ours}/kernel')
        for layer, key in enumerate(keys):
          module = key.removesuffix('.weight').removesuffix(end) + theirs
          self.homes[module.removeprefix(arrays.table.base)] = block, ours, layer
          found = _NUMBER.search(key)
          number = int(found[1]) if found else 0
          self.numbers[block, layer] = number + (depth if block.startswith('decoder/b') else 0)

  def home(self, where: Any, module: str) -> tuple[str, str, int]:
    """(block, our module in it, layer) of the module of an adapter.

    Raises:
      ValueError: the backbone has no such module.
    """
    found = self.homes.get(module.removeprefix(self.arrays.table.base))
    if found is None:
      raise ValueError(f'{where}: {module!r} has no place in this backbone')
    return found

  def key(self, block: str, ours: str, layer: int) -> str:
    """The module of an adapter, as the library calls it."""
    (module,) = (m for m, home in self.homes.items() if home == (block, ours, layer))
    return self.arrays.table.base + module


# ---- Reading.


def load_bottlenecks(
  folder: pathlib.Path, pretrained: Pretrained, name: str | None
) -> tuple[Method, dict]:
  """(method, theta) of a folder of the library; see `load_adapter`."""
  told = read_json(folder / CONFIG)
  tensors = _tensors(folder, FILE, PICKLE)
  head = None
  if (folder / HEAD_FILE).exists() or (folder / HEAD_PICKLE).exists():
    head = _tensors(folder, HEAD_FILE, HEAD_PICKLE)
  return _as_rules(folder / FILE, told, tensors, head, Arrays(pretrained, OLD), name)


def _tensors(folder: pathlib.Path, file: str, pickle: str) -> dict[str, np.ndarray]:
  """The tensors of a file.

  Raises:
    ValueError: there is only a pickle.
    FileNotFoundError: there is none.
  """
  if not (folder / file).exists():
    if (folder / pickle).exists():
      raise ValueError(
        f'{folder / pickle} is a pickle, which may run any program and is not opened: save the '
        f'adapter once more as {file}, model.save_adapter(folder, name, use_safetensors=True)'
      )
    raise FileNotFoundError(f'{folder} holds no {file}')
  return {key: np.asarray(x, np.float32) for key, x in read_tensors(folder / file).items()}


def _as_rules(
  where: pathlib.Path,
  told: Mapping,
  tensors: Mapping[str, np.ndarray],
  head: Mapping[str, np.ndarray] | None,
  arrays: Arrays,
  name: str | None,
) -> tuple[Method, dict]:
  """(method, theta) of what a folder holds."""
  inner = _checked(where, told)
  modules = _Modules(where, arrays)
  found = _adapters(where, told, tensors, modules)
  form = _form(where, inner, {ours for _, ours in found}, arrays)
  scale = inner.get('scaling', 1.0)
  rules: dict[int, dict[str, Any]] = {}  # {r: {site path: theta}}
  for (block, ours), layers in found.items():
    place, keys = arrays.places[f'{block}/{ours}/kernel']
    missing = [key for i, key in enumerate(keys) if i not in layers]
    if missing:
      raise ValueError(
        f'{where} has adapters in some layers of {block!r} and not beside {missing[0]!r}: load the '
        'backbone with scan=False'
      )
    ordered = [_scaled(layers[i], form, scale) for i in range(len(keys))]
    widths = {len(one['down']['bias']) for one in ordered}
    if len(widths) > 1:
      raise ValueError(
        f'{where}: layers of {block!r} have bottlenecks of {sorted(widths)}: load the backbone '
        'with scan=False'
      )
    for layer, one in enumerate(ordered):
      _check_width(where, inner, modules.numbers[block, layer], one)
    theta = jax.tree.map(lambda *x, place=place: jnp.asarray(joined(x, place)), *ordered)
    rules.setdefault(widths.pop(), {})[_site(form, block, ours, arrays)] = theta
  methods, theta = [], {}
  for width, sites in rules.items():
    title = name or form
    if theta:
      title = f'{title}_r{width}'
    methods.append(_made(form, width, sites, inner, title))
    theta[title] = sites
  whole = _head(where, head or {}, arrays)
  if whole:
    title = 'modules' if name is None else f'{name}_modules'
    methods.append(tune('|'.join(map(re.escape, whole)), name=title))
    theta[title] = whole
  return chain(*methods), theta


def _checked(where: pathlib.Path, told: Mapping) -> dict[str, Any]:
  """The config of the adapter, with the nonlinearity by our name.

  Raises:
    ValueError: it is not understood; the field is named.
  """
  file = where.parent / CONFIG
  inner = dict(told['config'])
  if 'architecture' in inner and inner['architecture'] is not None:
    raise ValueError(
      f'{file}: architecture={inner["architecture"]!r} is not supported, only bottleneck adapters'
    )
  inner.pop('architecture', None)
  for field, reason in _UNUSED.items():
    if inner.get(field):
      raise ValueError(f'{file}: {field}={inner[field]!r} is not supported: {reason}')
  for field, value in inner.items():
    if field not in KNOWN and value not in (None, False, '', [], {}):
      hint = did_you_mean(field, KNOWN)
      raise ValueError(
        f'{file}: {field}={value!r} is not known here, so what it changes is not either{hint}'
      )
  if not inner.get('original_ln_after', True):
    raise ValueError(f'{file}: original_ln_after=False is not supported: it drops the residual')
  theirs = str(inner['non_linearity']).lower()
  if 'version' not in told:  # of before adapters 1.0
    theirs = {'gelu': 'gelu_new', 'gelu_orig': 'gelu'}.get(theirs, theirs)
  ours = [name for name, names in _ACTIVATIONS.items() if theirs in names]
  if not ours:
    known = [name for names in _ACTIVATIONS.values() for name in names]
    raise ValueError(f'{file}: non_linearity={theirs!r} is none of {", ".join(known)}')
  inner['non_linearity'] = ours[0]
  scale = inner.get('scaling', 1.0)
  if scale != 'learned' and not isinstance(scale, float | int):
    raise ValueError(f"{file}: scaling={scale!r} is neither a number nor 'learned'")
  return inner


def _adapters(
  where: Any, told: Mapping, tensors: Mapping[str, np.ndarray], modules: _Modules
) -> dict[tuple[str, str], dict[int, dict]]:
  """{(block, our module in it): {layer: {'down', 'up' and 'scale' of an adapter}}}."""
  found: dict[tuple[str, str], dict[int, dict]] = {}
  for key, x in tensors.items():
    match = _KEY.fullmatch(key)
    if not match or match[2] != told.get('name') or match[3] not in _PARTS:
      raise ValueError(f'{where}: {key!r} is no part of a bottleneck adapter {told.get("name")!r}')
    block, ours, layer = modules.home(where, match[1])
    one = found.setdefault((block, ours), {}).setdefault(layer, {})
    *outer, last = _PARTS[match[3]]
    for part in outer:
      one = one.setdefault(part, {})
    one[last] = x.T if last == 'kernel' else x
  for (block, ours), layers in found.items():
    for one in layers.values():
      if any(len(one.get(part, ())) < 2 for part in ('down', 'up')):
        raise ValueError(f'{where}: the adapter at {block!r}, {ours!r} lacks a part')
  if not found:
    raise ValueError(f'{where} holds no adapter')
  return found


def _form(where: Any, inner: Mapping, places: set[str], arrays: Arrays) -> str:
  """The method that computes what the config says, one of _FORMS.

  Raises:
    ValueError: there is none.
  """
  file = where.parent / CONFIG
  at_output = places == {'mlp/fc2'}
  if inner.get('is_parallel'):
    if not at_output:
      raise ValueError(
        f'{file}: is_parallel=True with mh_adapter or cross_adapter is not supported: jpeft has '
        'parallel adapters beside the MLP'
      )
    return 'parallel' if isinstance(arrays.pretrained.model, Bert) else 'adaptformer'
  if not inner.get('original_ln_before'):
    if inner.get('residual_before_ln', True) not in (True, False):
      raise ValueError(
        f'{file}: residual_before_ln={inner["residual_before_ln"]!r} is not supported'
      )
    return 'houlsby'
  if not at_output:
    raise ValueError(
      f'{file}: original_ln_before=True with mh_adapter or cross_adapter is not supported: jpeft '
      'has such adapters behind the MLP'
    )
  if inner.get('residual_before_ln', True) is not True:
    raise ValueError(
      f'{file}: residual_before_ln={inner["residual_before_ln"]!r} is not supported: '
      'jpeft.pfeiffer adds to what the MLP gives'
    )
  return 'pfeiffer'


def _scaled(one: Mapping, form: str, scale: float | str) -> dict:
  """Theta of one adapter; a scale that its method has not goes into the up projection."""
  one = {part: dict(x) if isinstance(x, Mapping) else x for part, x in one.items()}
  own = one.pop('scale', None)
  if scale == 'learned' and own is None:
    raise ValueError("scaling='learned', and an adapter lacks its scaling")
  if form in ('parallel', 'adaptformer'):
    if scale == 'learned':
      one['scale'] = np.asarray(own, np.float32).reshape(())
    return one
  factor = np.asarray(own if scale == 'learned' else scale, np.float32).reshape(())
  one['up'] = {part: x * factor for part, x in one['up'].items()}
  return one


def _check_width(where: Any, inner: Mapping, number: int, one: Mapping) -> None:
  """Raises a ValueError if an adapter has another width than its config says."""
  factor = inner['reduction_factor']
  if isinstance(factor, Mapping):
    factor = factor.get(str(number), factor.get('default'))
  width, found = len(one['up']['bias']), len(one['down']['bias'])
  if factor is None or max(int(width // factor), 1) != found:
    raise ValueError(
      f'{where}: an adapter of layer {number} has a bottleneck of {found}, and by {CONFIG} '
      f'reduction_factor={factor!r} of a width of {width}'
    )


def _site(form: str, block: str, ours: str, arrays: Arrays) -> str:
  """Where a method has theta of an adapter."""
  last_norm = f'{block}/norm2' if isinstance(arrays.pretrained.model, Bert) else block
  sites = {
    'houlsby': f'{block}/{ours}',
    'pfeiffer': last_norm,
    'parallel': f'{block}/mlp',
    'adaptformer': block,
  }
  return sites[form]


def _made(form: str, width: int, sites: Mapping, inner: Mapping, name: str) -> Method:
  """The method of one width."""
  targets = '|'.join(map(re.escape, sites))
  activation, scale = inner['non_linearity'], inner.get('scaling', 1.0)
  if form == 'houlsby':
    return houlsby(width, targets, activation, name=name)
  if form == 'pfeiffer':
    ups = next(iter(sites.values()))['up']['bias']
    return pfeiffer(_factor(ups.shape[-1], width), targets, activation, name=name)
  if form == 'parallel':
    return parallel(width, scale, targets, activation, name=name)
  stream = '|'.join(f'{re.escape(block)}/norm2' for block in sites)
  return adaptformer(width, scale, 0.0, targets, stream, activation, name=name)


def _factor(width: int, bottleneck: int) -> float:
  """A reduction factor of which rounding down gives the bottleneck."""
  if width % bottleneck == 0:
    return width // bottleneck
  return width / (bottleneck + 0.5)


def _head(where: Any, head: Mapping[str, np.ndarray], arrays: Arrays) -> dict[str, dict]:
  """{site path: arrays} of a head that differs from the backbone's."""
  found: dict[str, dict] = {}
  differs = False
  for key, x in head.items():
    tied = key.startswith('lm_head.') and arrays.tied is not None
    if arrays.tied is not None and tied:
      path = arrays.tied
    else:
      path, _ = arrays.home(key, where.parent / HEAD_FILE)
    base = arrays.layers(path)
    own = x if tied else arrays.places[path][0].leaf.ours(x)
    same = base is not None and np.array_equal(np.asarray(base[0], np.float32), own)
    if tied:
      if not same:
        raise ValueError(
          f'{where.parent / HEAD_FILE}: {key!r} is the word table of this backbone, and differs '
          'from it: load the adapter on jpeft.models.untied(pretrained)'
        )
      continue
    differs = differs or not same
    site, _, array = path.rpartition('/')
    found.setdefault(site, {})[array] = jnp.asarray(own)
  return found if differs else {}


# ---- Writing.


def save_bottlenecks(
  folder: pathlib.Path,
  pretrained: Pretrained,
  theta: Mapping,
  tuned: Tuned | None,
  base: str | None,
) -> None:
  """Writes adapters as the library does; see `save_adapter`.

  Raises:
    ValueError: theta holds what such folders cannot.
  """
  where = folder / FILE
  if tuned is None:
    raise ValueError("save_adapter(layout='adapters'): give tuned=, whose rules say what they are")
  trained, theta = theta, tuned.expand(theta)
  arrays = Arrays(pretrained, OLD)
  modules = _Modules(where, arrays)
  rules = _rules(theta, tuned)
  whole = {name: sites for name, sites in theta.items() if name not in rules}
  head = _head_tensors(whole, arrays)
  title = next(iter(rules))
  found = _taken(where, theta, rules, tuned, modules)
  tensors = {}
  for (block, ours, layer), one in found.items():
    start = f'{modules.key(block, ours, layer)}.adapters.{title}'
    for theirs, (*outer, last) in _PARTS.items():
      part = one
      for name in outer:
        part = part[name]
      if last in part:
        x = np.asarray(part[last], np.float32)
        tensors[f'{start}.{theirs}'] = x.reshape(1) if last == 'scale' else x.T
  told = _config(title, rules, found, modules, base)
  method, own = _as_rules(where, told, tensors, head or None, arrays, None)
  check_outputs(f'{title!r}', pretrained, tuned, trained, method, own)
  with filled(folder) as part:
    write_tensors(part / FILE, tensors)
    write(part / CONFIG, json.dumps(told, indent=2, sort_keys=True) + '\n')
    if head:
      write_tensors(part / HEAD_FILE, head)
      told = {**told, 'config': None, 'name': None, 'num_labels': pretrained.model.num_classes}
      write(part / HEAD_CONFIG, json.dumps(told, indent=2, sort_keys=True) + '\n')


def _rules(theta: Mapping, tuned: Tuned) -> dict[str, Rule]:
  """{name: rule} of the adapters in theta.

  Raises:
    ValueError: there are none, or they differ in what a config says once.
  """
  found: dict[str, Rule] = {}
  for rule, site in tuned.rules:
    if isinstance(rule, Call) and site.path in theta.get(rule.name, {}):
      if rule.origin is None or rule.origin.factory not in _FORMS:
        raise ValueError(
          f'{rule.name!r} at {site.path!r} is none of {", ".join(_FORMS)}, which folders of the '
          'adapters library hold'
        )
      found[rule.name] = rule
  if not found:
    raise ValueError(f'theta holds none of {", ".join(_FORMS)}: such a folder is of one of them')
  kinds = {_said(rule) for rule in found.values()}
  if len(kinds) > 1:
    raise ValueError(
      f'theta holds {", ".join(map(repr, found))}, which differ in their kind, nonlinearity or '
      'scale: a folder of the adapters library is of one kind'
    )
  return found


def _said(rule: Rule) -> tuple[str, str, Any]:
  """(factory, nonlinearity, scale) of a rule."""
  hyper = rule.origin.hyperparameters  # type: ignore[union-attr]
  return rule.origin.factory, hyper['activation'], hyper.get('scale', 1.0)  # type: ignore[union-attr]


def _taken(
  where: Any, theta: Mapping, rules: Mapping[str, Rule], tuned: Tuned, modules: _Modules
) -> dict[tuple[str, str, int], dict]:
  """{(block, our module in it, layer): theta of its adapter}."""
  arrays = modules.arrays
  places = sorted({(block, ours) for block, ours, _ in modules.homes.values()})
  found: dict[tuple[str, str, int], dict] = {}
  for name, rule in rules.items():
    form, _, _ = _said(rule)
    wanted = 'parallel' if isinstance(arrays.pretrained.model, Bert) else 'adaptformer'
    if form in ('parallel', 'adaptformer') and form != wanted:
      raise ValueError(
        f'{name!r}: in this backbone an adapter of the adapters library beside the MLP reads what '
        f'jpeft.{wanted} reads, and not what {form} does'
      )
    homes = {}
    for block, ours in places:
      if form == 'houlsby' or ours == 'mlp/fc2':
        homes[_site(form, block, ours, arrays)] = block, ours
    for path, t in theta[name].items():
      if path not in homes:
        raise ValueError(
          f'{where}: {name!r} acts at {path!r}, where the adapters library has no adapter of this '
          f'kind: it has them at {", ".join(homes)}'
        )
      block, ours = homes[path]
      place, keys = arrays.places[f'{block}/{ours}/kernel']
      chosen = tuned.site_of(name, path).chosen
      split = jax.tree.map(lambda x, place=place: layers_of(x, place), t)
      count = len(keys) if chosen is None else len(chosen)
      for i in range(count):
        layer = chosen[i] if chosen is not None and place.stacked else i
        if (block, ours, layer) in found:
          raise ValueError(f'{where}: theta has two adapters at {path!r}')
        one = jax.tree.map(lambda x, i=i: x[i], split, is_leaf=lambda x: isinstance(x, list))
        found[block, ours, layer] = one
  return found


def _config(
  title: str,
  rules: Mapping[str, Rule],
  found: Mapping[tuple[str, str, int], Mapping],
  modules: _Modules,
  base: str | None,
) -> dict[str, Any]:
  """adapter_config.json.

  Raises:
    ValueError: layers differ in more than their widths.
  """
  form, activation, scale = _said(next(iter(rules.values())))
  pretrained = modules.arrays.pretrained
  by_layer: dict[int, dict[str, int]] = {}  # {number of a layer: {our module: r}}
  for (block, ours, layer), one in found.items():
    number = modules.numbers[block, layer]
    by_layer.setdefault(number, {})[ours] = len(np.asarray(one['down']['bias']))
  has = {ours for there in by_layer.values() for ours in there}
  of_encoder = {ours for ours in has if ours != 'cross_attention/out'}
  for number, there in by_layer.items():
    if len(set(there.values())) > 1 or not of_encoder <= there.keys():
      raise ValueError(
        f'layer {number} has adapters of {there}, and others at {sorted(has)}: in a folder of the '
        'adapters library each layer has all of them, of one width'
      )
  widths = {number: next(iter(there.values())) for number, there in by_layer.items()}
  size = pretrained.model.width
  factors: Any = {str(number): _factor(size, width) for number, width in widths.items()}
  if len(set(factors.values())) == 1:
    factors = next(iter(factors.values()))
  kinds = {name: names[0] for name, names in _ACTIVATIONS.items()}
  kinds['swish'] = kinds['silu']  # two names of ours for one function
  inner: dict[str, Any] = {switch: ours in has for ours, switch in _SWITCHES.items()}
  inner |= {
    'reduction_factor': factors,
    'non_linearity': kinds[activation],
    'original_ln_before': form == 'pfeiffer',
    'original_ln_after': True,
    'residual_before_ln': True,
    'is_parallel': form in ('parallel', 'adaptformer'),
    'scaling': scale if isinstance(scale, str) else float(scale),
    'leave_out': sorted(set(modules.numbers.values()) - set(widths)),
    'init_weights': 'bert',
    'dropout': 0.0,
  }
  return {
    'config': inner,
    'hidden_size': size,
    'model_class': modules.arrays.table.architectures[1],
    'model_name': base,
    'model_type': pretrained.family,
    'name': title,
    'version': _VERSION,
  }


def _head_tensors(whole: Mapping, arrays: Arrays) -> dict[str, np.ndarray]:
  """The tensors of a head that was trained whole, beside all that transformers has in it.

  Raises:
    ValueError: something else was trained.
  """
  found = {}
  for name, sites in whole.items():
    for site, values in sites.items():
      for array, x in values.items():
        held = arrays.places.get(f'{site}/{array}')
        if held is None or not held[0].head or np.shape(x) != held[0].shape:
          raise ValueError(
            f'theta has {name!r} at {site or "the model"!r}: a folder of the adapters library '
            'holds adapters and a head trained whole'
          )
        place, keys = held
        found[keys[0]] = np.asarray(place.leaf.theirs(np.asarray(x)), np.float32)
  if not found:
    return {}
  for path, (place, keys) in arrays.places.items():
    base = arrays.layers(path) if place.head else None
    if base is not None and keys[0] not in found:
      found[keys[0]] = np.asarray(place.leaf.theirs(base[0]), np.float32)
  return found
