"""The naming schemes of ViT and its kin."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

_ROLES = {
  **ROLES,
  **PRE_NORM_ROLES,
  'encoder': r'encoder',
  'final_norm': r'final_norm',
  'norm': rf'{ROLES["norm"]}|first_norm|pool_norm|attention_pool/norm',
  'position_bias': rf'(?:encoder|{BLOCK})/position_bias',
}
VIT_NAMING = Anatomy('vit', {**_ROLES, 'embed': r'embed', 'patch': r'embed/patch'}, lead=1)
# Without a class token: no token stands before the patches.
PATCHES_NAMING = Anatomy('vit_patches', {**_ROLES, 'embed': r'patches', 'patch': r'patches/patch'})
