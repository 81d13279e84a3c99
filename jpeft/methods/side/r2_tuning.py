"""R2-Tuning: one small block walks a frozen image encoder's last layers, from the deepest up, for
moments in videos.

Liu et al., 2024, "R2-Tuning: Efficient Image-to-Video Transfer Learning for Video Temporal
Grounding" (arXiv 2404.00801; yeliudev/R2-Tuning). The letters:

  V_i [B T, P, D]  state i of the image encoder, frame by frame, mapped to width D
  Q_i [B, L, D]    state i of a text encoder, mapped likewise
  o   [B T, D]     what the words find in a frame
  e   [B, T, D]    the frames of a video, by their class tokens and o

The last k states of both encoders take part. From the deepest, i = k - 1, to i = 0, with weights
shared by all,

  A = softmax((W_q Q_i)(W_v V_i)' / sqrt D) over patches,  o = max over words of (A V_i + Q_i)
  e = cls(V_i) + tanh(s_i) o,  e <- s(g_i) e + (1 - s(g_i)) last  (i < k - 1)
  last <- Decoder(e, Q_i)

s(.) being the sigmoid, and the decoder attending to the words, then along time, then an MLP. `last`
[B, T, D] feeds a pyramid of halved rates, a score and two boundaries at each of its points. s_i =
g_i = 0 at first: no word counts, layers mix in equal parts.

Frames are folded into the batch: the model is called with images [B T, height, width, 3], frames of
a video one after the other, and `tuned.apply` takes beside them

  query       [B, k, L, d_text], the last k states of the text encoder, the deepest last, frozen
  query_mask  [B, L], True for words (optional: all), and frame_mask [B, T] likewise

and gives {'last': [B, T, D], 'cls': [B, k, T, D] the class tokens of V, 'query': [B, k, D] the
words of Q pooled by weights that are trained, 'score': [B, T_s, 1] and 'boundary': [B, T_s, 2] a
level}. Nothing enters the encoders' backward pass. Losses, targets and the choice of moments belong
to the task: `points` gives the places and ranges that targets need; moments are compared with
query[:, 0]. The words' mask acts in the decoder and in the pooled query alone, as published.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import Method, factory

from ..check import require, whole
from ..nn import (
  attend,
  conv,
  convolve,
  dense,
  drop,
  drop_path,
  glorot,
  layer_norm,
  linear,
  scales,
)
from .stack import Stack, around

# Two of each map's dropout, and three of the decoder's branches.
_KEYS_OF_A_STATE = 7


@factory
def r2_tuning(
  frames: int,
  states: int = 4,
  width: int = 256,
  heads: int = 8,
  query_width: int = 512,
  strides: Sequence[int] = (1, 2, 4, 8),
  dropout: float = 0.5,
  drop_path: float = 0.1,
  times: bool = True,
  blocks: str = '{block}',
  exit: str = '{exit}',
  name: str = 'r2_tuning',
) -> Method:
  """R2-Tuning (arXiv 2404.00801).

  Args:
    frames: T, of a video.
    states: k, of embeddings and outputs of blocks, the last ones.
    width: D.
    heads: of the decoder.
    query_width: d_text.
    strides: of the pyramid's levels, powers of 2.
    dropout: rate in the maps to width D.
    drop_path: how often a branch of the decoder is left out of a video.
    times: append t / T and (t + 1) / T to the states of frame t.
    blocks: pattern of the image encoder's blocks.
    exit: pattern of the module that their output goes to.
    name: in theta, at the model itself.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model with fewer states; at the
      call, images that make no whole videos or a query of another shape.
  """
  return _R2Tuning(
    frames=frames,
    states=states,
    width=width,
    heads=heads,
    query_width=query_width,
    strides=tuple(strides),
    dropout=dropout,
    drop_path=drop_path,
    times=times,
    blocks=blocks,
    exit=exit,
    name=name,
  ).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _R2Tuning:
  """The hyperparameters of `r2_tuning`, and its rules as methods.

  theta[name][''] is {'video', 'query': the maps to width D, 'w_q': W_q, 'w_v': W_v, 's': s_i,
  'g': g_i, 'decoder', 'pyramid': {stride: {position: a convolution and its norm}}, 'pool': of the
  words, 'level': a factor of each level's boundaries, 'score', 'boundary': the two heads}. With one
  state there is no 'g'.
  """

  frames: int
  states: int
  width: int
  heads: int
  query_width: int
  strides: tuple[int, ...]
  dropout: float
  drop_path: float
  times: bool
  blocks: str
  exit: str
  name: str

  def __post_init__(self):
    for name in ('frames', 'states', 'width', 'heads'):
      whole('r2_tuning', name, getattr(self, name), 1)
    even = self.width % 2 == 0
    rule = f'must be even, and a multiple of heads={self.heads}'
    require(even and self.width % self.heads == 0, 'r2_tuning', 'width', self.width, rule)
    powers = all(stride >= 1 and stride & (stride - 1) == 0 for stride in self.strides)
    rule = 'must be powers of 2'
    require(bool(self.strides) and powers, 'r2_tuning', 'strides', self.strides, rule)
    for name in ('dropout', 'drop_path'):
      rate = getattr(self, name)
      require(0 <= rate < 1, 'r2_tuning', name, rate, 'must be at least 0 and below 1')

  def method(self) -> Method:
    """Reads the states of the image encoder's blocks, and makes the output of the model."""
    takes = ('query', 'query_mask', 'frame_mask')
    return around(self.name, self.blocks, self.exit, self.init, self.apply, takes=takes)

  # Parameters

  def init(self, net: Stack, key, site, arrays) -> dict:
    """The parameters at the model itself."""
    if self.states > net.depth + 1:
      raise ValueError(
        f'{self.name}: states={self.states}, and {net.depth} blocks have {net.depth + 1}'
      )
    keys = iter(jax.random.split(key, 64))
    width = self.width
    video_width = net.width
    if self.times:
      video_width += 2
    t = {
      'video': self.init_map(keys, video_width),
      'query': self.init_map(keys, self.query_width),
      'w_q': glorot(next(keys), width, width),
      'w_v': glorot(next(keys), width, width),
      's': jnp.zeros(self.states),
      'decoder': self.init_decoder(keys),
      'pyramid': self.init_pyramid(keys),
      'pool': dense(next(keys), width, 1)['kernel'],
      'level': jnp.ones(len(self.strides)),
      'score': self.init_head(keys, 1),
      'boundary': self.init_head(keys, 2),
    }
    if self.states > 1:
      t['g'] = jnp.zeros(self.states - 1)
    return t

  def init_map(self, keys: Iterator[jax.Array], fan_in: int) -> dict:
    """A map to width D."""
    return {
      'norm1': scales(fan_in),
      'fc1': dense(next(keys), fan_in, self.width),
      'norm2': scales(self.width),
      'fc2': dense(next(keys), self.width, self.width),
    }

  def init_decoder(self, keys: Iterator[jax.Array]) -> dict:
    """The decoder, Glorot's numbers in its attention and He's in its MLP."""
    width = self.width
    inner = 4 * width
    return {
      'cross': {name: glorot(next(keys), width, width) for name in 'qkvo'},
      'self': {name: glorot(next(keys), width, width) for name in 'qkvo'},
      'fc1': dense(next(keys), width, inner, std=math.sqrt(2 / width)),
      'fc2': dense(next(keys), inner, width, std=math.sqrt(2 / inner)),
      'norm1': scales(width),
      'norm2': scales(width),
      'norm3': scales(width),
    }

  def init_pyramid(self, keys: Iterator[jax.Array]) -> dict:
    """Of each level the convolutions of stride 2 that lead to it; level 1 has none."""
    width = self.width
    levels = {}
    for stride in self.strides:
      level = {}
      for i in range(_halvings(stride)):
        level[str(i)] = {'conv': conv(next(keys), (2,), width, width), 'norm': scales(width)}
      if level:
        levels[str(stride)] = level
    return levels

  def init_head(self, keys: Iterator[jax.Array], fan_out: int) -> dict:
    """A head that all levels share."""
    return {
      'hidden': conv(next(keys), (3,), self.width, self.width),
      'out': conv(next(keys), (3,), self.width, fan_out),
    }

  # The forward pass

  def apply(
    self,
    t,
    net: Stack,
    run,
    call,
    images,
    *args,
    query,
    query_mask=None,
    frame_mask=None,
    **kwargs,
  ):
    """The dictionary of outputs, see the head of this file."""
    batch = self.check_shapes(images, query)
    taps, last = run(images, *args, **kwargs)
    query = jax.lax.stop_gradient(query).astype(last.dtype)
    if query_mask is None:
      query_mask = jnp.ones((batch, query.shape[2]), bool)
    if frame_mask is None:
      frame_mask = jnp.ones((batch, self.frames), bool)
    query_mask = query_mask.astype(bool)
    frame_mask = frame_mask.astype(bool)
    keys = self.keys(call)

    found = None  # `last` of the equations
    tokens = []
    queries = []
    for i in reversed(range(self.states)):
      v = self.mapped(t['video'], self.image_state(net, taps, last, i), keys)  # [B T, P, D]
      q = self.mapped(t['query'], query[:, i], keys)  # [B, L, D]
      e = v[:, 0] + jnp.tanh(t['s'][i]) * pooled(t, jnp.repeat(q, self.frames, 0), v)
      e = self.unfold(e)
      if found is not None:
        g = jax.nn.sigmoid(t['g'][i])  # the weight of this state, not of the deeper ones
        e = g * e + (1 - g) * found
      tokens.append(self.unfold(v[:, 0]))
      queries.append(pooled_words(t, q, query_mask))
      found = self.decode(t['decoder'], e, q, frame_mask, query_mask, keys)

    scores, boundaries = self.predict(t, found)
    return {
      'last': found,
      'cls': jnp.stack(tokens[::-1], 1),  # the deepest state last, as in the query
      'query': jnp.stack(queries[::-1], 1),
      'score': scores,
      'boundary': boundaries,
    }

  def check_shapes(self, images: jax.Array, query: jax.Array) -> int:
    """B, how many videos the images are.

    Raises:
      ValueError: images that make no whole videos, or a query of another shape.
    """
    if len(images) % self.frames:
      raise ValueError(
        f'{self.name}: {len(images)} images are no whole videos of {self.frames} frames'
      )
    batch = len(images) // self.frames
    shape = query.shape
    if len(shape) != 4 or shape != (batch, self.states, shape[2], self.query_width):
      raise ValueError(
        f'{self.name}: query is {list(shape)}, and {batch} videos need [{batch}, {self.states}, '
        f'words, {self.query_width}]'
      )
    return batch

  def keys(self, call) -> Iterator[jax.Array | None]:
    """The random keys of all states, in the order in which they are used; Nones for no dropout."""
    key = None
    if self.dropout or self.drop_path:
      key = call.rng('r2_tuning dropout')
    if key is None:
      return itertools.repeat(None)
    return iter(jax.random.split(key, _KEYS_OF_A_STATE * self.states))

  def unfold(self, x: jax.Array) -> jax.Array:
    """The frames of a video on an axis of their own: [B T, D] to [B, T, D]."""
    return rearrange(x, '(b t) d -> b t d', t=self.frames)

  def image_state(self, net: Stack, taps, last: jax.Array, i: int) -> jax.Array:
    """State i of the k last ones of the image encoder [B T, P, d]; d + 2 with times."""
    index = net.depth + 1 - self.states + i
    if index == net.depth:
      state = last
    else:
      state = net.recorded(taps, 'x', index)
    if self.times:
      state = self.timed(state)
    return state

  def timed(self, x: jax.Array) -> jax.Array:
    """Every token with its frame's begin and end, in units of the video: [B T, P, d + 2]."""
    begin = jnp.tile(jnp.arange(self.frames), len(x) // self.frames)[:, None, None] / self.frames
    ends = jnp.concatenate([begin, begin + 1 / self.frames], -1).astype(x.dtype)  # [B T, 1, 2]
    return jnp.concatenate([x, jnp.broadcast_to(ends, (*x.shape[:2], 2))], -1)

  def mapped(self, t, x: jax.Array, keys: Iterator[jax.Array | None]) -> jax.Array:
    """A state in width D; takes two keys."""
    y = drop(layer_norm(t['norm1'], x), next(keys), self.dropout)
    y = jax.nn.relu(linear(t['fc1'], y))
    y = drop(layer_norm(t['norm2'], y), next(keys), self.dropout)
    return linear(t['fc2'], y)

  def decode(
    self,
    t,
    e: jax.Array,
    words: jax.Array,
    frame_mask: jax.Array,
    query_mask: jax.Array,
    keys: Iterator[jax.Array | None],
  ) -> jax.Array:
    """Decoder(e, Q_i) [B, T, D], a norm behind each branch; takes three keys.

    Args:
      t: its parameters.
      e: [B, T, D].
      words: Q_i [B, L, D].
      frame_mask: [B, T].
      query_mask: [B, L].
      keys: of drop path.
    """

    def add(norm, x, branch):
      return layer_norm(norm, x + drop_path(branch, next(keys), self.drop_path))

    # Positions are added to queries, and to keys along time, but not to values.
    positions = sinusoids(e.shape[1], e.shape[2]).astype(e.dtype)
    branch = attend(t['cross'], e + positions, words, self.heads, mask=query_mask)
    e = add(t['norm1'], e, branch)
    placed = e + positions
    branch = attend(t['self'], placed, placed, self.heads, values=e, mask=frame_mask)
    e = add(t['norm2'], e, branch)
    branch = linear(t['fc2'], jax.nn.relu(linear(t['fc1'], e)))
    return add(t['norm3'], e, branch)

  def predict(self, t, found: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """(scores [B, T_s, 1], boundaries [B, T_s, 2]) of each level of the pyramid."""
    scores = []
    boundaries = []
    for factor, stride in zip(t['level'], self.strides, strict=True):
      x = found
      if stride == 1:
        x = jax.nn.relu(x)
      for i in range(_halvings(stride)):
        half = t['pyramid'][str(stride)][str(i)]
        x = convolve(half['conv'], x, strides=2, padding='VALID')
        x = jax.nn.relu(layer_norm(half['norm'], x))
      scores.append(head(t['score'], x))
      boundaries.append(factor * jnp.exp(head(t['boundary'], x)))
    return scores, boundaries


def points(frames: int, strides: Sequence[int] = (1, 2, 4, 8)) -> list[dict[str, Any]]:
  """The points of each level of the pyramid.

  Args:
    frames: T.
    strides: of the levels.

  Returns:
    For each level {'at': where its points lie [T_s], 'range': (from, to), the distances of the
    boundaries that they predict}, in frames.
  """
  ends = [0, *strides[1:], math.inf]
  levels = []
  for i, stride in enumerate(strides):
    levels.append({'at': stride * jnp.arange(frames // stride), 'range': (ends[i], ends[i + 1])})
  return levels


def pooled(t, q: jax.Array, v: jax.Array) -> jax.Array:
  """o [B T, D] of words q [B T, L, D] and patches v [B T, P, D]."""
  logits = linear(t['w_q'], q) @ linear(t['w_v'], v).swapaxes(-1, -2) / math.sqrt(v.shape[-1])
  share = jax.nn.softmax(logits.astype(jnp.float32), -1).astype(v.dtype)  # [B T, L, P]
  # The maximum runs over all words: the words' mask does not act here, as published.
  return (share @ v + q).max(1)


def pooled_words(t, q: jax.Array, mask: jax.Array) -> jax.Array:
  """The words q [B, L, D] that a mask [B, L] lets through, weighed: [B, D]."""
  # Finite, since a softmax of nothing but -inf is nan.
  logits = jnp.where(mask[..., None], q @ t['pool'], -1e9)
  return (jax.nn.softmax(logits, 1) * q).sum(1)


def head(t, x: jax.Array) -> jax.Array:
  """The outputs of a head at the points of one level: [B, T_s, D] to [B, T_s, fan_out]."""
  return convolve(t['out'], jax.nn.relu(convolve(t['hidden'], x)))


def sinusoids(length: int, width: int) -> jax.Array:
  """Positions [length, width]: sines of the even features, cosines of the odd ones."""
  angle = jnp.arange(length)[:, None] / 10000 ** (jnp.arange(0, width, 2) / width)
  return rearrange(jnp.stack([jnp.sin(angle), jnp.cos(angle)]), 'two n d -> n (d two)')


def _halvings(stride: int) -> int:
  """How often the rate is halved to a stride, a power of 2."""
  return stride.bit_length() - 1
