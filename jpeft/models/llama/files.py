"""Llama, Mistral, Mixtral, SmolLM2, Qwen, the Gemmas and Phi-3 as Hugging Face stores them."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import Experts, Rope, activation
from .model import Llama

_BLOCK = 'layers.{i}.'
_LINEAR = {
  'attention/query': 'self_attn.q_proj',
  'attention/key': 'self_attn.k_proj',
  'attention/value': 'self_attn.v_proj',
  'attention/out': 'self_attn.o_proj',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/fc1': 'mlp.up_proj',
  'mlp/fc2': 'mlp.down_proj',
}
_NORMS = {
  'norm1': 'input_layernorm',
  'norm2': 'post_attention_layernorm',
  'attention/query_norm': 'self_attn.q_norm',
  'attention/key_norm': 'self_attn.k_norm',
}
# Gemma 2 and 3 have norms behind each branch too, one of them under the name of another's second
# norm.
_BRANCH_NORMS = {
  'norm2': 'pre_feedforward_layernorm',
  'branch_norm1': 'post_attention_layernorm',
  'branch_norm2': 'post_feedforward_layernorm',
}
_ROWS = (
  ('embed', 'embed', 'embed_tokens'),
  ('final_norm', 'norm', 'norm'),
)
# Phi-3 has several layers in one tensor each, in this order.
_FUSED = {
  'attention/query': 'self_attn.qkv_proj',
  'attention/key': 'self_attn.qkv_proj',
  'attention/value': 'self_attn.qkv_proj',
  'attention/out': 'self_attn.o_proj',
  'mlp/gate': 'mlp.gate_up_proj',
  'mlp/fc1': 'mlp.gate_up_proj',
  'mlp/fc2': 'mlp.down_proj',
}


# Of models with experts: what files call the MLP, its router and the maps of an expert.
_EXPERTS = {
  'mixtral': ('block_sparse_moe', {'gate': 'w1', 'fc1': 'w3', 'fc2': 'w2'}),
  'qwen2_moe': ('mlp', {'gate': 'gate_proj', 'fc1': 'up_proj', 'fc2': 'down_proj'}),
  'qwen3_moe': ('mlp', {'gate': 'gate_proj', 'fc1': 'up_proj', 'fc2': 'down_proj'}),
}


def _expert_rows(kind: str) -> tuple[tuple[str, str, str], ...]:
  """The rows of routers, of experts, and of the MLP beside them that sees every token."""
  if kind not in _EXPERTS:
    return ()
  mlp, maps = _EXPERTS[kind]
  ours, theirs = 'decoder/block/mlp/', f'{_BLOCK}{mlp}.'
  rows = [
    (f'{ours}router', 'dense', f'{theirs}gate'),
    (f'{ours}shared_gate', 'dense', f'{theirs}shared_expert_gate'),
  ]
  for name, key in maps.items():
    rows.append((f'{ours}experts/{name}', 'dense', f'{theirs}experts.{{e}}.{key}'))
    rows.append((f'{ours}shared/{name}', 'dense', f'{theirs}shared_expert.{key}'))
  return tuple(rows)


def _rows(kind: str, branch_norms: bool) -> tuple[tuple[str, str, str], ...]:
  """The rows of the table of a model."""
  norms = _NORMS | _BRANCH_NORMS if branch_norms else _NORMS
  linear = _FUSED if kind == 'phi3' else _LINEAR
  return (
    *_ROWS,
    *((f'decoder/block/{ours}', 'dense', _BLOCK + theirs) for ours, theirs in linear.items()),
    *_expert_rows(kind),
    *((f'decoder/block/{ours}', 'norm', _BLOCK + theirs) for ours, theirs in norms.items()),
  )


_HEAD = 'lm_head.weight'
# Buffers in files of before 2023.
_FREQUENCIES = r'layers\.\d+\.self_attn\.rotary_emb\.inv_freq'
_NAMES = {
  'llama': 'Llama',
  'mistral': 'Mistral',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
  'gemma': 'Gemma',
  'gemma3_text': 'Gemma3Text',
  'gemma2': 'Gemma2',
  'phi3': 'Phi3',
  'mixtral': 'Mixtral',
  'qwen2_moe': 'Qwen2Moe',
  'qwen3_moe': 'Qwen3Moe',
}
# What transformers takes where a config leaves it out, if that is not what most families have.
_DEFAULTS: dict[str, dict] = {
  'mixtral': {'rope_theta': 1e6, 'rms_norm_eps': 1e-5, 'num_key_value_heads': 8},
  'qwen2_moe': {'num_key_value_heads': 16},
  'qwen3_moe': {'num_key_value_heads': 4},
}
_GEMMAS = ('gemma', 'gemma3_text', 'gemma2')
# Those with norms behind each branch, a query_pre_attn_scalar and layers of two types.
_LATER_GEMMAS = ('gemma3_text', 'gemma2')
_SCALINGS = ('default', 'linear', 'llama3', 'yarn')


# Of each head: its key, and what follows the family's name in its class.
_PURPOSES = {
  'text': ('lm_head', 'ForCausalLM'),
  'classification': ('score', 'ForSequenceClassification'),
  'tokens': ('score', 'ForTokenClassification'),
  'questions': ('qa_outputs', 'ForQuestionAnswering'),
}
_HEADS = Heads({head: rf'{key}\.weight' for head, (key, _) in _PURPOSES.items()}, default='text')
# Buffers, copies of the word table, and heads that the model does without: which head it has is
# decided before.
_IGNORE = (_FREQUENCIES, *sorted({rf'{key}\..*' for key, _ in _PURPOSES.values()}))


def _table(kind: str, model: Llama) -> Table:
  key, purpose = _PURPOSES[model.head or 'text']
  # transformers has the decoder under another name in most classes that answer questions.
  base, other = 'model.', 'transformer.'
  if model.head == 'questions' and kind not in ('mistral', 'mixtral', 'qwen2_moe'):
    base, other = other, base
  tied = model.head == 'text' and model.tied
  head = () if tied or model.head is None else (('head', 'dense', key),)
  architectures = (f'{_NAMES[kind]}Model', _NAMES[kind] + purpose)
  if kind == 'gemma3_text' and model.head in ('text', None):
    architectures = (architectures[0], 'Gemma3ForCausalLM')
  rows = _rows(kind, model.branch_norms)
  return Table(base, rows, head, _IGNORE, architectures, tied=tied, other_bases=(other,))


def _build(kind: str, config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Llama:
  if request.head not in (None, 'classification') and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} reads every token: it takes no pool, got {request.pool!r}'
    )
  config = _DEFAULTS.get(kind, {}) | config
  classes = request.num_classes
  if request.head == 'questions':
    classes = None
  elif request.head in ('classification', 'tokens') and classes is None:
    shape = shape_of(checkpoint, 'score.weight')
    classes = shape[0] if shape else None
  qkv_bias = config.get('attention_bias', False) and kind != 'phi3'
  out_bias = qkv_bias
  if kind == 'qwen2':
    # Whatever the config has: the released weights have these biases and no others.
    qkv_bias = True
    out_bias = False
  elif kind == 'qwen2_moe':
    qkv_bias = config.get('qkv_bias', True)
    out_bias = False
  is_gemma = kind in _GEMMAS
  if is_gemma:
    _check_gemma(kind, config)
  tied = config.get('tie_word_embeddings', is_gemma)
  if checkpoint is not None and not tied and request.head == 'text':
    tied = shape_of(checkpoint, _HEAD) is None
  depth = depth_of(config, 'num_hidden_layers', request)
  experts = _experts(kind, config, depth)
  return Llama(
    config['hidden_size'],
    depth,
    config['num_attention_heads'],
    _mlp_dim(config, experts),
    config['vocab_size'],
    kv_heads=config.get('num_key_value_heads'),
    head_dim=config.get('head_dim', 256 if is_gemma else None),
    tied=tied,
    num_classes=classes,
    head=request.head,
    pool=request.pool or config.get('jpeft_pool', 'last'),
    qkv_bias=qkv_bias,
    out_bias=out_bias,
    mlp_bias=config.get('mlp_bias', False),
    qk_norm=kind in ('qwen3', 'gemma3_text', 'qwen3_moe'),
    unit_norms=is_gemma,
    branch_norms=kind in _LATER_GEMMAS,
    embed_scale=config['hidden_size'] ** 0.5 if is_gemma else None,
    query_scale=_query_scale(kind, config),
    logit_cap=_cap(kind, config, 'attn_logit_softcapping'),
    final_cap=_cap(kind, config, 'final_logit_softcapping'),
    rope=_phi3_rope(config) if kind == 'phi3' else rope_of(_rope_config(kind, config)),
    window=_window(kind, config, depth),
    window_rope=_window_rope(kind, config),
    experts=experts,
    eps=config.get('rms_norm_eps', 1e-5 if kind == 'phi3' else 1e-6),
    activation=activation(_activation(kind, config)),
    dropout=config.get('resid_pdrop', 0.0) if kind == 'phi3' else 0.0,
    attention_dropout=config.get('attention_dropout', 0.0),
    **request.fields,
  )


def _experts(kind: str, config: Mapping, depth: int) -> Experts | tuple[Experts | None, ...] | None:
  """How the experts of all blocks are chosen, or of each; None of blocks with one MLP.

  Raises:
    ValueError: routers are trained with noise.
  """
  if kind not in _EXPERTS:
    return None
  if kind == 'mixtral':
    if config.get('router_jitter_noise'):
      raise ValueError(
        f'router_jitter_noise={config["router_jitter_noise"]} is not supported, only 0: it is noise'
        ' of the training of routers, which are frozen here'
      )
    return Experts(config['num_local_experts'], config['num_experts_per_tok'])
  count = config['num_experts'] if 'num_experts' in config else config['num_local_experts']
  experts = Experts(
    count,
    config['num_experts_per_tok'],
    normalised=config.get('norm_topk_prob', False),
    shared_dim=config['shared_expert_intermediate_size'] if kind == 'qwen2_moe' else None,
  )
  step = config.get('decoder_sparse_step', 1)
  dense = set(config.get('mlp_only_layers') or ())
  by_block = tuple(None if i in dense or (i + 1) % step else experts for i in range(depth))
  return by_block if len(set(by_block)) > 1 else by_block[0]


def _mlp_dim(config: Mapping, experts) -> int | tuple[int, ...]:
  """The hidden width of the MLPs, or of the experts in their place."""
  dense = config.get('intermediate_size')
  sparse = config.get('moe_intermediate_size', dense)
  if not isinstance(experts, tuple):
    return config['intermediate_size'] if experts is None else sparse
  return tuple(config['intermediate_size'] if own is None else sparse for own in experts)


def _check_gemma(kind: str, config: Mapping) -> None:
  """Raises a ValueError for what a Gemma may have and is not supported."""
  keys: tuple[str, ...] = ('use_bidirectional_attention',)
  if kind != 'gemma2':
    keys = (*_CAPS, *keys)
  for key in keys:
    if config.get(key):
      raise ValueError(f'{key}={config[key]!r} is not supported, only models without')


# The soft caps of Gemma 2 where the config has none; null says that there is no cap.
_CAPS = {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}


def _cap(kind: str, config: Mapping, key: str) -> float | None:
  if kind != 'gemma2':
    return None
  cap = config.get(key, _CAPS[key])
  return None if cap is None else float(cap)


def _activation(kind: str, config: Mapping) -> str:
  if kind not in _GEMMAS:
    return config.get('hidden_act', 'silu')
  name = config.get('hidden_activation') or config.get('hidden_act') or 'gelu_pytorch_tanh'
  # The first Gemmas say 'gelu', and were trained with the approximation.
  return 'gelu_pytorch_tanh' if name == 'gelu' else name


def _query_scale(kind: str, config: Mapping) -> float | None:
  if kind not in _LATER_GEMMAS:
    return None
  return float(config.get('query_pre_attn_scalar', 256)) ** -0.5


# Of Gemma 3 where the config has none.
_THETAS = {'full_attention': 1e6, 'sliding_attention': 1e4}


def _rope_config(kind: str, config: Mapping, layer_type: str = 'full_attention') -> Mapping:
  """The config as `rope_of` reads it, of one type of layers."""
  if kind != 'gemma3_text':
    return config
  of_types = config.get('rope_parameters') or {}
  if layer_type in of_types:
    return {'rope_parameters': {'rope_theta': _THETAS[layer_type], **of_types[layer_type]}}
  if layer_type == 'sliding_attention':
    return {'rope_theta': config.get('rope_local_base_freq', _THETAS[layer_type])}
  return {
    'rope_theta': config.get('rope_theta', _THETAS[layer_type]),
    'rope_scaling': config.get('rope_scaling'),
  }


def _window_rope(kind: str, config: Mapping) -> Rope | None:
  if kind != 'gemma3_text':
    return None
  return rope_of(_rope_config(kind, config, 'sliding_attention'))


def rope_of(config: Mapping) -> Rope:
  """The rotary positions of a config of transformers 5 or older.

  Raises:
    ValueError: a variant that is not supported.
  """
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  theta = _theta(rope, config)
  part = rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0))
  if kind not in _SCALINGS:
    raise ValueError(f'rope type {kind!r} is none of {", ".join(_SCALINGS)}')
  if part != 1.0:
    raise ValueError(f'partial_rotary_factor {part} is not supported, only 1.0')
  if kind == 'default':
    return Rope(theta)
  if kind == 'linear':
    return Rope(theta, kind, float(rope['factor']))
  if kind == 'yarn':
    return _yarn(theta, rope, config)
  return Rope(
    theta,
    kind,
    factor=float(rope['factor']),
    low=float(rope['low_freq_factor']),
    high=float(rope['high_freq_factor']),
    original=int(rope['original_max_position_embeddings']),
  )


def _yarn(theta: float, rope: Mapping, config: Mapping) -> Rope:
  """The rotary positions of YaRN, arXiv:2309.00071."""
  original = rope.get('original_max_position_embeddings', config.get('max_position_embeddings'))
  if original is None:
    raise ValueError('rope type yarn needs original_max_position_embeddings')
  factor = rope.get('factor')
  if factor is None:
    factor = config['max_position_embeddings'] / original
  magnitude = rope.get('attention_factor')
  if magnitude is None:
    magnitude = _yarn_magnitude(factor, rope.get('mscale'), rope.get('mscale_all_dim'))
  return Rope(
    theta,
    'yarn',
    factor=float(factor),
    low=float(rope.get('beta_slow') or 1),
    high=float(rope.get('beta_fast') or 32),
    original=int(original),
    magnitude=float(magnitude),
    whole=rope.get('truncate', True),
  )


def _yarn_magnitude(factor: float, scale: float | None, all_scale: float | None) -> float:
  """What queries and keys are multiplied by: 0.1 log(factor) + 1, or a quotient of two such."""
  log = math.log(max(factor, 1))
  if scale and all_scale:
    return (0.1 * scale * log + 1) / (0.1 * all_scale * log + 1)
  return 0.1 * log + 1


def _phi3_rope(config: Mapping) -> Rope:
  """The rotary positions of a Phi-3: part of a head turns, by LongRoPE in long contexts."""
  rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
  kind = rope.get('rope_type', rope.get('type', 'default'))
  part = float(rope.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0)))
  # The first files call LongRoPE so.
  if kind in ('su', 'yarn', 'longrope'):
    return _longrope(rope, config, part)
  if kind != 'default':
    raise ValueError(f'rope type {kind!r} of a phi3 is none of default, longrope')
  return Rope(_theta(rope, config), part=part)


def _longrope(rope: Mapping, config: Mapping, part: float) -> Rope:
  """The rotary positions of LongRoPE, arXiv:2402.13753."""
  original = config.get('original_max_position_embeddings', 4096)
  factor = rope.get('factor')
  if factor is None:
    factor = config.get('max_position_embeddings', 4096) / original
  magnitude = rope.get('attention_factor')
  if magnitude is None:
    magnitude = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
  return Rope(
    _theta(rope, config),
    'longrope',
    original=int(original),
    magnitude=float(magnitude),
    part=part,
    short=tuple(map(float, rope['short_factor'])),
    long=tuple(map(float, rope['long_factor'])),
  )


def _theta(rope: Mapping, config: Mapping) -> float:
  return float(rope.get('rope_theta', config.get('rope_theta', 10000.0)))


def _window(kind: str, config: Mapping, depth: int) -> int | None | tuple[int | None, ...]:
  """The window of all layers, or of each; None if they attend to everything before.

  Raises:
    ValueError: some layers of a Qwen have a window and others have none.
  """
  # 0 stands for none.
  window = config.get('sliding_window', 4096 if kind in _LATER_GEMMAS else None) or None
  if kind in ('llama', 'gemma') or window is None:
    return None
  if kind in _LATER_GEMMAS:
    return _windows(config, window, depth, 6 if kind == 'gemma3_text' else 2)
  if kind in ('mistral', 'mixtral', 'phi3'):
    return window
  if not config.get('use_sliding_window', False):
    return None
  if kind == 'qwen3_moe':
    return window
  if kind == 'qwen2_moe' and not config.get('layer_types'):
    raise ValueError(
      'use_sliding_window=True needs layer_types, which say the layers that have a window'
    )
  if config.get('layer_types'):
    slides = {name == 'sliding_attention' for name in config['layer_types'][:depth]}
  else:
    # Older configs of Qwen: the first max_window_layers have no window.
    first = config.get('max_window_layers', 28)
    slides = {layer >= first for layer in range(depth)}
  if len(slides) > 1:
    raise ValueError(
      'layer_types mixes full and sliding attention, which is not supported: '
      'all layers must be of one type'
    )
  return window if slides.pop() else None


def _windows(
  config: Mapping, window: int, depth: int, every: int
) -> int | None | tuple[int | None, ...]:
  """The windows of a Gemma 2 or 3, in which every second or sixth layer has none.

  One value if all are alike.
  """
  types = config.get('layer_types')
  if types is None:
    every = config.get('sliding_window_pattern') or every
    types = ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(depth)]
  windows = tuple(window if name == 'sliding_attention' else None for name in types[:depth])
  return windows if len(set(windows)) > 1 else windows[0]


def _describe(config: Mapping, model: Llama) -> dict:
  classes = 2 if model.head == 'questions' else model.num_classes
  config = with_labels(config, classes) | {'num_hidden_layers': model.depth}
  if model.head == 'text':
    config['tie_word_embeddings'] = model.tied
  else:
    config['jpeft_pool'] = model.pool  # our own key, which transformers ignores
  if config.get('layer_types'):
    config['layer_types'] = config['layer_types'][: model.depth]
  return config


def example(model: Llama) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


_SIZES = {
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp_dim': 'intermediate_size',
}


def _family(kind: str) -> Family:
  build = functools.partial(_build, kind)
  table = functools.partial(_table, kind)
  return Family(build, table, example, _describe, sizes=_SIZES, heads=_HEADS)


LLAMA_FAMILIES = {kind: _family(kind) for kind in _NAMES}
