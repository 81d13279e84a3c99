"""What the keys of a Hugging Face config hold that any family reads: kinds and bounds.

Models are built of these before a tensor is compared with them, so that a number that no model has
would cost minutes or all memory.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jpeft import jsonfiles

_FLAGS = (
  *('attention_bias', 'key_bias', 'mlp_bias', 'proj_bias', 'qkv_bias', 'query_bias', 'value_bias'),
  *('scale_decoder_outputs', 'tie_word_embeddings', 'use_absolute_position_embeddings'),
  *('use_absolute_embeddings', 'use_gated_mlp', 'use_mask_token', 'use_mean_pooling'),
  'use_relative_position_bias',
  *('use_shared_relative_position_bias', 'use_sliding_window', 'use_swiglu_ffn'),
  'vision_use_head',
  *('add_cross_attention', 'do_layer_norm_before', '_remove_final_layer_norm', 'enable_bias'),
  *('layer_norm_elementwise_affine', 'scale_attn_by_inverse_layer_idx', 'scale_attn_weights'),
  'norm_topk_prob',
  *('classifier_bias', 'decoder_bias', 'norm_bias'),
)
_TEXTS = (
  *('activation', 'activation_function', 'feed_forward_proj', 'hidden_act', 'jpeft_pool'),
  'position_embedding_type',
  *('classifier_activation', 'classifier_pooling'),
)
_MAYBE_TEXTS = ('hidden_activation',)
_RATES = (
  *('attention_dropout', 'attention_probs_dropout_prob', 'dropout', 'dropout_rate'),
  'hidden_dropout_prob',
  *('attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'layerdrop'),
  *('classifier_dropout', 'embedding_dropout', 'mlp_dropout'),
)
_WIDE = 2**24  # of a table or matrix, in rows
# {key: (least, most)} of integers, and of numbers.
_COUNTS = {
  **dict.fromkeys(('hidden_size', 'dim', 'd_model', 'embedding_size', 'embed_dim'), (1, 2**20)),
  'n_embd': (1, 2**20),
  **dict.fromkeys(('num_attention_heads', 'n_heads', 'num_heads', 'n_head'), (1, 2**16)),
  **dict.fromkeys(('num_hidden_layers', 'n_layers', 'num_layers', 'n_layer'), (1, 2**12)),
  **dict.fromkeys(('intermediate_size', 'hidden_dim', 'd_ff', 'vocab_size'), (1, _WIDE)),
  'd_kv': (1, 2**16),
  'ffn_dim': (1, _WIDE),
  'n_positions': (1, 2**28),
  'relative_attention_num_buckets': (4, 2**16),
  'max_position_embeddings': (1, 2**28),
  'original_max_position_embeddings': (1, 2**28),
  'relative_attention_max_distance': (1, 2**28),
  'max_window_layers': (0, 2**31),
  'num_channels': (1, 2**16),
  'num_register_tokens': (0, 2**16),
  'type_vocab_size': (0, _WIDE),
  'window_size': (1, 2**14),
  **dict.fromkeys(('num_experts', 'num_local_experts', 'num_experts_per_tok'), (1, 2**16)),
  **dict.fromkeys(('moe_intermediate_size', 'shared_expert_intermediate_size'), (1, _WIDE)),
  'decoder_sparse_step': (1, 2**16),
  'global_attn_every_n_layers': (1, 2**12),
  'local_attention': (1, 2**31),
}
_MAYBE_COUNTS = {
  'head_dim': (1, 2**16),
  'n_inner': (1, _WIDE),
  'word_embed_proj_dim': (1, 2**20),
  'sliding_window_pattern': (1, 2**12),
  'num_decoder_layers': (1, 2**12),
  'num_key_value_heads': (1, 2**16),
  'pad_token_id': (-1, _WIDE),
  'sliding_window': (0, 2**31),
}
_NUMBERS = {
  **dict.fromkeys(('layer_norm_eps', 'layer_norm_epsilon', 'norm_eps', 'rms_norm_eps'), (0, 1)),
  **dict.fromkeys(_RATES, (0, 1)),
  **dict.fromkeys(('layer_scale_init_value', 'layerscale_value'), (-1e6, 1e6)),
  'mlp_ratio': (1e-3, 1e3),
  'partial_rotary_factor': (0, 1),
  'query_pre_attn_scalar': (1e-3, 1e6),
  'rope_local_base_freq': (1e-3, 1e12),
  'rope_theta': (1e-3, 1e12),
  **dict.fromkeys(('global_rope_theta', 'local_rope_theta'), (1e-3, 1e12)),
  'router_jitter_noise': (0, 1),
}
_MAYBE_NUMBERS = dict.fromkeys(('attn_logit_softcapping', 'final_logit_softcapping'), (1e-3, 1e6))
# Of models in stages, one number a stage. Elsewhere 'num_heads' is one number.
_STAGES = {
  'depths': (1, 2**12),
  'hidden_sizes': (1, 2**20),
  'num_heads': (1, 2**16),
}
_STAGED = ('swin', 'convnext', 'convnextv2')
_SIDES = {'image_size': (1, 2**14), 'patch_size': (1, 2**14)}
# Of the rotary positions, a dict of their own.
_ROPE_NUMBERS = {
  **dict.fromkeys(('rope_theta', 'partial_rotary_factor'), (0, 1e12)),
  **dict.fromkeys(('factor', 'beta_fast', 'beta_slow', 'high_freq_factor'), (1e-3, 1e6)),
  **dict.fromkeys(('low_freq_factor', 'original_max_position_embeddings'), (1e-3, 2**28)),
  **dict.fromkeys(('attention_factor', 'mscale', 'mscale_all_dim'), (0, 1e6)),
}
_ROPE = {
  **{f'{key}?': (float, None) for key in _ROPE_NUMBERS},
  **dict.fromkeys(('rope_type?', 'type?'), str),
  **dict.fromkeys(('long_factor?', 'short_factor?'), ([float], None)),
  'truncate?': bool,
}
# Gemma 3 has rotary positions for each type of its layers.
_ROPES = {**_ROPE, **dict.fromkeys(('full_attention?', 'sliding_attention?'), (_ROPE, None))}
_SCHEMA = {
  'model_type': str,
  'architectures?': ([str], None),
  'id2label?': (dict, None),
  'label2id?': (dict, None),
  'layer_types?': ([str], None),
  'mlp_only_layers?': ([int], None),
  'jpeft_sizes?': dict,
  'vision_config?': dict,
  'rope_parameters?': (_ROPES, None),
  'rope_scaling?': (_ROPE, None),
  **{f'{key}?': (bool, None) for key in _FLAGS},
  **{f'{key}?': str for key in _TEXTS},
  **{f'{key}?': (str, None) for key in _MAYBE_TEXTS},
  **{f'{key}?': int for key in _COUNTS},
  **{f'{key}?': (int, None) for key in _MAYBE_COUNTS},
  **{f'{key}?': float for key in _NUMBERS},
  **{f'{key}?': (float, None) for key in _MAYBE_NUMBERS},
  'classifier_dropout?': (float, None),
  **{f'{key}?': (int, [int]) for key in _SIDES},
}
_WIDTHS = ('hidden_size', 'dim', 'n_embd')
_HEADS = ('num_attention_heads', 'n_heads', 'n_head')


def check_config(config: Mapping[str, Any], where: str) -> None:
  """Raises a ValueError for the value of a key that no model can have.

  Args:
    config: as in config.json.
    where: the file, or what else has it.
  """
  schema = _SCHEMA
  bounds = _COUNTS | _MAYBE_COUNTS | _NUMBERS | _MAYBE_NUMBERS | _SIDES
  if config.get('model_type') in _STAGED:
    schema = schema | {f'{key}?': [int] for key in _STAGES}
    bounds = bounds | _STAGES
  jsonfiles.check(dict(config), schema, where)
  for key, (least, most) in bounds.items():
    _check_between(config.get(key), least, most, where, key)
  for name in ('rope_parameters', 'rope_scaling'):
    _check_rope(config.get(name) or {}, where, name)
    for kind in ('full_attention', 'sliding_attention'):
      _check_rope((config.get(name) or {}).get(kind) or {}, where, f'{name}.{kind}')
  stages = {key: len(config[key]) for key in _STAGES if isinstance(config.get(key), list)}
  if len(set(stages.values())) > 1 or not all(1 <= count <= 16 for count in stages.values()):
    raise ValueError(f'{where}: {", ".join(stages)} must have one number a stage, of 1 to 16')
  for key in _SIDES:
    if isinstance(config.get(key), list) and len(config[key]) != 2:
      raise ValueError(f'{where}: {key} must be one number or two, not {config[key]!r:.60}')
  _check_heads(config, where)
  if 'vision_config' in config:
    check_config({'model_type': '', **config['vision_config']}, f'{where}: vision_config')


def _check_rope(rope: Mapping[str, Any], where: str, name: str) -> None:
  """Raises a ValueError for a number of rotary positions that is not within its bounds."""
  for key, (least, most) in _ROPE_NUMBERS.items():
    _check_between(rope.get(key), least, most, where, f'{name}.{key}')
  for key in ('long_factor', 'short_factor'):
    _check_between(rope.get(key), 1e-3, 1e6, where, f'{name}.{key}')


def _check_between(value: Any, least: float, most: float, where: str, key: str) -> None:
  """Raises a ValueError if a number, or one of a list, is not within its bounds."""
  for number in value if isinstance(value, list) else [value]:
    if number is not None and not least <= number <= most:
      raise ValueError(f'{where}: {key} must be from {least:g} to {most:g}, not {number!r}')


def _check_heads(config: Mapping[str, Any], where: str) -> None:
  """Raises a ValueError if heads do not share the width or their keys, or distances no buckets."""
  width = _first(config, _WIDTHS)
  heads = _first(config, _HEADS)
  if width and heads and not config.get('head_dim') and width % heads:
    raise ValueError(f'{where}: a width of {width} cannot be shared by {heads} heads')
  groups = config.get('num_key_value_heads')
  if groups and heads and heads % groups:
    raise ValueError(f'{where}: {heads} heads cannot share {groups} heads of keys')
  buckets = config.get('relative_attention_num_buckets', 32)
  farthest = config.get('relative_attention_max_distance', 128)
  if 2 * farthest <= buckets:
    raise ValueError(f'{where}: {buckets} buckets of distances need more than up to {farthest}')


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
  return next((config[key] for key in keys if key in config), None)
