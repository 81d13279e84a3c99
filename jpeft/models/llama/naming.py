"""The naming scheme of Llama, Mistral, SmolLM2, Qwen2 and Qwen3."""

from jpeft.core import Anatomy

from ..roles import PRE_NORM_ROLES, ROLES

LLAMA_NAMING = Anatomy(
  'llama',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'encoder': r'decoder',
    'stack': r'decoder',
    'encoder_block': r'decoder/(?:block_\d+|blocks)',
    'final_norm': r'final_norm',
  },
  causal=True,
)
