"""What make_golden.py made, read back, and how to compare with it."""

from pathlib import Path

import jax
import numpy as np

from jpeft import models

GOLDEN = Path(__file__).parent / 'golden'
CAUSAL = ('llama', 'mistral', 'qwen2', 'qwen3')
MODERNBERT = ('modernbert', 'modernbert_masked')
EXPERTS = ('mixtral', 'qwen2_moe', 'qwen3_moe')
NAMES = ('vit', 'deit', 'dinov2', 'bert', 'roberta', 't5', 't5_gated', *CAUSAL)
# Smaller ones: heads, and families near those above.
HEADS = (
  'bert_tokens',
  'bert_questions',
  'bert_masked',
  'roberta_masked',
  'distilbert_masked',
  'electra_masked',
  'llama_labels',
  'qwen2_tokens',
  'qwen3_questions',
  't5_encoder',
  't5_tokens',
)
KIN = (
  'xlm_roberta',
  'camembert',
  'distilbert',
  'electra',
  'mpnet',
  'deberta',
  'mt5',
  'dinov2_registers',
  'vit_mae',
  'beit',
  'beit_shared',
  'dinov3',
  'dinov3_gated',
  'llama_yarn',
  'clip',
  'clip_labels',
  'siglip',
  'siglip_labels',
  'swin',
  'convnext',
  'convnextv2',
  'gemma',
  'gemma3',
  'gemma2',
  'phi3',
  'phi3_longrope',
  'gpt2',
  'opt',
  'opt_350m',
  *EXPERTS,
  *MODERNBERT,
)
UNSCANNED = ('swin', 'gemma3', 'gemma2', 'qwen3_moe', *MODERNBERT)  # whose blocks differ
INPUTS = ('images', 'tokens', 'decoder_tokens', 'mask', 'types')
# What transformers calls them.
THEIRS = {
  'images': 'pixel_values',
  'tokens': 'input_ids',
  'mask': 'attention_mask',
  'types': 'token_type_ids',
  'decoder_tokens': 'decoder_input_ids',
}


def golden(name):
  """(keyword inputs of the model, all arrays)."""
  arrays = dict(np.load(GOLDEN / name / 'golden.npz'))
  return {key: arrays[key] for key in INPUTS if key in arrays}, arrays


def outputs(loaded, inputs, **kwargs):
  """What a model returns; zero at padding where nothing is promised there."""
  out = np.asarray(
    jax.jit(lambda v, x: loaded.model.apply(v, **x, **kwargs))(loaded.variables, inputs)
  )
  nobodys = (models.ModernBert, models.Deberta)  # at padding
  decodes = models.is_decoder(loaded.model) or isinstance(loaded.model, nobodys)
  decodes = decodes and out.ndim == 3
  return out * inputs['mask'][..., None] if decodes else out


def close(got, want, tolerance=2e-6):
  assert got.shape == want.shape and np.abs(want).max() > 0.1
  np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), atol=tolerance)
