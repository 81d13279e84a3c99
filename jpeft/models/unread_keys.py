"""Keys of a config.json that the reader of its family has not read.

What a model is built of is noted while it is built. Of the other keys, those of HARMLESS change
nothing that a model computes. A value that says that something is not there (null, false, nothing
in a list) needs no reader. CHANGES has keys that change outputs, with the values that do not:
another value is refused. What is left is told by a warning, since it may be either.
"""

import warnings
from collections.abc import Mapping
from typing import Any

# What transformers notes of a file, of its tokens and labels, and of how text is written with it.
_BOOKKEEPING = (
  *('_attn_implementation', '_attn_implementation_autoset', '_commit_hash', '_name_or_path'),
  *('architectures', 'auto_map', 'bos_token_id', 'cls_token_id', 'custom_pipelines'),
  *('decoder_start_token_id', 'dtype', 'eos_token_id', 'finetuning_task', 'id2label'),
  *('is_encoder_decoder', 'label2id', 'mask_token_id', 'model_type', 'name_or_path'),
  *('output_attentions', 'output_hidden_states', 'output_past', 'output_scores', 'pad_token_id'),
  *('prefix', 'problem_type', 'return_dict', 'return_dict_in_generate', 'sep_token_id'),
  *('task_specific_params', 'tf_legacy_loss', 'tokenizer_class', 'torch_dtype', 'torchscript'),
  *('transformers_version', 'unk_token_id', 'unsloth_fixed', 'unsloth_version', 'use_bfloat16'),
  *('bad_words_ids', 'begin_suppress_tokens', 'diversity_penalty', 'do_sample', 'early_stopping'),
  *('encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty', 'forced_bos_token_id'),
  *('forced_eos_token_id', 'generation_config', 'jpeft_pool', 'jpeft_sizes', 'length_penalty'),
  *('max_length', 'max_new_tokens'),
  *('min_length', 'no_repeat_ngram_size', 'num_beam_groups', 'num_beams', 'num_return_sequences'),
  *('remove_invalid_values', 'repetition_penalty', 'suppress_tokens', 'temperature', 'top_k'),
  *('top_p', 'typical_p', 'use_cache'),
  # Which stages a model gives to others, as a backbone.
  *('apply_layernorm', 'out_features', 'out_indices', 'reshape_hidden_states', 'stage_names'),
)
# Of training alone: dropout, fresh weights, losses.
_TRAINING = (
  *('attention_dropout', 'attention_probs_dropout_prob', 'attn_pdrop', 'classifier_dropout'),
  *('dropout', 'drop_path_rate', 'embd_pdrop', 'hidden_dropout_prob', 'layerdrop', 'qa_dropout'),
  *('resid_pdrop', 'seq_classif_dropout', 'summary_first_dropout', 'summary_last_dropout'),
  *('gradient_checkpointing', 'init_std', 'initializer_cutoff_factor', 'initializer_factor'),
  *('initializer_range', 'auxiliary_loss_weight', 'mask_ratio', 'norm_pix_loss'),
  *('output_router_logits', 'pos_embed_jitter', 'pos_embed_rescale', 'pos_embed_shift'),
  *('router_aux_loss_coef', 'semantic_loss_ignore_index', 'sparse_pred_ignore_index'),
)
# Of parts that are not built here (decoders of images, the other tower, heads of other tasks), of
# how the same is computed, or said once more by other keys or by the shapes of tensors.
_OTHERS = (
  *('add_fpn', 'auxiliary_channels', 'auxiliary_concat_input', 'auxiliary_num_convs'),
  *('decoder_hidden_size', 'decoder_intermediate_size', 'decoder_num_attention_heads'),
  *('decoder_num_hidden_layers', 'encoder_stride', 'logit_scale_init_value', 'pool_scales'),
  *('pooler_act', 'pooler_output_size', 'projection_dim', 'summary_activation'),
  *('summary_proj_to_labels', 'summary_type', 'summary_use_proj', 'text_config'),
  # Of the head of masked words of a DeBERTa, and of its dropout.
  *('legacy', 'cls_dropout', 'pooler_dropout'),
  *('text_config_dict', 'use_auxiliary_head', 'vision_config_dict', 'vision_use_head'),
  *('chunk_size_feed_forward', 'deterministic_flash_attn', 'pretraining_tp'),
  *('reference_compile', 'reorder_and_upcast_attn', 'repad_logits_with_grad'),
  *('sparse_prediction', 'classifier_bias', 'decoder_bias', 'tie_word_embeddings'),
  *('dense_act_fn', 'head_dim', 'hidden_size', 'image_size', 'intermediate_size', 'is_gated_act'),
  *('max_position_embeddings', 'max_window_layers', 'n_ctx', 'num_channels'),
  *('num_key_value_heads', 'num_labels', 'num_layers', 'num_stages', 'patch_size'),
  *('sinusoidal_pos_embds', 'vocab_size', '_sliding_window_pattern', 'sliding_window_pattern'),
  # Read with the head or the experts that they are of.
  *('classifier_activation', 'classifier_pooling', 'decoder_sparse_step', 'mlp_only_layers'),
  *('moe_intermediate_size', 'original_max_position_embeddings', 'type_vocab_size'),
  # Of causal models alone, or refused where it matters.
  *('add_cross_attention', 'is_decoder'),
)
HARMLESS = frozenset((*_BOOKKEEPING, *_TRAINING, *_OTHERS))
# {key that changes outputs: values of a model without that}; null and false are such always.
CHANGES: dict[str, tuple[Any, ...]] = {
  # Attention of another kind.
  'alibi': (),
  'attention_chunk_size': (),
  'attention_sinks': (),
  'attn_logit_softcapping': (),
  'clip_qkv': (),
  'kv_lora_rank': (),
  'layer_types': (),
  'no_rope_layers': (),
  'parallel_attn': (),
  'parallel_residual': (),
  'partial_rotary_factor': (1, 1.0),
  'q_lora_rank': (),
  'qk_layernorm': (),
  'query_pre_attn_scalar': (),
  'rope_interleaved': (),
  'rope_parameters': (),
  'rope_scaling': (),
  'rotary_pct': (1, 1.0),
  'scale_attn_by_inverse_layer_idx': (),
  'use_alibi': (),
  'use_bidirectional_attention': (),
  'use_mrope': (),
  'use_parallel_residual': (),
  'use_qk_norm': (),
  # Scales of what goes in, on and out.
  'attention_multiplier': (),
  'dim_model_base': (),
  'embedding_multiplier': (1, 1.0),
  'final_logit_softcapping': (),
  'logit_scale': (1, 1.0),
  'logits_scaling': (1, 1.0),
  'mup_scale': (1, 1.0),
  'mup_width_scale': (1, 1.0),
  'residual_multiplier': (1, 1.0),
  'scale_depth': (),
  'scale_emb': (1, 1.0),
  'scale_embedding': (),
}
_LONGEST = 60  # characters of a value in a message


class Noted(dict):
  """A config that notes which keys are read.

  Attributes:
    read: those that were, also of a config that `defaults | config` made of this one.
  """

  def __init__(self, values: Mapping[str, Any], read: set[str] | None = None):
    super().__init__(values)
    self.read = set() if read is None else read
    inside = dict.get(self, 'vision_config')
    if isinstance(inside, dict) and not isinstance(inside, Noted):
      self['vision_config'] = Noted(inside)

  def __getitem__(self, key: str) -> Any:
    self.read.add(key)
    return super().__getitem__(key)

  def get(self, key: str, default: Any = None) -> Any:
    self.read.add(key)
    return super().get(key, default)

  def __ror__(self, defaults: dict[str, Any]) -> 'Noted':
    return Noted({**defaults, **self}, self.read)


def check_unread(config: Noted, where: str) -> None:
  """Tells of keys that nothing has read and that may change what the model computes.

  Args:
    config: that a model was built of.
    where: what has it, for messages.

  Raises:
    ValueError: a key that changes outputs.
  """
  unknown = []
  for key, value in config.items():
    if isinstance(value, Noted):
      check_unread(value, f'{where}: {key}')
    if key in config.read or key in HARMLESS or _is_absent(value):
      continue
    shown = f'{key}={value!r:.{_LONGEST}}'
    if key not in CHANGES:
      unknown.append(shown)
    elif not _changes_nothing(key, value):
      raise ValueError(
        f'{where} has {shown}, which changes what a model computes, and models of this kind have '
        'none of it in jpeft: leave it out only if the weights were trained without it'
      )
  if unknown:
    warnings.warn(
      f'{where} has {", ".join(unknown)}, which jpeft does not read: if one of these changes what '
      'the model computes, its outputs are others here',
      stacklevel=4,
    )


def _changes_nothing(key: str, value: Any) -> bool:
  if key == 'layer_types':  # one type says what is said elsewhere
    return len(set(value)) == 1
  return value in CHANGES[key]


def _is_absent(value: Any) -> bool:
  return value is None or value is False or value == '' or value == [] or value == {}
