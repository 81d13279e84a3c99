"""The values of adapter_config.json for what a folder gets."""

from collections import Counter
from typing import Any

from .peft_config import IA3, LORA, PROMPTS, TOKENS
from .peft_content import Content
from .peft_matrices import PARTS
from .peft_names import Arrays, module_of
from .peft_tied import HEAD


def adapter_config(
  content: Content, arrays: Arrays, rslora: bool, base: str | None
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


def _lora_config(content: Content, arrays: Arrays, rslora: bool) -> dict[str, Any]:
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


def _task_type(content: Content, arrays: Arrays) -> str | None:
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
