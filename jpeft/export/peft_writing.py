"""theta as the content of an adapter folder."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jpeft.core import Tuned, Weight
from jpeft.models import Place

from .peft_config import IA3, LN_TUNING, LORA, TOKENS, VERA
from .peft_content import Content
from .peft_factors import add_factors, check_scales, scale_of
from .peft_ia3 import add_scales, is_scales, of_outputs
from .peft_kin import KIN, Making, config_of, making_of
from .peft_names import Arrays, layers_of, module_of
from .peft_prompts import ROWS, taken_apart, write_rows
from .peft_theta import check_layers, chosen_keys, entries, rule_of
from .peft_trained import add_trained, check_shape, is_norm
from .peft_vera import Pairs, drawing_rule, is_vera


def content_of(
  file: pathlib.Path,
  arrays: Arrays,
  theta: Mapping,
  alpha: float | None,
  rslora: bool,
  tuned: Tuned | None,
) -> Content:
  """What theta is in a folder."""
  theta, common = _without_common(theta, tuned)
  prompts, title, sites, theta = taken_apart(theta)
  _check_places(arrays, theta)
  content = Content(kind_of(theta, arrays, prompts, tuned))
  if prompts is not None:
    if tuned is None:
      raise ValueError(f'save_adapter: give tuned=, which says what {title!r} does with its rows')
    rows, content.told = write_rows(file, prompts, title, sites, arrays)
    content.shared[ROWS] = rows
  check_scales(theta, alpha, tuned)
  pairs = Pairs(arrays)
  sharing: dict[str, list] = {}  # {name of a rule: (making, path, shape) of its kernels}
  trained: dict[str, tuple[Sequence[str], list[np.ndarray]]] = {}  # {path: (keys, layers)}
  for name, path, array, values in entries(theta):
    where = f'{path}/{array}'
    adapts = isinstance(values, Mapping)
    if where == arrays.unread_table and adapts:
      raise ValueError(
        f'theta has {name!r} at {path!r}: in transformers no layer of T5 reads the module of this '
        'table, so that peft cannot adapt it'
      )
    place, every = arrays.places[where]
    keys = chosen_keys(every, name, path, tuned)
    check_layers(values, place.stacked, keys, path)
    if is_scales(values, place):
      outputs = of_outputs(name, path, array, values, arrays, tuned)
      add_scales(content, keys, outputs, layers_of(values, place))
      continue
    if not adapts:
      trained[where] = keys, layers_of(values, place)
      continue
    making = making_at(tuned, name, path)
    if making is not None:
      modules = [module_of(key) for key in keys]
      _add_kin(content, making, place, modules, values)
      sharing.setdefault(name, []).append((making, path, place.shape))
      continue
    if is_vera(values):
      rule = drawing_rule(tuned, name, path)
      pairs.add(rule, place, [module_of(key) for key in keys], values)
      continue
    scale = scale_of(name, path, array, values, alpha, rslora, tuned)
    add_factors(content, arrays, where, values, keys, scale, rslora)
  if content.kind == VERA:
    pairs.write(content)
  if content.kin:
    content.told = config_of(content.kin)
    _add_shared(content, sharing, common, tuned)
  add_trained(content, arrays, trained)
  return content


def as_stored_in(trained: Mapping, theta: Mapping, tuned: Tuned) -> dict:
  """theta with the smaller trees of kinds that are stored so, and all others as rules read them.

  Args:
    trained: what `tuned.apply` takes.
    theta: what rules read.
    tuned: the method.
  """
  kept = dict(theta)
  for rule, _ in tuned.rules:
    making = making_of(rule) if isinstance(rule, Weight) else None
    if making is not None and making.kin.shared is not None and rule.name in trained:
      kept[rule.name] = trained[rule.name]
  return kept


def _without_common(theta: Mapping, tuned: Tuned | None) -> tuple[dict, dict[str, Mapping]]:
  """(theta, {name: what its kernels share}) of smaller trees, which have the latter at ''."""
  rest, common = dict(theta), {}
  for name in tuned.generators if tuned is not None else ():
    if '' in rest.get(name, {}):
      rest[name] = dict(rest[name])
      common[name] = rest[name].pop('')
  return rest, common


def _add_shared(
  content: Content, sharing: Mapping[str, list], common: Mapping[str, Mapping], tuned: Tuned | None
) -> None:
  """Adds what the kernels of a kind share.

  Raises:
    ValueError: rules share different arrays.
  """
  shapes = [shape for kernels in sharing.values() for _, _, shape in kernels]
  for name, kernels in sharing.items():
    making, path, _ = kernels[0]
    shared = making.kin.shared
    if shared is None or tuned is None:
      continue
    rule, _ = rule_of(tuned, name, path)
    hyper = rule.origin.hyperparameters if rule.origin else {}
    for part, x in shared.written(hyper, common.get(name, {}), shapes).items():
      x = np.asarray(x, np.float32)
      known = content.shared.setdefault(shared.tensors[part], x)
      if not np.array_equal(known, x):
        raise ValueError(
          f'theta has several {making.kin.factory} of different {part!r}, of which {name!r} is '
          'one: an adapter folder has one for all kernels'
        )


def _check_places(arrays: Arrays, theta: Mapping) -> None:
  """Raises a ValueError if theta is of other things than arrays of the backbone."""
  for name, path, array, _ in entries(theta):
    if f'{path}/{array}' in arrays.experts:
      raise ValueError(
        f'theta has {name!r} at the experts {path!r}, which peft adapts in a layout that is not '
        'written: merge theta, or keep our own file of it'
      )
    if f'{path}/{array}' not in arrays.places:
      raise ValueError(
        f'theta has {name!r} at {path or "the model"!r}, and no array {array!r} of the pretrained '
        'files is there: an adapter folder holds whole modules; of a generated method, give tuned='
      )
    arrays.check_own_tensor(f'{path}/{array}', f'theta has {name!r} at {path!r}')


def kind_of(theta: Mapping, arrays: Arrays, prompts: str | None, tuned: Tuned | None) -> str:
  """peft_type of the folder that holds theta, beside prompts or a prefix if there are some.

  Raises:
    ValueError: there is none, or several are needed.
  """
  kinds = set() if prompts is None else {prompts}
  norms = tables = False
  for name, path, array, values in entries(theta):
    place, _ = arrays.places[f'{path}/{array}']
    making = making_at(tuned, name, path)
    if making is not None:
      kinds.add(making.kind)
    elif is_scales(values, place):
      kinds.add('(IA)^3')
    elif not isinstance(values, Mapping):
      norms = norms or is_norm(place)
      tables = tables or array == 'embedding'
      check_shape(values, place)
    elif {'a', 'b'} <= values.keys() <= {'a', 'b', 'm', 'a0', 'b0'}:
      kinds.add('DoRA' if 'm' in values else 'LoRA')
    elif is_vera(values):
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


def making_at(tuned: Tuned | None, name: str, path: str) -> Making | None:
  """The kind and hyperparameters of the rule of a name at a site, if peft has tensors for it."""
  if tuned is None:
    return None
  for rule, site in tuned.rules:
    if (rule.name, site.path) == (name, path) and isinstance(rule, Weight):
      return making_of(rule)
  return None


def _add_kin(
  content: Content, making: Making, place: Place, modules: Sequence[str], values: Mapping
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
