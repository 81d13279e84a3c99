"""The naming schemes of this package's families, registered when it is imported."""

from jpeft.core import register_anatomy

from .bert.naming import BERT_NAMING
from .convnext.naming import CONVNEXT_NAMING
from .gpt.naming import GPT_NAMING, POST_NORM_GPT_NAMING
from .llama.naming import LLAMA_NAMING
from .modernbert.naming import MODERNBERT_NAMING
from .swin.naming import SWIN_NAMING
from .t5.naming import T5_NAMING
from .vit.naming import PATCHES_NAMING, VIT_NAMING

SCHEMES = (
  VIT_NAMING,
  PATCHES_NAMING,
  SWIN_NAMING,
  CONVNEXT_NAMING,
  BERT_NAMING,
  T5_NAMING,
  LLAMA_NAMING,
  GPT_NAMING,
  POST_NORM_GPT_NAMING,
  MODERNBERT_NAMING,
)

# Backwards, since the scheme that is registered last is the first among those that fit equally.
for scheme in reversed(SCHEMES):
  register_anatomy(scheme)
