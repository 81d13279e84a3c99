"""The naming scheme of ViT, DeiT and DINOv2."""

from jpeft.core import Anatomy

from ..roles import PRE_NORM_ROLES, ROLES

VIT_NAMING = Anatomy(
  'vit',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'patch': r'embed/patch',
    'encoder': r'encoder',
    'final_norm': r'final_norm',
  },
  lead=1,
)
