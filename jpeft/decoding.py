"""Writing text with a decoder: many prompts at once, greedy or sampled, in one compiled program."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jpeft.core import EXTRAS, Call, Tuned
from jpeft.models import grown

AT_ONCE = 32  # prompts of a batch


class Generated(NamedTuple):
  """What was written.

  Attributes:
    tokens: word ids [B, T]; the pad id behind the end of a text.
    lengths: how many of them each text has [B], its stop token included.
  """

  tokens: jax.Array
  lengths: jax.Array


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, N], mask [B, N]) of prompts of several lengths, all of which end at the last
  column.

  Raises:
    ValueError: there is no prompt, or an empty one.
  """
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise ValueError('there must be prompts, and each must have a token')
  tokens = np.full((len(prompts), max(map(len, prompts))), pad, np.int32)
  mask = np.zeros(tokens.shape, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
  return tokens, mask


def generate(
  model: Any,
  backbone: Any,
  tokens,
  mask=None,
  *,
  new_tokens: int,
  theta: Any = None,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop: Sequence[int] = (),
  pad: int = 0,
  key: jax.Array | None = None,
  cache: bool = True,
) -> Generated:
  """Continues prompts; compiled once for each shape of them.

  Args:
    model: a decoder of jpeft.models, or a `Tuned` over one.
    backbone: its variables.
    tokens: prompts [B, N], padded on the left, see `pad_left`.
    mask: [B, N], nonzero where a token is real; None when all are.
    new_tokens: T, how many tokens are written at most.
    theta: of a Tuned.
    temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
    top_p: a token is drawn from the smallest set of likeliest ones that has this probability
      (arXiv:1904.09751).
    stop: ids of tokens that end a text.
    pad: id that is written behind the end of a text.
    key: of the draws.
    cache: keep keys and values; a side network whose blocks are the decoder's own keeps its own
      beside them. Where a method runs other blocks that mix tokens, or adds tokens to the sequence,
      the whole text is run again for each token all the same: what it computes is in no cache.

  Raises:
    ValueError: an argument outside its range, no key to draw with, or prompts padded on the right.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  mask = (
    jnp.ones(tokens.shape, jnp.int32)
    if mask is None
    else (jnp.asarray(mask) != 0).astype(jnp.int32)
  )
  _check(model, theta, tokens, mask, new_tokens, temperature, top_p, key)
  key = jax.random.key(0) if key is None else key
  return _generate(
    model,
    theta,
    backbone,
    tokens,
    mask,
    key,
    temperature,
    top_p,
    new_tokens=new_tokens,
    greedy=temperature == 0,
    stop=tuple(stop),
    pad=pad,
    cache=cache,
  )


def completions(
  model: Any,
  backbone: Any,
  prompts: Sequence[Sequence[int]],
  *,
  pad: int = 0,
  key: jax.Array | None = None,
  **options,
) -> Iterator[list[int]]:
  """What `generate` writes after each of any number of prompts, in their order, AT_ONCE at a time.

  Args:
    model, backbone, pad, key, **options: see `generate`.
    prompts: tokens of several lengths.

  Yields:
    New tokens, the stop token included.
  """
  tokens, mask = pad_left(prompts, pad)
  size = min(AT_ONCE, len(tokens))
  for start in range(0, len(tokens), size):
    some = np.minimum(
      np.arange(start, start + size), len(tokens) - 1
    )  # always as many: compiled once
    sub = None if key is None else jax.random.fold_in(key, start)
    found = jax.device_get(
      generate(model, backbone, tokens[some], mask[some], pad=pad, key=sub, **options)
    )
    for row, length in zip(found.tokens[: len(tokens) - start], found.lengths, strict=False):
      yield row[:length].tolist()


def _check(model, theta, tokens, mask, new_tokens, temperature, top_p, key):
  if isinstance(model, Tuned) != (theta is not None):
    raise ValueError('theta goes with a Tuned, and a Tuned needs its theta')
  if tokens.ndim != 2 or not tokens.shape[1] or mask.shape != tokens.shape:
    raise ValueError(
      f'prompts are tokens [B, N] with a mask of that shape; got {tokens.shape} and {mask.shape}'
    )
  if new_tokens < 1:
    raise ValueError(f'new_tokens={new_tokens} must be at least 1')
  if temperature < 0 or not 0 < top_p <= 1:
    raise ValueError(
      f'temperature={temperature} must not be negative, and top_p={top_p} must lie in (0, 1]'
    )
  if temperature and key is None:
    raise ValueError(
      f'temperature={temperature} draws tokens: give a random key=, or temperature=0'
    )
  if not isinstance(mask, jax.core.Tracer) and not mask[:, -1].all():
    raise ValueError('a prompt ends with padding, but must be padded on the left: see pad_left')


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=('new_tokens', 'greedy', 'stop', 'pad', 'cache')
)
def _generate(
  model,
  theta,
  backbone,
  tokens,
  mask,
  key,
  temperature,
  top_p,
  *,
  new_tokens,
  greedy,
  stop,
  pad,
  cache,
):
  def run(variables, tokens, mask, **options):
    args = (variables, tokens) if theta is None else (theta, variables, tokens)
    return model.apply(*args, mask=mask, **options)

  first, step, state = (
    _cached(run, model, backbone, tokens, mask, new_tokens) if cache else (None,) * 3
  )
  if step is None:
    step, state = _again(run, backbone, tokens, mask, new_tokens)

  def body(carry, step):
    i, written, lengths, done, token, state = carry
    logits, state = step(token, i - 1, state)
    logits, lengths = logits.astype(jnp.float32), lengths + ~done
    token = (
      jnp.argmax(logits, -1)
      if greedy
      else draw(jax.random.fold_in(key, i), logits, temperature, top_p)
    )
    token = jnp.where(done, pad, token).astype(jnp.int32)
    return (
      i + 1,
      written.at[:, i].set(token),
      lengths,
      done | jnp.isin(token, jnp.array(stop, jnp.int32)),
      token,
      state,
    )

  batch = tokens.shape[0]
  carry = (
    jnp.int32(0),
    jnp.full((batch, new_tokens), pad, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, bool),
    tokens[:, -1],
    state,
  )
  carry = carry if first is None else body(carry, first)
  step = functools.partial(body, step=step)
  _, written, lengths, *_ = jax.lax.while_loop(
    lambda c: (c[0] < new_tokens) & ~c[3].all(), step, carry
  )
  return Generated(written, lengths)


def _cached(run, model, backbone, tokens, mask, new_tokens):
  """(first, step, state): the logits of the next token from the prompts, then from one token more,
  by keys and values that are kept; Nones where a method has more to keep."""
  room = jnp.zeros((tokens.shape[0], tokens.shape[1] + new_tokens), jnp.int32)
  held = jax.eval_shape(lambda: run(backbone, room, room, mutable=['cache'])[1]['cache'])
  if grown(held, room.shape[1]):
    return None, None, None
  holders = {
    path[path.index(EXTRAS) + 1]
    for path in traverse_util.flatten_dict(held, keep_empty_nodes=True)
    if EXTRAS in path
  }
  if isinstance(model, Tuned) and any(
    isinstance(r, Call) and r.taps and r.name not in holders for r, _ in model.rules
  ):
    return None, None, None

  def go_on(tokens, mask, held):
    logits, held = run({**backbone, 'cache': held}, tokens, mask, mutable=['cache'])
    return logits[:, -1], held['cache']

  first = lambda token, i, held: go_on(tokens, mask, held)
  step = lambda token, i, held: go_on(token[:, None], jnp.ones_like(token)[:, None], held)
  return first, step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), held)


def _again(run, backbone, tokens, mask, new_tokens):
  """(step, state): the same, by running the whole text: its room is all there from the start,
  masked.
  """
  room = lambda x: jnp.pad(x, ((0, 0), (0, new_tokens)))

  def step(token, i, state):
    end = tokens.shape[1] + i
    written, seen = (x.at[:, end].set(new) for x, new in zip(state, (token, 1), strict=True))
    logits = run(backbone, written, seen)
    return jax.lax.dynamic_index_in_dim(logits, end, 1, keepdims=False), (written, seen)

  return step, (room(tokens), room(mask))


def draw(key: jax.Array, logits: jax.Array, temperature=1.0, top_p=1.0) -> jax.Array:
  """Tokens [B] drawn from logits [B, V], see `generate`."""
  order = jnp.argsort(-logits, -1)
  ranked = jnp.take_along_axis(logits, order, -1) / temperature
  chance = jax.nn.softmax(ranked, -1)
  before = jnp.cumsum(chance, -1) - chance
  place = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf))
  return jnp.take_along_axis(order, place[:, None], -1)[:, 0]
