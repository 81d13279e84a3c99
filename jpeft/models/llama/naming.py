"""The naming scheme of Llama, Mistral, SmolLM2, Qwen2, Qwen3 and Gemma."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

LLAMA_NAMING = Anatomy(
  'llama',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'encoder': r'decoder',
    'stack': r'decoder',
    'encoder_block': r'decoder/(?:block_\d+|blocks)',
    'norm': rf'{BLOCK}/(?:branch_)?norm[12]',
    'final_norm': r'final_norm',
  },
  causal=True,
)
