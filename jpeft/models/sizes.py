"""What narrowing needs of a model family: the sizes of its blocks, read and changed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from jpeft.core import Anatomy

from .nn import head_dim_of


class Sizes(NamedTuple):
  """The sizes of the blocks of a stack, one value a block.

  Attributes:
    heads: key and value heads of self-attention.
    mlp_dim: hidden widths of the MLPs.
    cross_heads: heads of cross-attention; None without one.
    bias_heads: for each head the head that it reads of the position bias, which all blocks of the
      stack share; None without one.
  """

  heads: tuple[int, ...]
  mlp_dim: tuple[int, ...]
  cross_heads: tuple[int, ...] | None = None
  bias_heads: tuple[tuple[int, ...], ...] | None = None

  @property
  def alike(self) -> bool:
    """Whether all blocks are alike, so that a scan can run them."""
    return all(values is None or len(set(values)) == 1 for values in self)


class Sized(NamedTuple):
  """A family of models whose sizes can be changed.

  Attributes:
    kind: the class of the models.
    anatomy: the naming scheme.
    sizes: model -> {path of a stack of blocks: its sizes}.
    resized: (model, such sizes, number of words or None for no change) -> model of these sizes.
    example: model -> abstract inputs of one call.
    words: model -> paths of the modules with a row or a column for each word.
  """

  kind: type[nn.Module]
  anatomy: Anatomy
  sizes: Callable[[Any], dict[str, Sizes]]
  resized: Callable[[Any, Mapping[str, Sizes], int | None], Any]
  example: Callable[[Any], tuple]
  words: Callable[[Any], tuple[str, ...]] = lambda model: ()


def common(values: tuple) -> Any:
  """The value that all blocks have; the tuple of values if they differ."""
  if len(set(values)) == 1:
    return values[0]
  return values


def head_dim_with(model, heads: int | tuple[int, ...]) -> int | None:
  """The field head_dim of a model that gets other numbers of heads."""
  if heads == model.heads:
    return model.head_dim
  return head_dim_of(model)


def read_heads(sizes: Sizes) -> tuple[tuple[int, ...], ...] | None:
  """The field bias_heads of a model; None where nothing is shared, or every block reads all heads
  of the position bias in their order.
  """
  if sizes.bias_heads is None:
    return None
  columns = {head for heads in sizes.bias_heads for head in heads}
  if all(heads == tuple(range(len(columns))) for heads in sizes.bias_heads):
    return None
  return sizes.bias_heads
