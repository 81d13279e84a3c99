"""The loss of texts without whole logits: the head runs on some tokens at a time.

Logits [B, N, V] of a large vocabulary are most of what a step of a side network keeps. Here the
head, whatever rules act in it, runs on [B, n, D] of its input at a time, and what leaves it is two
numbers a token. Where the head is frozen, the gradient of its input is formed beside the logits, in
the forward pass: nothing is computed twice, and what is kept is as large as that input. Where the
head is trained, its pieces are computed again in the backward pass.

A teacher's logits are made by its own head on the same tokens, so they are never whole either.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core import NotAtHead, Tuned, at_head
from jpeft.programs import Static, Traced, has_gradient, plain_zero, vjp_in

from .losses import likeliest, loss, loss_of_teacher
from .teachers import MOST_LOGITS, Taught, cut, joined, tokens_of_a_piece

NAME = 'pieces'


def in_pieces(
  tuned: Tuned, smoothing: float = 0.0, most: int = MOST_LOGITS, parts: int = 1
) -> tuple[Tuned, str]:
  """(a Tuned that gives losses in place of logits, ''), or (the same Tuned, why it cannot).

  `apply(..., labels=labels)` of the first gives [B, N, 2] in float32: the loss of each token, 0
  where its label is negative, and 1 where the largest logit is that of its label. Without labels it
  gives logits. theta is the same. Labels are integers [B, N], or a `Taught` of them and a teacher.

  Args:
    tuned: of a model whose output is what its head returns, [B, N, V].
    smoothing: the share of the target that all words get alike.
    most: numbers of the logits of one piece, on each of `parts` devices.
    parts: devices that the tokens of a row are cut over.
  """
  if tuned.has_loss:
    return tuned, 'the method has a loss of its own, which reads the output'

  def losses(labels, head, arrays, x):
    """The losses of the tokens whose states x are."""
    taught = labels if isinstance(labels, Taught) else None
    if taught is not None:
      labels = taught.labels
    if x.shape[:2] != labels.shape:
      raise NotAtHead(f'the head reads {list(x.shape)}, and there are {list(labels.shape)} labels')
    size = tokens_of_a_piece(x.shape, tuned.sites[''].out.shape[-1], most, parts)
    return token_losses(head, arrays, x, labels, size, smoothing, taught, parts)

  return at_head(tuned, NAME, 'labels', losses, training=True)


def token_losses(
  head: Callable,
  arrays: Any,
  x: jax.Array,
  labels: jax.Array,
  size: int,
  smoothing: float = 0.0,
  taught: Taught | None = None,
  parts: int = 1,
) -> jax.Array:
  """[B, N, 2] in float32: the loss of each token, and whether its label has the largest logit.

  Args:
    head: (arrays, x [B, n, D]) -> logits [B, n, V], of each token by itself.
    arrays: what it reads.
    x: its input [B, N, D].
    labels: [B, N] integers; tokens with a negative one have loss 0.
    size: tokens of each row that it runs on at a time, a multiple of `parts`.
    smoothing: of the labels.
    taught: what a teacher says of the tokens, into which no gradient flows. Pieces are then as it
      has them.
    parts: devices that the tokens of a row are cut over.

  Differentiable once, in reverse, in x and arrays.
  """
  beside = {'labels': labels}
  fixed = []
  if taught is not None:
    size = taught.states.size
    parts = taught.states.parts
    if taught.states.x.shape[:2] != labels.shape:
      raise ValueError(
        f'the teacher read {list(taught.states.x.shape[:2])} tokens, and there are '
        f'{list(labels.shape)} labels'
      )
    beside['told'] = taught.states.x
    fixed = [taught.states.arrays, taught.temperature, taught.weight]
  leaves, tree = jax.tree.flatten(arrays)

  def run_head(leaves, x):
    return head(tree.unflatten(leaves), x)

  piece = jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype)
  traced = Traced(run_head, [jax.typeof(leaf) for leaf in leaves], piece)

  def losses(values, x, beside, fixed):
    """[B, n, 2] of a piece."""
    logits = traced((), values, x)
    labels = beside['labels']
    found = loss(logits, labels, smoothing)
    if taught is not None:
      arrays, temperature, weight = fixed
      told = taught.states.head((), arrays, beside['told'])
      if told.shape != logits.shape:
        raise ValueError(
          f'the teacher knows {told.shape[-1]} words and the model {logits.shape[-1]}: a teacher '
          'has the same vocabulary'
        )
      found = (1 - weight) * found + weight * loss_of_teacher(logits, told, labels, temperature)
    return jnp.stack([found, likeliest(logits, labels).astype(jnp.float32)], -1)

  beside = {name: cut(y, size, parts, -1 if name == 'labels' else 0) for name, y in beside.items()}
  out = _over_pieces(losses)([*traced.consts, *leaves], cut(x, size, parts), beside, fixed)
  return joined(out, x.shape[1], parts)


def _over_pieces(losses: Callable) -> Callable:
  """(values, pieces of x, pieces beside x, fixed) -> losses [pieces, B, n, 2], one after the other.

  Args:
    losses: (values, x, beside, fixed) -> [B, n, 2] of a piece; the first of two is differentiable
      in values and x.
  """

  def each(fn, *pieces):
    return jax.lax.scan(lambda _, piece: (None, fn(*piece)), None, pieces)[1]

  @jax.custom_vjp
  def run(values, x, beside, fixed):
    return each(lambda x, beside: losses(values, x, beside, fixed), x, beside)

  def forward(values, x, beside, fixed):
    trained = tuple(i for i, value in enumerate(values) if has_gradient(value))
    given = (values, x, beside, fixed)
    values, x, beside, fixed = jax.tree.map(lambda pair: pair.value, given)
    if trained:
      out = each(lambda x, beside: losses(values, x, beside, fixed), x, beside)
      return out, (values, x, (beside, fixed), Static(trained))

    def with_slope(x, beside):
      out, vjp = jax.vjp(lambda x: losses(values, x, beside, fixed), x)
      (slope,) = vjp(jnp.zeros_like(out).at[..., 0].set(1))
      return out, slope

    out, slope = each(with_slope, x, beside)
    return out, ([None] * len(values), slope, None, Static(()))

  def backward(residuals, cotangent):
    values, x, others, trained = residuals
    cotangent = plain_zero(cotangent)
    if others is None:  # x is the slope of the loss of each token
      return values, x * cotangent[..., :1].astype(x.dtype), None, None
    beside, fixed = others

    def step(total, piece):
      x, beside, cotangent = piece
      _, vjp = vjp_in(lambda values, x: losses(values, x, beside, fixed), values, trained.value, x)
      of_own, of_x = vjp(cotangent)
      return jax.tree.map(jnp.add, total, of_own), of_x

    zeros = [jnp.zeros_like(values[i]) for i in trained.value]
    of_own, of_x = jax.lax.scan(step, zeros, (x, beside, cotangent))
    found = dict(zip(trained.value, of_own, strict=True))
    return [found.get(i) for i in range(len(values))], of_x, None, None

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run
