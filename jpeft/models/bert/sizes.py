"""The sizes of BERT and its kin, for narrowing."""

from collections.abc import Mapping

from ..nn import by_block
from ..sizes import Sized, Sizes, common, head_dim_with
from .files import example
from .model import Bert
from .naming import BERT_NAMING


def _sizes(model: Bert) -> dict[str, Sizes]:
  heads = by_block('heads', model.heads, model.depth)
  mlp_dim = by_block('mlp_dim', model.mlp_dim, model.depth)
  return {'encoder': Sizes(heads, mlp_dim)}


def _resized(model: Bert, sizes: Mapping[str, Sizes], vocab: int | None) -> Bert:
  stack = sizes['encoder']
  heads = common(stack.heads)
  if model.bias_buckets is not None and heads != model.heads:
    raise ValueError(
      'heads: the blocks of an MPNet share a position bias, from which no heads are cut; cut '
      'layers, hidden units or words'
    )
  return model.clone(
    depth=len(stack.heads),
    heads=heads,
    head_dim=head_dim_with(model, heads),
    mlp_dim=common(stack.mlp_dim),
    vocab=vocab or model.vocab,
  )


def _words(model: Bert) -> tuple[str, ...]:
  if model.head == 'masked':
    return ('embed/word', 'head')
  return ('embed/word',)


BERT_SIZES = Sized(Bert, BERT_NAMING, _sizes, _resized, example, _words)
