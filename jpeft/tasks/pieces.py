"""The loss of texts without whole logits: the head runs on some tokens at a time.

Logits [B, N, V] of a large vocabulary are most of what a step of a side network keeps. Here the
head, whatever rules act in it, runs on [B, n, D] of its input at a time, and what leaves it is two
numbers a token. Where the head is frozen, the gradient of its input is formed beside the logits, in
the forward pass: nothing is computed twice, and what is kept is as large as that input. Where the
head is trained, its pieces are computed again in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jpeft.core import NotAtHead, Tuned, at_head
from jpeft.programs import Static, Traced, has_gradient

from .losses import loss

NAME = 'pieces'
# Numbers of the logits of one piece, at most.
MOST_LOGITS = 2**26


def in_pieces(tuned: Tuned, smoothing: float = 0.0, most: int = MOST_LOGITS) -> tuple[Tuned, str]:
  """(a Tuned that gives losses in place of logits, ''), or (the same Tuned, why it cannot).

  `apply(..., labels=labels)` of the first gives [B, N, 2] in float32: the loss of each token, 0
  where its label is negative, and 1 where the largest logit is that of its label. Without labels it
  gives logits. theta is the same.

  Args:
    tuned: of a model whose output is what its head returns, [B, N, V].
    smoothing: the share of the target that all words get alike.
    most: numbers of the logits of one piece.
  """
  if tuned.has_loss:
    return tuned, 'the method has a loss of its own, which reads the output'

  def losses(labels, head, arrays, x):
    """The losses of the tokens whose states x are."""
    if x.shape[:2] != labels.shape:
      raise NotAtHead(f'the head reads {list(x.shape)}, and there are {list(labels.shape)} labels')
    words = tuned.sites[''].out.shape[-1]
    rows = max(1, most // (x.shape[0] * words))
    count = -(-x.shape[1] // rows)
    size = -(-x.shape[1] // count)  # all pieces alike, up to the tokens that fill the last one
    return token_losses(head, arrays, x, labels, size, smoothing)

  return at_head(tuned, NAME, 'labels', losses, training=True)


def token_losses(
  head: Callable, arrays: Any, x: jax.Array, labels: jax.Array, size: int, smoothing: float = 0.0
) -> jax.Array:
  """[B, N, 2] in float32: the loss of each token, and whether its label has the largest logit.

  Args:
    head: (arrays, x [B, n, D]) -> logits [B, n, V], of each token by itself.
    arrays: what it reads.
    x: its input [B, N, D].
    labels: [B, N] integers; tokens with a negative one have loss 0.
    size: tokens of each row that it runs on at a time.
    smoothing: of the labels.

  Differentiable once, in reverse, in x and arrays.
  """
  length = x.shape[1]
  x = _cut(x, size, 0)  # [pieces, B, n, D]
  labels = _cut(labels, size, -1)
  leaves, tree = jax.tree.flatten(arrays)

  def run_head(leaves, x):
    return head(tree.unflatten(leaves), x)

  piece = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  traced = Traced(run_head, [jax.typeof(leaf) for leaf in leaves], piece)
  values = [*traced.consts, *leaves]

  def losses(values, x, labels):
    """[B, n, 2] of a piece."""
    logits = traced((), values, x)
    right = (logits.argmax(-1) == labels) & (labels >= 0)
    return jnp.stack([loss(logits, labels, smoothing), right.astype(jnp.float32)], -1)

  def over_pieces(fn, *pieces):
    return jax.lax.scan(lambda _, piece: (None, fn(*piece)), None, pieces)[1]

  @jax.custom_vjp
  def run(values, x, labels):
    return over_pieces(lambda x, labels: losses(values, x, labels), x, labels)

  def forward(values, x, labels):
    trained = tuple(i for i, value in enumerate(values) if has_gradient(value))
    values = [value.value for value in values]
    x, labels = x.value, labels.value
    if trained:
      out = over_pieces(lambda x, labels: losses(values, x, labels), x, labels)
      return out, (values, x, labels, Static(trained))

    def with_slope(x, labels):
      out, vjp = jax.vjp(lambda x: losses(values, x, labels), x)
      (slope,) = vjp(jnp.zeros_like(out).at[..., 0].set(1))
      return out, slope

    out, slope = over_pieces(with_slope, x, labels)
    return out, ([None] * len(values), slope, None, Static(()))

  def backward(residuals, cotangent):
    values, x, labels, trained = residuals
    if isinstance(cotangent, SymbolicZero):
      cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
    if labels is None:  # x is the slope of the loss of each token
      return values, x * cotangent[..., :1].astype(x.dtype), None

    def step(total, piece):
      x, labels, cotangent = piece

      def of_trained(own, x):
        replaced = dict(zip(trained.value, own, strict=True))
        return losses([replaced.get(i, value) for i, value in enumerate(values)], x, labels)

      _, vjp = jax.vjp(of_trained, [values[i] for i in trained.value], x)
      of_own, of_x = vjp(cotangent)
      return jax.tree.map(jnp.add, total, of_own), of_x

    zeros = [jnp.zeros_like(values[i]) for i in trained.value]
    of_own, of_x = jax.lax.scan(step, zeros, (x, labels, cotangent))
    found = dict(zip(trained.value, of_own, strict=True))
    return [found.get(i) for i in range(len(values))], of_x, None

  run.defvjp(forward, backward, symbolic_zeros=True)
  out = jnp.moveaxis(run(values, x, labels), 0, 1)  # [B, pieces, n, 2]
  return out.reshape(out.shape[0], -1, 2)[:, :length]


def _cut(x: jax.Array, size: int, fill: int) -> jax.Array:
  """[B, N, ...] as pieces [N / size, B, size, ...], filled up at the end."""
  missing = -x.shape[1] % size
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
  x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)
