"""The sizes of Llama, Mistral, SmolLM2, Qwen2 and Qwen3, for narrowing."""

from collections.abc import Mapping

from ..nn import by_block
from ..sizes import Sized, Sizes, common, head_dim_with
from .files import example
from .model import Llama
from .naming import LLAMA_NAMING


def _sizes(model: Llama) -> dict[str, Sizes]:
  kv_heads = by_block('kv_heads', model.kv_heads or model.heads, model.depth)
  mlp_dim = by_block('mlp_dim', model.mlp_dim, model.depth)
  return {'decoder': Sizes(kv_heads, mlp_dim)}


def _resized(model: Llama, sizes: Mapping[str, Sizes], vocab: int | None) -> Llama:
  stack = sizes['decoder']
  group = _group(model)
  widths = by_block('mlp_dim', model.mlp_dim, model.depth)
  if model.experts is not None and not set(stack.mlp_dim) <= set(widths):
    raise ValueError('mlp: hidden units of experts are not cut; cut layers, heads or words')
  heads = common(tuple(kv_heads * group for kv_heads in stack.heads))
  kv_heads = None
  if model.kv_heads is not None:
    kv_heads = common(stack.heads)
  return model.clone(
    depth=len(stack.heads),
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim_with(model, heads),
    mlp_dim=common(stack.mlp_dim),
    vocab=vocab or model.vocab,
  )


def _group(model: Llama) -> int:
  """How many query heads read a key head; the same in all blocks.

  Raises:
    ValueError: it is not.
  """
  heads = by_block('heads', model.heads, model.depth)
  kv_heads = by_block('kv_heads', model.kv_heads or model.heads, model.depth)
  groups = {h // j for h, j in zip(heads, kv_heads, strict=True)}
  if len(groups) > 1:
    raise ValueError(
      f'heads={model.heads} and kv_heads={model.kv_heads}: groups of query heads of several sizes '
      'cannot be narrowed'
    )
  return groups.pop()


def _words(model: Llama) -> tuple[str, ...]:
  return ('embed', 'head') if model.head == 'text' else ('embed',)


LLAMA_SIZES = Sized(Llama, LLAMA_NAMING, _sizes, _resized, example, _words)
