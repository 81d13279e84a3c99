"""The sizes of GPT-2 and OPT, for narrowing."""

from collections.abc import Mapping

from ..nn import by_block
from ..sizes import Sized, Sizes, common, head_dim_with
from .files import example
from .model import Gpt
from .naming import GPT_NAMING


def _sizes(model: Gpt) -> dict[str, Sizes]:
  heads = by_block('heads', model.heads, model.depth)
  mlp_dim = by_block('mlp_dim', model.mlp_dim, model.depth)
  return {'decoder': Sizes(heads, mlp_dim)}


def _resized(model: Gpt, sizes: Mapping[str, Sizes], vocab: int | None) -> Gpt:
  stack = sizes['decoder']
  heads = common(stack.heads)
  return model.clone(
    depth=len(stack.heads),
    heads=heads,
    head_dim=head_dim_with(model, heads),
    mlp_dim=common(stack.mlp_dim),
    vocab=vocab or model.vocab,
  )


def _words(model: Gpt) -> tuple[str, ...]:
  return ('embed', 'head') if model.head == 'text' else ('embed',)


# The roles that narrowing reads are those of both naming schemes.
GPT_SIZES = Sized(Gpt, GPT_NAMING, _sizes, _resized, example, _words)
