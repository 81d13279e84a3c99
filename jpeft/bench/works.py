"""What the memory benchmark trains: models and batches as shapes, in bfloat16."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.models import (
  T5,
  Encoder,
  Llama,
  PreNormBlock,
  Remat,
  ViT,
  block_of,
  default_init,
  gelu_tanh,
  layer_norm,
)

BF16 = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}


def exact_softmax(query, key, value, bias=None, mask=None, **dropout):
  """jax.nn's attention, whose softmax is float32 in a bfloat16 model, as injection point."""
  return jax.nn.dot_product_attention(query, key, value, bias, mask)


class TokenEncoder(nn.Module):
  """A pre-norm encoder of ready tokens [B, N, width], with a head on their mean: no embedding, no
  class token.
  """

  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  num_classes: int = 100
  eps: float = 1e-6
  activation: Callable[[jax.Array], jax.Array] = gelu_tanh
  dropout: float = 0.0
  attention_dropout: float = 0.0
  attention_fn: Callable[..., jax.Array] = exact_softmax
  scan: bool = False
  remat: Remat = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, deterministic=True):
    encoder = Encoder(
      block_of(self, PreNormBlock), self.depth, self.scan, self.remat, name='encoder'
    )
    x = encoder(x.astype(self.dtype), deterministic=deterministic)
    feature = layer_norm(self, 'final_norm')(x).mean(1)
    return nn.Dense(
      self.num_classes, kernel_init=default_init, param_dtype=self.param_dtype, name='head'
    )(feature)


@dataclasses.dataclass(frozen=True)
class Work:
  """A row of the benchmark.

  Attributes:
    title: one line.
    model: (scan, remat) -> module.
    batch: size -> shapes, as the trainer feeds them.
    size: examples an update.
    layers: how its blocks are run: 'unroll', 'scan'.
    head: whether methods that do not train the head by themselves train it too.
  """

  title: str
  model: Callable[[bool, bool], nn.Module]
  batch: Callable[[int], dict[str, jax.ShapeDtypeStruct]]
  size: int
  layers: tuple[str, ...] = ('scan',)
  head: bool = True


def _shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def _images(size: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {'image': _shape(size, 224, 224, 3), 'label': _shape(size, dtype=jnp.int32)}


def _tokens(size: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {'image': _shape(size, 196, 768), 'label': _shape(size, dtype=jnp.int32)}


def _texts(size: int) -> dict[str, jax.ShapeDtypeStruct]:
  words = lambda length: _shape(size, length, dtype=jnp.int32)
  return {
    'tokens': words(128),
    'token_mask': _shape(size, 128, dtype=jnp.bool_),
    'decoder_tokens': words(8),
    'label': words(8),
  }


def _sentences(length: int):
  words = lambda size: _shape(size, length, dtype=jnp.int32)
  return lambda size: {'tokens': words(size), 'label': words(size)}


def _llama(**sizes):
  return lambda scan, remat: Llama(scan=scan, remat=remat, **BF16, **sizes)


WORKS: dict[str, Work] = {
  'w1': Work(
    '12 blocks of width 768 on ready tokens, batch 32, 196 tokens, 100 classes',
    lambda scan, remat: TokenEncoder(scan=scan, remat=remat, **BF16),
    _tokens,
    32,
    ('unroll', 'scan'),
  ),
  'w2': Work(
    'T5-base, batch 100, 128 tokens in (as in the LST paper) and 8 out (a label)',
    lambda scan, remat: T5(
      width=768, depth=12, heads=12, mlp_dim=3072, vocab=32128, scan=scan, remat=remat, **BF16
    ),
    _texts,
    100,
    head=False,
  ),
  'w3': Work(
    'ViT-L/16, batch 64, 224 pixels, 1000 classes',
    lambda scan, remat: ViT(
      width=1024,
      depth=24,
      heads=16,
      mlp_dim=4096,
      patch_size=16,
      num_classes=1000,
      scan=scan,
      remat=remat,
      **BF16,
    ),
    _images,
    64,
  ),
  'w4_1b': Work(
    'a decoder of the shape of Llama-3.2-1B, batch 4, 512 tokens',
    _llama(width=2048, depth=16, heads=32, kv_heads=8, mlp_dim=8192, vocab=128256, tied=True),
    _sentences(512),
    4,
    head=False,
  ),
  'w4_7b': Work(
    'a decoder of the shape of Llama-2-7B, batch 1, 512 tokens',
    _llama(width=4096, depth=32, heads=32, mlp_dim=11008, vocab=32000),
    _sentences(512),
    1,
    head=False,
  ),
  'w4_7b_long': Work(
    'the same, batch 4, 2048 tokens',
    _llama(width=4096, depth=32, heads=32, mlp_dim=11008, vocab=32000),
    _sentences(2048),
    4,
    head=False,
  ),
}
