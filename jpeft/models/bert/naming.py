"""The naming scheme of BERT, RoBERTa and MiniLM."""

from jpeft.core import Anatomy

from ..roles import BLOCK, ROLES

BERT_NAMING = Anatomy(
  'bert',
  {
    **ROLES,
    'embed': r'embed',
    'encoder': r'encoder',
    'pooler': r'pooler',
    'word': r'embed/word',
    'block_end': rf'{BLOCK}/norm2',
  },
  lead=1,
  exit='encoder',
)
