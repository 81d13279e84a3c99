"""BERT, RoBERTa and MiniLM."""

from typing import TYPE_CHECKING

from ..lazy import on_first_use

if TYPE_CHECKING:
  from .files import BERT_FAMILIES
  from .model import Bert

__all__ = ['BERT_FAMILIES', 'Bert']

__getattr__ = on_first_use(__name__, {'BERT_FAMILIES': '.files', 'Bert': '.model'})
