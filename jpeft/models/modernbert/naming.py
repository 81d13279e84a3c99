"""The naming scheme of ModernBERT."""

from jpeft.core import Anatomy

from ..roles import BLOCK, PRE_NORM_ROLES, ROLES

MODERNBERT_NAMING = Anatomy(
  'modernbert',
  {
    **ROLES,
    **PRE_NORM_ROLES,
    'embed': r'embed',
    'encoder': r'encoder',
    'pooler': r'head_dense',
    'word': r'embed/word',
    'final_norm': r'final_norm',
    # With it a BERT, whose other parts have the same names, fits less well.
    'gate': rf'{BLOCK}/mlp/gate',
  },
  lead=1,
  exit='final_norm',
)
