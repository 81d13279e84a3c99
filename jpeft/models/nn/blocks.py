"""Pre-norm and post-norm transformer blocks, and the stack that runs them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from .layers import MLP, Attention, Block, LayerScale, layer_norm
from .positions import bias_of_heads
from .recompute import Remat, rematted
from .rope import GridRope
from .windows import Windows

# Makes a module: of a block, block(name=...). Blocks of several sizes have a maker each.
Maker = Callable[..., nn.Module]


def _branches(block, attention_fields=None, mlp_fields=None):
  """(attention, MLP, dropout) of a block, with the sizes and rates of its fields."""
  types = {'dtype': block.dtype, 'param_dtype': block.param_dtype}
  attention = Attention(
    block.heads,
    block.head_dim,
    dropout=block.attention_dropout,
    attention_fn=block.attention_fn,
    name='attention',
    **(attention_fields or {}),
    **types,
  )
  mlp = MLP(block.mlp_dim, block.activation, name='mlp', **(mlp_fields or {}), **types)
  return attention, mlp, nn.Dropout(block.dropout, name='dropout')


class PreNormBlock(Block):
  """x + attention(norm(x)), then x + mlp(norm(x)): ViT (arXiv:2010.11929).

  Attributes:
    qkv_bias: whether query, key and value have a bias; three of them where they differ.
    out_bias: whether the output projection of attention has a bias.
    mlp_bias: whether the layers of the MLP have biases.
    gated: whether the MLP has a gate.
    layer_scale: initial value of a LayerScale at the end of each branch; None for none.
    rope: rotary positions of queries and keys; None for none.
    position_bias: makes a position bias of this block's own: position_bias(heads, name=...); None
      for none.
    bias_heads: for each head the head that it reads of a bias that the block is called with; None
      for all in their order.
    windows: cut the tokens into windows, within which they attend to each other; None for all to
      all. The block then takes neither mask nor bias.
  """

  qkv_bias: bool | tuple[bool, bool, bool] = True
  out_bias: bool = True
  mlp_bias: bool = True
  gated: bool = False
  layer_scale: float | None = None
  rope: GridRope | None = None
  position_bias: Maker | None = None
  bias_heads: tuple[int, ...] | None = None
  windows: Windows | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    attention, mlp, dropout = _branches(
      self,
      {'qkv_bias': self.qkv_bias, 'out_bias': self.out_bias, 'rope': self.rope},
      {'use_bias': self.mlp_bias, 'gated': self.gated},
    )
    if bias is not None:
      bias = bias_of_heads(bias, self.heads, self.bias_heads)
    y = layer_norm(self, 'norm1')(x)
    if self.windows is not None:
      y = self.windows.split(y)  # [B W, S S, D]
      mask = self.windows.mask(len(x))
    if self.position_bias is not None:
      own = self.position_bias(self.heads, name='position_bias')(y.shape[-2])
      bias = own if bias is None else bias + own

    def scale(name, y):
      if self.layer_scale is None:
        return y
      return LayerScale(self.layer_scale, self.dtype, self.param_dtype, name=name)(y)

    y = attention(y, mask=mask, bias=bias, deterministic=deterministic)
    if self.windows is not None:
      y = self.windows.join(y)
    x = x + scale('scale1', dropout(y, deterministic=deterministic))
    y = mlp(layer_norm(self, 'norm2')(x), deterministic=deterministic)
    return x + scale('scale2', dropout(y, deterministic=deterministic))


class PostNormBlock(Block):
  """norm(x + attention(x)), then norm(x + mlp(x)): BERT (arXiv:1810.04805)."""

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    attention, mlp, dropout = _branches(self)
    y = attention(x, mask=mask, bias=bias, deterministic=deterministic)
    x = layer_norm(self, 'norm1')(x + dropout(y, deterministic=deterministic))
    y = mlp(x, deterministic=deterministic)
    return layer_norm(self, 'norm2')(x + dropout(y, deterministic=deterministic))


def run_blocks(
  block: Maker | tuple[Maker, ...],
  depth: int,
  x,
  *,
  scan: bool = False,
  remat: Remat = False,
  **inputs,
):
  """Runs blocks that become children of the calling compact module.

  Unrolled, they are block_0 .. block_{depth-1}, each compiled. Scanned, they are one child
  `blocks`, compiled once, whose parameters have the layers as their first axis.

  Args:
    block: makes a block: block(name=...); of blocks of several sizes one maker each.
    depth: number of blocks.
    x: the input of the first block, [B, N, D].
    scan: whether to use nn.scan.
    remat: whether to recompute each block's inside in the backward pass (nn.remat). True stores
      only a block's input and costs another forward pass. 'dots' also stores its products with
      weights, and costs the elementwise operations and the attention's own products: a few
      percent. 'packed' stores a block's input in 8 bits a value, 'packed4' in 4: blocks run again
      from what is stored, so gradients have its rounding. Without remat a scan stores everything
      that the backward pass reads: two to three times as much as XLA stores of unrolled layers,
      where it recomputes cheap operations itself.
    **inputs: keyword arguments of every block.

  Returns:
    The output of the last block, [B, N, D].

  Raises:
    ValueError: `remat` is none of REMATS; or blocks of several sizes are to be scanned.
  """
  if scan and isinstance(block, tuple):
    raise ValueError(
      'scan=True runs one program for all blocks, and these differ in their sizes or windows: use '
      'scan=False'
    )
  # Lambdas, so that interceptors can tell these calls from those of the blocks by their name.
  run = rematted(lambda block, x: block(x, **inputs), remat, scan)
  if not scan:
    for i in range(depth):
      make = block[i] if isinstance(block, tuple) else block
      x = run(make(name=f'block_{i}'), x)
    return x
  # Each layer has its own slice of the stacked arrays, and its own random keys.
  scanned = nn.scan(
    lambda block, x, _: (run(block, x), None),
    length=depth,
    variable_axes={'params': 0, 'intermediates': 0, 'cache': 0},
    split_rngs={'params': True, 'dropout': True},
  )
  x, _ = scanned(block(name='blocks'), x, None)
  return x


class Encoder(nn.Module):
  """A stack of blocks, unrolled or scanned; see `run_blocks`.

  Attributes:
    block: makes a block.
    depth: number of blocks.
    scan: run the blocks by nn.scan.
    remat: recompute blocks in the backward pass.
    position_bias: makes a position bias that all blocks share: position_bias(name=...); None for
      none.
  """

  block: Maker | tuple[Maker, ...]
  depth: int
  scan: bool = False
  remat: Remat = False
  position_bias: Maker | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    if self.position_bias is not None:
      shared = self.position_bias(name='position_bias')(x.shape[-2])  # [1, H, N, N]
      bias = shared if bias is None else bias + shared
    return run_blocks(
      self.block,
      self.depth,
      x,
      scan=self.scan,
      remat=self.remat,
      mask=mask,
      bias=bias,
      deterministic=deterministic,
    )


class Stages(nn.Module):
  """Stages of blocks, one after the other: stage_0, stage_1, ...

  Attributes:
    stages: makers of the stages.
  """

  stages: tuple[Maker, ...]

  @nn.compact
  def __call__(self, x, deterministic=True):
    for i, stage in enumerate(self.stages):
      x = stage(name=f'stage_{i}')(x, deterministic=deterministic)
    return x


_SHARED = (
  'heads',
  'mlp_dim',
  'eps',
  'activation',
  'dropout',
  'attention_dropout',
  'attention_fn',
  'dtype',
  'param_dtype',
)


# The fields that may be a tuple, with one value a block.
_BY_BLOCK = (
  'heads',
  'kv_heads',
  'cross_heads',
  'bias_heads',
  'mlp_dim',
  'window',
  'experts',
  'first',
)


def block_of(
  model, kind: type[Block], depth: int | None = None, **fields
) -> Maker | tuple[Maker, ...]:
  """A maker of blocks, for `run_blocks`; of blocks that differ in their sizes one each.

  Args:
    model: has the fields that it shares with its blocks, and width; head_dim may be left out.
    kind: class of the blocks.
    depth: number of blocks; the model's depth if left out.
    **fields: of the blocks alone, or in place of the model's.

  Raises:
    ValueError: a size has not one value a block, or nothing says how large a head is.
  """
  shared = {name: getattr(model, name) for name in _SHARED}
  fields = {**shared, 'head_dim': head_dim_of(model), **fields}
  if depth is None:
    depth = model.depth
  sizes = {}
  for name in _BY_BLOCK:
    if isinstance(fields.get(name), tuple):
      sizes[name] = by_block(name, fields[name], depth)
  by_layer = [{name: values[i] for name, values in sizes.items()} for i in range(depth)]
  makers = [functools.partial(kind, **{**fields, **own}) for own in by_layer]
  if all(own == by_layer[0] for own in by_layer[1:]):
    return makers[0]
  return tuple(makers)


def by_block(name: str, size: Any, depth: int) -> tuple[Any, ...]:
  """The values that a size has in each block; one that is no tuple is that of all blocks.

  Raises:
    ValueError: there are more values than blocks, or fewer.
  """
  if not isinstance(size, tuple):
    return (size,) * depth
  if len(size) != depth:
    raise ValueError(f'{name}={size} has {len(size)} values, one a block, and there are {depth}')
  return size


def shared_bias_heads(heads, bias_heads, depth: int) -> int:
  """The number of heads of a position bias that the blocks of a stack share.

  Args:
    heads: of the blocks.
    bias_heads: for each block the heads of the bias that its heads read; None for all in order.
    depth: number of blocks.

  Raises:
    ValueError: blocks have different numbers of heads, and nothing says which each of them reads.
  """
  if bias_heads is not None:
    return 1 + max(head for block in bias_heads for head in block)
  different = set(by_block('heads', heads, depth))
  if len(different) > 1:
    raise ValueError(
      f'blocks with heads={heads} share one position bias: bias_heads must say which of its heads '
      'each block reads'
    )
  return different.pop()


def head_dim_of(model) -> int:
  """The size of a head: the field head_dim, or width / heads.

  Raises:
    ValueError: it is left out, and blocks have different numbers of heads.
  """
  head_dim = getattr(model, 'head_dim', None)
  if head_dim is not None:
    return head_dim
  if isinstance(model.heads, tuple):
    raise ValueError(f'with heads={model.heads} head_dim must say how large a head is')
  return model.width // model.heads
