"""Pre-norm and post-norm transformer blocks, and the stack that runs them."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax

from .layers import MLP, Attention, Block, LayerScale, layer_norm


def _branches(block, qkv_bias=True):
  """(attention, MLP, dropout) of a block, with the sizes and rates of its fields."""
  types = {'dtype': block.dtype, 'param_dtype': block.param_dtype}
  attention = Attention(
    block.heads,
    block.head_dim,
    qkv_bias=qkv_bias,
    dropout=block.attention_dropout,
    attention_fn=block.attention_fn,
    name='attention',
    **types,
  )
  mlp = MLP(block.mlp_dim, block.activation, name='mlp', **types)
  return attention, mlp, nn.Dropout(block.dropout, name='dropout')


class PreNormBlock(Block):
  """x + attention(norm(x)), then x + mlp(norm(x)): ViT (arXiv:2010.11929).

  Attributes:
    qkv_bias: whether query, key and value have a bias.
    layer_scale: initial value of a LayerScale at the end of each branch; None for none.
  """

  qkv_bias: bool = True
  layer_scale: float | None = None

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
    attention, mlp, dropout = _branches(self, self.qkv_bias)

    def scale(name, y):
      if self.layer_scale is None:
        return y
      return LayerScale(self.layer_scale, self.dtype, self.param_dtype, name=name)(y)

    y = attention(layer_norm(self, 'norm1')(x), mask=mask, bias=bias, deterministic=deterministic)
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


# Whether to recompute blocks in the backward pass; 'dots': all but their products with weights.
Remat = bool | Literal['dots']
REMATS: tuple[Remat, ...] = (False, True, 'dots')


def run_blocks(
  block: Callable[..., nn.Module],
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
    block: makes a block: block(name=...).
    depth: number of blocks.
    x: the input of the first block, [B, N, D].
    scan: whether to use nn.scan.
    remat: whether to recompute each block's inside in the backward pass (nn.remat). True stores
      only a block's input and costs another forward pass. 'dots' also stores its products with
      weights, and costs the elementwise operations and the attention's own products: a few
      percent. Without remat a scan stores everything that the backward pass reads: two to three
      times as much as XLA stores of unrolled layers, where it recomputes cheap operations itself.
    **inputs: keyword arguments of every block.

  Returns:
    The output of the last block, [B, N, D].

  Raises:
    ValueError: `remat` is none of REMATS.
  """
  if remat not in REMATS:
    raise ValueError(f'remat={remat!r} is none of {", ".join(map(repr, REMATS))}')
  # Lambdas, so that interceptors can tell these calls from those of the blocks by their name.
  run = lambda block, x: block(x, **inputs)
  if remat:
    policy = None
    if remat == 'dots':
      # Products with weights have no batch dimensions; those of the attention have.
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # The guard against merging the second forward pass with the first costs time; inside a scan
    # XLA cannot merge them anyway.
    run = nn.remat(run, prevent_cse=not scan, policy=policy)
  if not scan:
    for i in range(depth):
      x = run(block(name=f'block_{i}'), x)
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
  """A stack of blocks, unrolled or scanned; see `run_blocks`."""

  block: Callable[..., nn.Module]
  depth: int
  scan: bool = False
  remat: Remat = False

  @nn.compact
  def __call__(self, x, mask=None, bias=None, deterministic=True):
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


def block_of(model, kind: type[Block], **fields) -> Callable[..., nn.Module]:
  """A maker of blocks, for `run_blocks`.

  Args:
    model: has the fields that it shares with its blocks, and width.
    kind: class of the blocks.
    **fields: of the blocks alone; head_dim is width / heads if left out.
  """
  shared = {name: getattr(model, name) for name in _SHARED}
  fields = {'head_dim': model.width // model.heads} | fields
  return functools.partial(kind, **shared, **fields)
