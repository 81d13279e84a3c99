"""Makes tests/models/golden: tiny random models of transformers, with inputs and their outputs.

Run with torch and transformers installed: python tests/models/make_golden.py [name ...] (written
with transformers 5.23.0 and torch 2.13.0). Every parameter is moved away from its initial value, so
that no forgotten bias or scale goes unseen. What a model computes is taken from the saved files.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / 'golden'
LABELS = {
  'id2label': {i: f'class {i}' for i in range(3)},
  'label2id': {f'class {i}': i for i in range(3)},
}
SMALL = {'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4}
IMAGES = {**SMALL, **LABELS, 'intermediate_size': 40, 'patch_size': 7, 'image_size': 28}
TEXT = {**SMALL, **LABELS, 'intermediate_size': 40, 'vocab_size': 60, 'max_position_embeddings': 24}
T5 = {
  'd_model': 24,
  'd_kv': 5,
  'd_ff': 40,
  'num_layers': 2,
  'num_decoder_layers': 3,
  'num_heads': 4,
  'vocab_size': 60,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 12,
  'decoder_start_token_id': 0,
}
CAUSAL = {
  **SMALL,
  'intermediate_size': 40,
  'vocab_size': 60,
  'max_position_embeddings': 64,
  'num_key_value_heads': 2,
  'head_dim': 6,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 100.0,
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
TINY = {
  **LABELS,
  'hidden_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 16,
  'vocab_size': 30,
  'max_position_embeddings': 24,
}
TINY_IMAGES = {k: v for k, v in TINY.items() if k not in ('vocab_size', 'max_position_embeddings')}
TINY_IMAGES |= {'patch_size': 7, 'image_size': 28}
TINY_ROBERTA = {**TINY, 'type_vocab_size': 1, 'pad_token_id': 1}
TINY_DISTILBERT = {
  **LABELS,
  'dim': 12,
  'n_layers': 2,
  'n_heads': 2,
  'hidden_dim': 16,
  'vocab_size': 30,
  'max_position_embeddings': 24,
}
TINY_CAUSAL = {**TINY, 'num_key_value_heads': 1, 'head_dim': 6, 'pad_token_id': 0}
# Heads of 8 features.
PHI3 = {
  **{k: v for k, v in TINY_CAUSAL.items() if k not in (*LABELS, 'head_dim')},
  'hidden_size': 16,
  'num_key_value_heads': 1,
  'max_position_embeddings': 64,
}
TINY_GPT2 = {
  'n_embd': 12,
  'n_layer': 2,
  'n_head': 2,
  'n_inner': 16,
  'vocab_size': 30,
  'n_positions': 24,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
}
TINY_OPT = {
  'hidden_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'ffn_dim': 16,
  'vocab_size': 30,
  'max_position_embeddings': 24,
  'pad_token_id': 0,
}
TINY_EXPERTS = {
  **TINY_CAUSAL,
  'num_experts': 5,
  'num_experts_per_tok': 2,
  'moe_intermediate_size': 8,
}
TINY_DEBERTA = {
  **TINY,
  'relative_attention': True,
  'position_buckets': 4,
  'pos_att_type': 'p2c|c2p',
  'position_biased_input': False,
  'share_att_key': True,
  'norm_rel_ebd': 'layer_norm',
  'type_vocab_size': 0,
  'pooler_hidden_size': 12,
  'hidden_dropout_prob': 0.0,
  'attention_probs_dropout_prob': 0.0,
}
TINY_MODERNBERT = {
  **TINY,
  'local_attention': 6,
  'layer_types': ['full_attention', 'sliding_attention'],
  **dict.fromkeys(('pad_token_id', 'bos_token_id', 'cls_token_id'), 0),
  **dict.fromkeys(('eos_token_id', 'sep_token_id'), 2),
}
TINY_T5 = {**T5, **LABELS, 'd_model': 12, 'd_ff': 16, 'num_heads': 2, 'vocab_size': 30}
# Heads of 12 features: three frequencies each way.
DINOV3 = {**{k: v for k, v in TINY_IMAGES.items() if k not in LABELS}, 'hidden_size': 24}
# Towers of images, and of text beside them.
TOWER = {k: v for k, v in TINY_IMAGES.items() if k not in LABELS}
TOWERS = {
  'vision_config': TOWER,
  'text_config': {k: v for k, v in TINY.items() if k not in LABELS}
  | {'bos_token_id': 1, 'eos_token_id': 2},
}
STAGED = {'depths': [2, 2], 'patch_size': 4, 'image_size': 20}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 100.0,
  'factor': 4.0,
  'beta_fast': 4.0,
  'beta_slow': 1.0,
  'original_max_position_embeddings': 16,
}

MODELS = {
  'vit': ('ViTForImageClassification', transformers.ViTConfig(**IMAGES)),
  'deit': ('DeiTForImageClassificationWithTeacher', transformers.DeiTConfig(**IMAGES)),
  'dinov2': (
    'Dinov2ForImageClassification',
    transformers.Dinov2Config(
      **{k: v for k, v in IMAGES.items() if k != 'intermediate_size'}, mlp_ratio=2
    ),
  ),
  'bert': ('BertForSequenceClassification', transformers.BertConfig(**TEXT)),
  'roberta': (
    'RobertaForSequenceClassification',
    transformers.RobertaConfig(**TEXT, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5),
  ),
  't5': ('T5ForConditionalGeneration', transformers.T5Config(**T5)),
  't5_gated': (
    'T5ForConditionalGeneration',
    transformers.T5Config(**T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False),
  ),
  'llama': (
    'LlamaForCausalLM',
    transformers.LlamaConfig(
      **CAUSAL,
      rope_parameters=LLAMA3,
      tie_word_embeddings=False,
      attention_bias=True,
      mlp_bias=True,
    ),
  ),
  'mistral': ('MistralForCausalLM', transformers.MistralConfig(**CAUSAL, sliding_window=5)),
  'qwen2': (
    'Qwen2ForCausalLM',
    transformers.Qwen2Config(
      **CAUSAL,
      rope_parameters={'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 2.0},
      tie_word_embeddings=True,
    ),
  ),
  'qwen3': ('Qwen3ForCausalLM', transformers.Qwen3Config(**CAUSAL, tie_word_embeddings=True)),
  # Heads.
  'bert_tokens': ('BertForTokenClassification', transformers.BertConfig(**TINY)),
  'bert_questions': (
    'BertForQuestionAnswering',
    transformers.BertConfig(**{k: v for k, v in TINY.items() if k not in LABELS}),
  ),
  'bert_masked': ('BertForMaskedLM', transformers.BertConfig(**TINY, hidden_act='relu')),
  'roberta_masked': ('RobertaForMaskedLM', transformers.RobertaConfig(**TINY_ROBERTA)),
  'llama_labels': ('LlamaForSequenceClassification', transformers.LlamaConfig(**TINY_CAUSAL)),
  'qwen2_tokens': ('Qwen2ForTokenClassification', transformers.Qwen2Config(**TINY_CAUSAL)),
  'qwen3_questions': (
    'Qwen3ForQuestionAnswering',
    transformers.Qwen3Config(**{k: v for k, v in TINY_CAUSAL.items() if k not in LABELS}),
  ),
  't5_encoder': ('T5EncoderModel', transformers.T5Config(**TINY_T5)),
  't5_tokens': ('T5ForTokenClassification', transformers.T5Config(**TINY_T5)),
  # Kin.
  'xlm_roberta': (
    'XLMRobertaForSequenceClassification',
    transformers.XLMRobertaConfig(**TINY_ROBERTA),
  ),
  'camembert': (
    'CamembertForTokenClassification',
    transformers.CamembertConfig(**TINY_ROBERTA),
  ),
  'distilbert': (
    'DistilBertForSequenceClassification',
    transformers.DistilBertConfig(**TINY_DISTILBERT),
  ),
  'distilbert_masked': ('DistilBertForMaskedLM', transformers.DistilBertConfig(**TINY_DISTILBERT)),
  'electra': (
    'ElectraForSequenceClassification',
    transformers.ElectraConfig(**TINY, embedding_size=8),
  ),
  'electra_masked': ('ElectraForMaskedLM', transformers.ElectraConfig(**TINY, embedding_size=8)),
  'mpnet': ('MPNetForSequenceClassification', transformers.MPNetConfig(**TINY, pad_token_id=1)),
  'mt5': (
    'MT5ForConditionalGeneration',
    transformers.MT5Config(**TINY_T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False),
  ),
  'dinov2_registers': (
    'Dinov2WithRegistersForImageClassification',
    transformers.Dinov2WithRegistersConfig(
      **{k: v for k, v in TINY_IMAGES.items() if k != 'intermediate_size'},
      mlp_ratio=2,
      num_register_tokens=3,
    ),
  ),
  'vit_mae': (
    'ViTMAEModel',
    transformers.ViTMAEConfig(**TINY_IMAGES, mask_ratio=0.0),
  ),
  'llama_yarn': (
    'LlamaForCausalLM',
    transformers.LlamaConfig(**{**TINY_CAUSAL, 'head_dim': 12}, rope_parameters=YARN),
  ),
  # A position bias of each block and none of the tokens, as published for labels.
  'beit': (
    'BeitForImageClassification',
    transformers.BeitConfig(**TINY_IMAGES, use_relative_position_bias=True),
  ),
  # A shared one, as published for masked images, with all that is optional.
  'beit_shared': (
    'BeitForImageClassification',
    transformers.BeitConfig(
      **TINY_IMAGES,
      use_shared_relative_position_bias=True,
      use_absolute_position_embeddings=True,
      use_mask_token=True,
      use_mean_pooling=False,
      layer_scale_init_value=0.0,
    ),
  ),
  'dinov3': (
    'DINOv3ViTModel',
    transformers.DINOv3ViTConfig(**DINOV3, num_register_tokens=3),
  ),
  'dinov3_gated': (
    'DINOv3ViTModel',
    transformers.DINOv3ViTConfig(
      **DINOV3,
      use_gated_mlp=True,
      hidden_act='silu',
      num_register_tokens=1,
      key_bias=True,
      query_bias=False,
      proj_bias=False,
      mlp_bias=False,
      rope_theta=10.0,
    ),
  ),
  # Both towers, of which that of images is read; and those with labels.
  'clip': ('CLIPModel', transformers.CLIPConfig(**TOWERS, projection_dim=8)),
  'clip_labels': ('CLIPForImageClassification', transformers.CLIPConfig(**TOWERS, **LABELS)),
  'siglip': ('SiglipVisionModel', transformers.SiglipVisionConfig(**TOWER)),
  'siglip_labels': ('SiglipForImageClassification', transformers.SiglipConfig(**TOWERS, **LABELS)),
  # The first stage has shifted windows, and rows and columns that fill its last ones; the second
  # has a single window.
  'swin': (
    'SwinForImageClassification',
    transformers.SwinConfig(
      **LABELS,
      **STAGED,
      embed_dim=8,
      num_heads=[2, 4],
      window_size=3,
      mlp_ratio=2.0,
      use_absolute_embeddings=True,
    ),
  ),
  'convnext': (
    'ConvNextForImageClassification',
    transformers.ConvNextConfig(**LABELS, **STAGED, num_stages=2, hidden_sizes=[6, 10]),
  ),
  'convnextv2': (
    'ConvNextV2ForImageClassification',
    transformers.ConvNextV2Config(**LABELS, **STAGED, num_stages=2, hidden_sizes=[6, 10]),
  ),
  'gemma': ('GemmaForCausalLM', transformers.GemmaConfig(**CAUSAL)),
  'gemma3': (
    'Gemma3ForCausalLM',
    transformers.Gemma3TextConfig(
      **{**CAUSAL, 'num_hidden_layers': 3},
      query_pre_attn_scalar=9,
      sliding_window=5,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      rope_parameters={
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1000.0},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
      },
    ),
  ),
  # Both caps bend what they cap: logits are of that order here.
  'gemma2': (
    'Gemma2ForCausalLM',
    transformers.Gemma2Config(
      **{**TINY_CAUSAL, 'num_hidden_layers': 3},
      query_pre_attn_scalar=9,
      sliding_window=5,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  # Half of a head turns.
  'phi3': (
    'Phi3ForCausalLM',
    transformers.Phi3Config(
      **PHI3,
      sliding_window=5,
      rope_parameters={
        'rope_type': 'default',
        'rope_theta': 100.0,
        'partial_rotary_factor': 0.5,
      },
    ),
  ),
  # Rows are longer than the original context.
  'phi3_longrope': (
    'Phi3ForCausalLM',
    transformers.Phi3Config(
      **PHI3,
      original_max_position_embeddings=16,
      tie_word_embeddings=True,
      rope_parameters={
        'rope_type': 'longrope',
        'rope_theta': 100.0,
        'short_factor': [1.0, 1.1, 1.2, 1.4],
        'long_factor': [1.5, 2.0, 3.0, 4.0],
      },
    ),
  ),
  'gpt2': ('GPT2LMHeadModel', transformers.GPT2Config(**TINY_GPT2)),
  'opt': ('OPTForCausalLM', transformers.OPTConfig(**TINY_OPT)),
  # As that of 350M parameters: norms behind the branches, a narrow word table.
  'opt_350m': (
    'OPTForCausalLM',
    transformers.OPTConfig(**TINY_OPT, do_layer_norm_before=False, word_embed_proj_dim=8),
  ),
  'mixtral': (
    'MixtralForCausalLM',
    transformers.MixtralConfig(**TINY_CAUSAL, num_local_experts=4, num_experts_per_tok=2),
  ),
  'qwen2_moe': (
    'Qwen2MoeForCausalLM',
    transformers.Qwen2MoeConfig(**TINY_EXPERTS, shared_expert_intermediate_size=10),
  ),
  # One of its blocks has a single MLP.
  'qwen3_moe': (
    'Qwen3MoeForCausalLM',
    transformers.Qwen3MoeConfig(
      **{**TINY_EXPERTS, 'num_hidden_layers': 3}, norm_topk_prob=True, mlp_only_layers=[1]
    ),
  ),
  # Both with a block that sees all, one that sees a window, and no other.
  'modernbert': (
    'ModernBertForSequenceClassification',
    transformers.ModernBertConfig(**TINY_MODERNBERT, classifier_pooling='mean'),
  ),
  'modernbert_masked': ('ModernBertForMaskedLM', transformers.ModernBertConfig(**TINY_MODERNBERT)),
  # As version 3 is published; distances from 2 on share buckets.
  'deberta': ('DebertaV2ForSequenceClassification', transformers.DebertaV2Config(**TINY_DEBERTA)),
}

RESIZED = (
  *('vit', 'dinov2', 'beit', 'beit_shared', 'dinov3', 'dinov3_gated'),
  *('clip', 'siglip', 'swin'),
)
INTERPOLATED = ('vit', 'clip', 'siglip', 'swin')  # on request


def perturbed(kind, config):
  model = getattr(transformers, kind)(config)
  gated = getattr(config, 'feed_forward_proj', None) == 'gated-gelu'
  if gated and kind.endswith('ForConditionalGeneration'):
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape)
  return model


def inputs(kind, config):
  """Our inputs by name; images are channels last."""
  rng = np.random.default_rng(0)
  if hasattr(config, 'patch_size') or hasattr(config, 'vision_config'):
    size = getattr(config, 'image_size', 28)
    return {'images': rng.normal(size=(2, size, size, 3)).astype('float32')}
  tokens = rng.integers(3, config.vocab_size, (3, 18))
  mask = np.arange(18) < np.array([[18], [11], [6]])
  tokens = np.where(mask, tokens, 1 if config.pad_token_id == 1 else 0)
  if config.model_type in ('t5', 'mt5'):
    if 'ForConditionalGeneration' not in kind:
      return {'tokens': tokens, 'mask': mask}
    words = rng.integers(3, config.vocab_size, (3, 16))
    return {'tokens': tokens, 'mask': mask, 'decoder_tokens': words}
  if kind == 'LlamaForSequenceClassification':
    tokens[2] = tokens[2, ::-1]  # transformers finds the last token by the padding before it
  if config.model_type in ('distilbert', 'mpnet', 'modernbert', 'deberta-v2'):
    return {'tokens': tokens, 'mask': mask}
  if not hasattr(config, 'type_vocab_size'):
    return {
      'tokens': tokens,
      'mask': np.stack([mask[0], mask[1], mask[2, ::-1]]),
    }  # padded on both sides
  types = rng.integers(0, config.type_vocab_size, (3, 18))
  return {'tokens': tokens, 'mask': mask, 'types': types}


def logits(model, given, **options):
  names = {
    'images': 'pixel_values',
    'tokens': 'input_ids',
    'mask': 'attention_mask',
    'types': 'token_type_ids',
    'decoder_tokens': 'decoder_input_ids',
  }
  given = {
    names[k]: torch.tensor(v.transpose(0, 3, 1, 2) if k == 'images' else v.astype('int64'))
    for k, v in given.items()
  }
  if model.config.model_type == 'gpt2':  # else it counts padding too
    options['position_ids'] = (given['attention_mask'].cumsum(-1) - 1).clip(0)
  if model.config.model_type == 'vit_mae':
    options['noise'] = torch.arange(16.0).tile(2, 1)  # so that the patches keep their order
  if type(model).__name__ == 'CLIPModel':
    model = model.vision_model
  with torch.no_grad():
    out = model(**given, **options)
  if type(model).__name__ in ('CLIPVisionModel', 'SiglipVisionModel'):
    return out.pooler_output.numpy()
  if 'start_logits' in out:
    return torch.stack([out.start_logits, out.end_logits], -1).numpy()
  return out.get('logits', out.get('last_hidden_state')).numpy()


def main(wanted: list[str]):
  for seed, (name, (kind, config)) in enumerate(MODELS.items()):
    if wanted and name not in wanted:
      continue
    torch.manual_seed(seed)
    folder = GOLDEN / name
    perturbed(kind, config).save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    given = inputs(kind, config)
    arrays = {**given, 'logits': logits(model, given)}
    of_tokens = 'num_key_value_heads' in config.to_dict()
    of_tokens |= config.model_type in ('gpt2', 'opt') or name == 'modernbert_masked'
    if of_tokens and arrays['logits'].ndim == 3:
      arrays['logits'] *= given['mask'][..., None]  # what follows padding is nobody's business
    if name in RESIZED:
      size = 28 if name == 'swin' else 42
      large = np.random.default_rng(1).normal(size=(1, size, size, 3)).astype('float32')
      options = {'interpolate_pos_encoding': True} if name in INTERPOLATED else {}
      # Opened anew, since a Swin keeps the windows of the first images that it is called with.
      model = getattr(transformers, kind).from_pretrained(folder).eval()
      arrays |= {'large_images': large, 'large_logits': logits(model, {'images': large}, **options)}
    np.savez_compressed(folder / 'golden.npz', **arrays)


if __name__ == '__main__':
  main(sys.argv[1:])
