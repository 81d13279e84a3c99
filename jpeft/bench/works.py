"""What the memory benchmark trains: models and batches as shapes, in bfloat16."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft import tasks, training
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

Batch = dict[str, jax.ShapeDtypeStruct]

BF16 = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}


def exact_softmax(query, key, value, bias=None, mask=None, **dropout):
  """jax.nn's attention, whose softmax is float32 in a bfloat16 model, as injection point."""
  return jax.nn.dot_product_attention(query, key, value, bias, mask)


class TokenEncoder(nn.Module):
  """A pre-norm encoder of ready tokens [B, N, width], with a head on their mean.

  It has no embedding and no class token.
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
    block = block_of(self, PreNormBlock)
    encoder = Encoder(block, self.depth, self.scan, self.remat, name='encoder')
    x = encoder(x.astype(self.dtype), deterministic=deterministic)
    feature = layer_norm(self, 'final_norm')(x).mean(1)  # [B, width]
    head = nn.Dense(
      self.num_classes, kernel_init=default_init, param_dtype=self.param_dtype, name='head'
    )
    return head(feature)


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
    objective: what is made small.
    mlp_tokens: tokens of each example that an MLP runs on at a time; None for all.
    storage: the 4-bit format of kernels; None for that of the method, if it has one.
  """

  title: str
  model: Callable[[bool, Remat], nn.Module]
  batch: Callable[[int], Batch]
  size: int
  layers: tuple[str, ...] = ('scan',)
  head: bool = True
  objective: tasks.Objective = training.PLAIN
  mlp_tokens: int | None = None
  storage: str | None = None


# The loss of texts by logits [B, N, V] that are made whole, as if they were small.
WHOLE = dataclasses.replace(training.PLAIN, smoothing=None)


def _floats(*sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _integers(*sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.int32)


def _images(size: int) -> Batch:
  return {'image': _floats(size, 224, 224, 3), 'label': _integers(size)}


def _ready_tokens(size: int) -> Batch:
  return {'image': _floats(size, 196, 768), 'label': _integers(size)}


def _pairs_of_texts(size: int) -> Batch:
  return {
    'tokens': _integers(size, 128),
    'token_mask': jax.ShapeDtypeStruct((size, 128), jnp.bool_),
    'decoder_tokens': _integers(size, 8),
    'label': _integers(size, 8),
  }


def _texts(length: int) -> Callable[[int], Batch]:
  """Batches of texts to write."""

  def batch(size: int) -> Batch:
    return {'tokens': _integers(size, length), 'label': _integers(size, length)}

  return batch


def _token_encoder(scan: bool, remat: Remat) -> TokenEncoder:
  return TokenEncoder(scan=scan, remat=remat, **BF16)


def _t5_base(scan: bool, remat: Remat) -> T5:
  return T5(
    width=768, depth=12, heads=12, mlp_dim=3072, vocab=32128, scan=scan, remat=remat, **BF16
  )


def _vit_l16(scan: bool, remat: Remat) -> ViT:
  return ViT(
    width=1024,
    depth=24,
    heads=16,
    mlp_dim=4096,
    patch_size=16,
    num_classes=1000,
    scan=scan,
    remat=remat,
    **BF16,
  )


def _llama_1b(scan: bool, remat: Remat) -> Llama:
  return Llama(
    width=2048,
    depth=16,
    heads=32,
    kv_heads=8,
    mlp_dim=8192,
    vocab=128256,
    tied=True,
    scan=scan,
    remat=remat,
    **BF16,
  )


def _llama_7b(scan: bool, remat: Remat) -> Llama:
  return Llama(
    width=4096, depth=32, heads=32, mlp_dim=11008, vocab=32000, scan=scan, remat=remat, **BF16
  )


def _llama_8b(scan: bool, remat: Remat) -> Llama:
  return Llama(
    width=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    mlp_dim=14336,
    vocab=128256,
    scan=scan,
    remat=remat,
    **BF16,
  )


_WORKS: dict[str, Work] = {
  'w1': Work(
    '12 blocks of width 768 on ready tokens, batch 32, 196 tokens, 100 classes',
    _token_encoder,
    _ready_tokens,
    32,
    ('unroll', 'scan'),
  ),
  'w2': Work(
    'T5-base, batch 100, 128 tokens in (as in the LST paper) and 8 out (a label)',
    _t5_base,
    _pairs_of_texts,
    100,
    head=False,
  ),
  'w3': Work('ViT-L/16, batch 64, 224 pixels, 1000 classes', _vit_l16, _images, 64),
  'w4_1b': Work(
    'a decoder of the shape of Llama-3.2-1B, batch 4, 512 tokens',
    _llama_1b,
    _texts(512),
    4,
    head=False,
  ),
  'w4_7b': Work(
    'a decoder of the shape of Llama-2-7B, batch 1, 512 tokens',
    _llama_7b,
    _texts(512),
    1,
    head=False,
  ),
  'w4_7b_nf4': Work(
    'the same, kernels in NF4 whatever the method',
    _llama_7b,
    _texts(512),
    1,
    head=False,
    storage='nf4_double',
  ),
  'w4_7b_long': Work(
    'W4_7B with batch 4, 2048 tokens',
    _llama_7b,
    _texts(2048),
    4,
    head=False,
  ),
  **{
    f'w5_{length // 1024}k': Work(
      f'a decoder of the shape of Llama-3.2-1B, one text of {length:,} tokens',
      _llama_1b,
      _texts(length),
      1,
      head=False,
    )
    for length in (2048, 8192, 32768)
  },
  'w6_8b': Work(
    'a decoder of the shape of Llama-3-8B, batch 4, 2048 tokens, 128,256 words',
    _llama_8b,
    _texts(2048),
    4,
    head=False,
  ),
  'w6_8b_whole': Work(
    'W6_8B with whole logits',
    _llama_8b,
    _texts(2048),
    4,
    head=False,
    objective=WHOLE,
  ),
}

# Works that are measured with MLPs on some tokens at a time too, and how many.
_TILED = {'w1': 98, 'w4_7b_long': 512, 'w6_8b': 512}


def _with_tiled() -> Iterator[tuple[str, Work]]:
  """All works; behind one of _TILED, and named after it, the same with MLPs in pieces."""
  for name, work in _WORKS.items():
    yield name, work
    if name in _TILED:
      tokens = _TILED[name]
      title = f'{name.upper()} with MLPs on {tokens} tokens at a time'
      yield f'{name}_tiled', dataclasses.replace(work, title=title, mlp_tokens=tokens)


WORKS: dict[str, Work] = dict(_with_tiled())
