"""The naming scheme of Llama, Mistral, SmolLM2, Qwen2, Qwen3 and Gemma."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

# An MLP, or the experts in its place and the one that sees every token.
_MLP = rf'{BLOCK}/mlp/(?:experts/|shared/)?'

LLAMA_NAMING = Anatomy(
  'llama',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'fc1': rf'{_MLP}(?:fc1|gate)',
    'fc2': rf'{_MLP}fc2',
    'linear': rf'{BLOCK}/attention/(?:query|key|value|out)|{_MLP}(?:fc1|gate|fc2)',
    'embed': r'embed',
    'encoder': r'decoder',
    'stack': r'decoder',
    'encoder_block': r'decoder/(?:block_\d+|blocks)',
    'norm': rf'{BLOCK}/(?:branch_)?norm[12]',
    'final_norm': r'final_norm',
  },
  causal=True,
)
