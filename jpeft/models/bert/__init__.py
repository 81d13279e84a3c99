"""BERT, RoBERTa and MiniLM."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import BERT_FAMILIES
  from .model import Bert
  from .sizes import BERT_SIZES

__all__ = ['BERT_FAMILIES', 'BERT_SIZES', 'Bert']

__getattr__ = on_first_use(
  __name__, {'.files': ('BERT_FAMILIES',), '.model': ('Bert',), '.sizes': ('BERT_SIZES',)}
)


def __dir__() -> list[str]:
  return __all__
