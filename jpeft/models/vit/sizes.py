"""The sizes of ViT and its kin, for narrowing."""

from collections.abc import Mapping

from ..nn import by_block, image_example
from ..sizes import Sized, Sizes, common, head_dim_with, read_heads
from .model import ViT
from .naming import VIT_NAMING


def _sizes(model: ViT) -> dict[str, Sizes]:
  heads = by_block('heads', model.heads, model.depth)
  mlp_dim = by_block('mlp_dim', model.mlp_dim, model.depth)
  bias_heads = None
  if model.position_bias == 'shared':
    bias_heads = model.bias_heads or tuple(tuple(range(count)) for count in heads)
  return {'encoder': Sizes(heads, mlp_dim, bias_heads=bias_heads)}


def _resized(model: ViT, sizes: Mapping[str, Sizes], vocab: int | None) -> ViT:
  del vocab  # it has none
  stack = sizes['encoder']
  heads = common(stack.heads)
  return model.clone(
    depth=len(stack.heads),
    heads=heads,
    head_dim=head_dim_with(model, heads),
    mlp_dim=common(stack.mlp_dim),
    bias_heads=read_heads(stack),
  )


VIT_SIZES = Sized(ViT, VIT_NAMING, _sizes, _resized, image_example)
