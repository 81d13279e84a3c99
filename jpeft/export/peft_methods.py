"""The method of what an adapter folder holds, and the names of its rules."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jpeft.core import Method, chain
from jpeft.methods import dora, ia3, lora, prefix, prompt_tuning, tune, vera

from .peft_config import PREFIX_TUNING, PROMPT_TUNING, start_of
from .peft_found import Folder
from .peft_kin import Making

# Names of the two forms of (IA)^3, and of VeRA, among the rules that are read.
OUTPUTS, INPUTS, SHARED = 'outputs', 'inputs', 'shared'


def method_of(rules: Mapping, titles: Mapping, config: Mapping, found: Folder) -> Method:
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
      projections = jnp.asarray(found.pair['a']), jnp.asarray(found.pair['b'])
      methods.append(vera(config['r'], targets, projections=projections, name=titles[kind]))
    elif isinstance(kind, Making):
      shared = kind.kin.shared
      given = {} if shared is None else shared.given(found.shared)
      methods.append(kind.method(targets, titles[kind], **given))
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


def title_of(kind: Any, name: str | None, pairs: Sequence, makings: Sequence[Making]) -> str:
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
