"""The naming scheme of ViT and its kin."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

VIT_NAMING = Anatomy(
  'vit',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'patch': r'embed/patch',
    'encoder': r'encoder',
    'final_norm': r'final_norm',
    'norm': rf'{ROLES["norm"]}|pool_norm',
    'position_bias': rf'(?:encoder|{BLOCK})/position_bias',
  },
  lead=1,
)
