"""BERT, RoBERTa and MiniLM."""

from typing import TYPE_CHECKING

from jpeft.lazy import on_first_use

if TYPE_CHECKING:
  from .files import BERT_FAMILIES
  from .model import Bert

__all__ = ['BERT_FAMILIES', 'Bert']

__getattr__ = on_first_use(__name__, {'.files': ('BERT_FAMILIES',), '.model': ('Bert',)})
