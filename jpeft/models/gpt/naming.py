"""The naming schemes of GPT-2 and OPT."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

_ROLES = {
  **ROLES,
  'embed': r'embed',
  'position': r'position',
  'encoder': r'decoder',
  'stack': r'decoder',
  'encoder_block': r'decoder/(?:block_\d+|blocks)',
}
GPT_NAMING = Anatomy('gpt', {**_ROLES, **PRE_NORM_ROLES, 'final_norm': r'final_norm'}, causal=True)
# Of the OPT of 350M parameters, whose blocks end with a norm.
POST_NORM_GPT_NAMING = Anatomy(
  'gpt_post_norm',
  {**_ROLES, 'block_end': rf'{BLOCK}/norm2', 'project': r'project_(?:in|out)'},
  causal=True,
  exit='encoder',
)
