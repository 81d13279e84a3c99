"""Llama, Mistral, SmolLM2, Qwen2 and Qwen3 as Hugging Face stores them."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import Rope, activation
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
_ROWS = (
  ('embed', 'embed', 'embed_tokens'),
  ('final_norm', 'norm', 'norm'),
  *((f'decoder/block/{ours}', 'dense', _BLOCK + theirs) for ours, theirs in _LINEAR.items()),
  *((f'decoder/block/{ours}', 'norm', _BLOCK + theirs) for ours, theirs in _NORMS.items()),
)
_HEAD = 'lm_head.weight'
# Buffers in files of before 2023.
_FREQUENCIES = r'layers\.\d+\.self_attn\.rotary_emb\.inv_freq'
_NAMES = {'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}
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
  if model.head == 'questions' and kind != 'mistral':
    base, other = other, base
  tied = model.head == 'text' and model.tied
  head = () if tied or model.head is None else (('head', 'dense', key),)
  architectures = (f'{_NAMES[kind]}Model', _NAMES[kind] + purpose)
  return Table(base, _ROWS, head, _IGNORE, architectures, tied=tied, other_bases=(other,))


def _build(kind: str, config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Llama:
  if request.head not in (None, 'classification') and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} reads every token: it takes no pool, got {request.pool!r}'
    )
  classes = request.num_classes
  if request.head == 'questions':
    classes = None
  elif request.head in ('classification', 'tokens') and classes is None:
    shape = shape_of(checkpoint, 'score.weight')
    classes = shape[0] if shape else None
  qkv_bias = config.get('attention_bias', False)
  out_bias = qkv_bias
  if kind == 'qwen2':
    # Whatever the config has: the released weights have these biases and no others.
    qkv_bias = True
    out_bias = False
  tied = config.get('tie_word_embeddings', False)
  if checkpoint is not None and not tied and request.head == 'text':
    tied = shape_of(checkpoint, _HEAD) is None
  depth = depth_of(config, 'num_hidden_layers', request)
  return Llama(
    config['hidden_size'],
    depth,
    config['num_attention_heads'],
    config['intermediate_size'],
    config['vocab_size'],
    kv_heads=config.get('num_key_value_heads'),
    head_dim=config.get('head_dim'),
    tied=tied,
    num_classes=classes,
    head=request.head,
    pool=request.pool or config.get('jpeft_pool', 'last'),
    qkv_bias=qkv_bias,
    out_bias=out_bias,
    mlp_bias=config.get('mlp_bias', False),
    qk_norm=kind == 'qwen3',
    rope=rope_of(config),
    window=_window(kind, config, depth),
    eps=config.get('rms_norm_eps', 1e-6),
    activation=activation(config.get('hidden_act', 'silu')),
    attention_dropout=config.get('attention_dropout', 0.0),
    **request.fields,
  )


def rope_of(config: Mapping) -> Rope:
  """The rotary positions of a config of transformers 5 or older.

  Raises:
    ValueError: a variant that is not supported.
  """
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  theta = float(rope.get('rope_theta', config.get('rope_theta', 10000.0)))
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


def _window(kind: str, config: Mapping, depth: int) -> int | None:
  """The window of all layers; None if they attend to everything before.

  Raises:
    ValueError: some layers have a window and others have none.
  """
  window = config.get('sliding_window')
  if kind == 'llama' or window is None:
    return None
  if kind == 'mistral':
    return window
  if not config.get('use_sliding_window', False):
    return None
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
