"""Heads: what reads the hidden states of a backbone."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jpeft.core import soft_cap

from .layers import check_pool, default_init

# One label an example; one label a token; where an answer starts and ends; the word that a mask
# hides; the next word.
HEADS = ('classification', 'tokens', 'questions', 'masked', 'text')


def head_of(model, known: tuple[str, ...]) -> str | None:
  """What the head of a model gives; None without a head.

  Args:
    model: has the fields head and num_classes. A number of classes without a head is
      'classification'.
    known: the heads that its class can have.

  Raises:
    ValueError: another head, or one whose number of outputs is not said or said in vain.
  """
  head = model.head
  if head is None and model.num_classes is not None:
    head = 'classification'
  if head is not None and head not in known:
    raise ValueError(f'head {head!r} is none of {", ".join(known)}')
  by_class = head in ('classification', 'tokens')
  if by_class and model.num_classes is None:
    raise ValueError(f'head {head!r} needs num_classes, the number of labels')
  if not by_class and model.num_classes is not None:
    raise ValueError(f'head {head!r} gives no labels: it takes no num_classes')
  return head


def outputs_of(model, head: str) -> int:
  """The number of outputs of a linear head: one a label, or the start and the end of an answer."""
  if head == 'questions':
    return 2
  return model.num_classes


class WordBias(nn.Module):
  """logits + bias, one number a word: a head whose kernel is the word table."""

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, logits):
    bias = self.param('bias', nn.initializers.zeros, (logits.shape[-1],), self.param_dtype)
    return logits + bias.astype(self.dtype)


class WordTable(nn.Embed):
  """An `nn.Embed` that gives logits, which may have a cap.

  Attributes:
    cap: the `soft_cap` of the logits of `attend`; None for none.
  """

  cap: float | None = None

  def attend(self, query):
    logits = super().attend(query)
    return logits if self.cap is None else soft_cap(logits, self.cap)


class CappedDense(nn.Dense):
  """An `nn.Dense` whose outputs have a `soft_cap`.

  Attributes:
    cap: of the outputs; None for none.
  """

  cap: float | None = None

  def __call__(self, inputs):
    outputs = super().__call__(inputs)
    return outputs if self.cap is None else soft_cap(outputs, self.cap)


def last_token(x, mask=None):
  """The last token of each row of x [B, N, D] for which mask [B, N] is nonzero; of all by default.

  A row without tokens gives its first.
  """
  if mask is None:
    return x[:, -1]
  places = jnp.arange(x.shape[1])
  last = jnp.where(mask.astype(bool), places, 0).max(1)  # [B]
  return jnp.take_along_axis(x, last[:, None, None], 1)[:, 0]


def masked_mean(x, mask=None):
  """The mean over the tokens of x [B, N, D] for which mask [B, N] is nonzero."""
  if mask is None:
    return x.mean(1)
  weight = mask.astype(bool).astype(x.dtype)[..., None]  # [B, N, 1]
  return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)  # a row without tokens gives zero


def pooled(x, mask, pool: str):
  """What `pool` names of hidden states x [B, N, D] under mask [B, N]; all of them for 'tokens'."""
  if pool == 'last':
    return last_token(x, mask)
  if pool == 'mean':
    return masked_mean(x, mask)
  if pool == 'cls':
    return x[:, 0]
  return x


# What the head of a decoder reads, or what is returned without one.
DECODER_POOLS = ('last', 'mean', 'tokens')
DECODER_HEADS = ('classification', 'tokens', 'questions', 'text')


def decoder_head(model) -> str | None:
  """What the head of a decoder gives; None without a head.

  Raises:
    ValueError: another head than a decoder has, or a pooling that it cannot read.
  """
  head = head_of(model, DECODER_HEADS)
  check_pool(model.pool, DECODER_POOLS, model.num_classes if head == 'classification' else None)
  return head


def read_out(model, head: str | None, x, mask, table: WordTable):
  """What the head of a decoder gives of its hidden states, or the pooled feature.

  Called inside the compact call of the model, whose child `head` it makes.

  Args:
    model: has the fields vocab, tied, num_classes, pool, dtype and param_dtype; and may have
      final_cap, the `soft_cap` of the logits of words.
    head: see `decoder_head`.
    x: hidden states [B, N, D].
    mask: [B, N], or None.
    table: the word table, which is the head if the model says so.
  """
  if head == 'text' and model.tied:
    return table.attend(x)
  if head in (None, 'classification'):
    x = pooled(x, mask, model.pool)
  if head is None:
    return x
  fields = {
    'kernel_init': default_init,
    'dtype': model.dtype,
    'param_dtype': model.param_dtype,
    'name': 'head',
  }
  if head == 'text':
    cap = getattr(model, 'final_cap', None)
    return CappedDense(model.vocab, use_bias=False, cap=cap, **fields)(x)
  return nn.Dense(outputs_of(model, head), use_bias=head in ('tokens', 'questions'), **fields)(x)
