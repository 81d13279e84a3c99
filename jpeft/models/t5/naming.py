"""The naming scheme of T5."""

from jpeft.core import Anatomy

from ..roles import PRE_NORM_ROLES, ROLES

T5_NAMING = Anatomy(
  't5',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'encoder': r'encoder',
    'decoder': r'decoder',
    'final_norm': r'(?:en|de)coder/final_norm',
    'encoder_norm': r'encoder/final_norm',
    'decoder_norm': r'decoder/final_norm',
    'position_bias': r'(?:en|de)coder/position_bias',
  },
  side={'bias': 'position_bias', 'context': 'context'},
)
