"""What a teacher says of tokens, without its whole logits: the states that its head reads.

A loss in pieces (`in_pieces`) runs the teacher's head on some of these at a time, beside its own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Tuned, at_head
from jpeft.programs import Traced

# Numbers of the logits of one piece, at most.
MOST_LOGITS = 2**26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadStates:
  """What a head reads of each token, and the head.

  Attributes:
    x: [B, N, D].
    arrays: that the head reads.
    head: ((), arrays, x [B, size, D]) -> logits [B, size, V].
    size: tokens of each row that it runs on at a time.
    parts: devices that the tokens of a row are cut over.
  """

  x: jax.Array
  arrays: list[jax.Array]
  head: Traced = dataclasses.field(metadata={'static': True})
  size: int = dataclasses.field(metadata={'static': True})
  parts: int = dataclasses.field(default=1, metadata={'static': True})

  def logits(self) -> jax.Array:
    """Whole logits [B, N, V], of which a loss in pieces makes some at a time."""
    pieces = cut(self.x, self.size, self.parts)
    made = jax.lax.map(lambda x: self.head((), self.arrays, x), pieces)
    return joined(made, self.x.shape[1], self.parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taught:
  """Labels of tokens, and what a teacher says of them.

  The loss of a token is (1 - weight) * cross-entropy of its label + weight * temperature^2 *
  KL(teacher, model), of the softmax of logits / temperature (Hinton et al., arXiv 1503.02531); 0
  where the label is negative.

  Attributes:
    labels: [B, N] integers.
    states: of the teacher on the same tokens, from `head_states`.
    temperature: above 0.
    weight: of the teacher, from 0 to 1.
  """

  labels: jax.Array
  states: HeadStates
  temperature: float | jax.Array = 1.0
  weight: float | jax.Array = 0.5


def head_states(tuned: Tuned, most: int = MOST_LOGITS, parts: int = 1) -> tuple[Tuned, str]:
  """(a Tuned that gives `HeadStates` in place of logits, ''), or (the same Tuned, why it cannot).

  `apply(..., states=True)` of the first gives them, under stop_gradient. theta is the same.

  Args:
    tuned: of a model whose output is what its head returns, [B, N, V]; `attach(model, chain(),
      ...)` for a model as it is.
    most: numbers of the logits of one piece, on each of `parts` devices.
    parts: devices that the tokens of a row are cut over.
  """

  def states(asked, head, arrays, x):
    size = tokens_of_a_piece(x.shape, tuned.sites[''].out.shape[-1], most, parts)
    leaves, tree = jax.tree.flatten((arrays, x))
    leaves = [jax.lax.stop_gradient(leaf) for leaf in leaves]
    arrays, x = tree.unflatten(leaves)
    piece = jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype)
    traced = Traced(head, jax.tree.map(jax.typeof, arrays), piece)
    consts = [jax.lax.stop_gradient(const) for const in traced.consts]
    return HeadStates(x, [*consts, *jax.tree.leaves(arrays)], traced, size, parts)

  return at_head(tuned, 'states', 'states', states, training=False)


def tokens_of_a_piece(shape: tuple[int, ...], words: int, most: int, parts: int = 1) -> int:
  """Tokens of each row of [B, N, ...] whose logits are `most` numbers; all pieces are alike.

  Args:
    shape: of the states.
    words: V.
    most: numbers of the logits of a piece on each of `parts` devices.
    parts: devices that the tokens of a row are cut over; the same number of tokens of each of them.
  """
  rows = max(1, most // (shape[0] * words))
  length = -(-shape[1] // parts)
  count = -(-length // rows)
  return parts * -(-length // count)


def cut(x: jax.Array, size: int, parts: int = 1, fill: int = 0) -> jax.Array:
  """[B, N, ...] as pieces [pieces, B, size, ...], filled up at the end.

  A piece has as many tokens of each of `parts` parts of a row: cut over that many devices, all of
  them work at each piece.
  """
  each = size // parts
  length = -(-x.shape[1] // parts)
  count = -(-length // each)
  x = _padded(x, 1, parts * length, fill)
  x = x.reshape(x.shape[0], parts, length, *x.shape[2:])
  x = _padded(x, 2, count * each, fill)
  x = x.reshape(*x.shape[:2], count, each, *x.shape[3:])
  return jnp.moveaxis(x, 2, 0).reshape(count, x.shape[0], size, *x.shape[4:])


def joined(pieces: jax.Array, length: int, parts: int = 1) -> jax.Array:
  """Pieces [pieces, B, size, ...] as [B, length, ...]."""
  count, batch, size = pieces.shape[:3]
  x = pieces.reshape(count, batch, parts, size // parts, *pieces.shape[3:])
  x = jnp.moveaxis(x, 0, 2)
  x = x.reshape(batch, parts, -1, *x.shape[4:])[:, :, : -(-length // parts)]
  return x.reshape(batch, -1, *x.shape[3:])[:, :length]


def _padded(x: jax.Array, axis: int, length: int, fill: int) -> jax.Array:
  """x, an axis of it filled up to a length."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)
