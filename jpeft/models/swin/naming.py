"""The naming scheme of Swin."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

SWIN_NAMING = Anatomy(
  'swin',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'encoder_block': r'encoder/stage_\d+/block_\d+',
    'embed': r'embed',
    'patch': r'embed/patch',
    'encoder': r'encoder',
    'final_norm': r'final_norm',
    'norm': rf'{ROLES["norm"]}|embed/norm|encoder/stage_\d+/merge/norm',
    'position_bias': rf'{BLOCK}/position_bias',
    'merge': r'encoder/stage_\d+/merge',
  },
)
