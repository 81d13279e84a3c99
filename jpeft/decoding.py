"""Writing text with a decoder: many prompts at once, greedy or sampled, in one compiled program."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jpeft.core import EXTRAS, Call, NotAtHead, Tuned, at_head, attach, chain
from jpeft.models import grown

AT_ONCE = 32  # prompts of a batch


class Generated(NamedTuple):
  """New tokens of a batch of prompts.

  Attributes:
    tokens: word ids [B, T]; the pad id after the end of a text.
    lengths: how many of them each text has [B], its stop token included.
  """

  tokens: jax.Array
  lengths: jax.Array


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(tokens [B, N], mask [B, N]) of prompts of several lengths, which all end at the last column.

  Raises:
    ValueError: there is no prompt, or an empty one.
  """
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise ValueError('there must be prompts, and each must have a token')
  tokens = np.full((len(prompts), max(map(len, prompts))), pad, np.int32)
  mask = np.zeros(tokens.shape, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, -len(prompt) :] = prompt
    mask[i, -len(prompt) :] = 1
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
    pad: id that is written after the end of a text.
    key: of the draws.
    cache: keep keys and values of earlier tokens; a side network whose blocks are the decoder's own
      keeps its own beside them. If a method runs other blocks that mix tokens, or adds tokens to
      the sequence, the whole text runs again for each token all the same: no cache has what it
      computes.

  Raises:
    ValueError: an argument outside its range, no key to draw with, or prompts padded on the right.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  if mask is None:
    mask = jnp.ones(tokens.shape, jnp.int32)
  mask = (jnp.asarray(mask) != 0).astype(jnp.int32)
  _check(model, theta, tokens, mask, new_tokens, temperature, top_p, key)
  if key is None:
    key = jax.random.key(0)  # not read
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
  count = len(tokens)
  size = min(AT_ONCE, count)
  for start in range(0, count, size):
    # The last batch repeats the last prompt, so that all have one size and compile once.
    some = np.minimum(np.arange(start, start + size), count - 1)
    batch_key = key
    if key is not None:
      batch_key = jax.random.fold_in(key, start)
    found = jax.device_get(
      generate(model, backbone, tokens[some], mask[some], pad=pad, key=batch_key, **options)
    )
    for i in range(min(size, count - start)):
      yield found.tokens[i, : found.lengths[i]].tolist()


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
  run = _run_of(model, theta, backbone, tokens, mask)
  if cache and _is_cacheable(run, model, backbone, tokens, new_tokens):
    first, step, state = _cached(run, backbone, tokens, mask, new_tokens)
  else:
    first, step, state = _uncached(run, backbone, tokens, mask, new_tokens)

  def write(carry, step):
    """Writes one token from the logits that `step` returns after the token before it."""
    i, written, lengths, done, token, state = carry
    logits, state = step(token, i - 1, state)
    logits = logits.astype(jnp.float32)
    if greedy:
      token = jnp.argmax(logits, -1)
    else:
      token = draw(jax.random.fold_in(key, i), logits, temperature, top_p)
    token = jnp.where(done, pad, token).astype(jnp.int32)
    written = written.at[:, i].set(token)
    lengths = lengths + ~done
    done = done | jnp.isin(token, jnp.array(stop, jnp.int32))
    return i + 1, written, lengths, done, token, state

  batch = tokens.shape[0]
  carry = (
    jnp.int32(0),
    jnp.full((batch, new_tokens), pad, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros(batch, bool),
    tokens[:, -1],
    state,
  )
  # The first step reads whole prompts, other shapes than those in the loop.
  if first is not None:
    carry = write(carry, first)

  def goes_on(carry):
    i, _, _, done, _, _ = carry
    return (i < new_tokens) & ~done.all()

  carry = jax.lax.while_loop(goes_on, functools.partial(write, step=step), carry)
  _, written, lengths, _, _, _ = carry
  return Generated(written, lengths)


# ---- The two ways to the logits of the next token [B, V].


def _run_of(model, theta, backbone, tokens, mask) -> Callable:
  """(variables, tokens, mask, place, caching) -> (logits [B, V] of the word after a place, cache).

  The head runs on that place alone, if rules reach it.
  """
  tuned = model
  if theta is None:
    tuned = attach(model, chain(), backbone, tokens, mask=mask)
    theta = tuned.init(jax.random.key(0), backbone)
  made, unreached = at_head(tuned, 'place', 'place', _head_at, training=False)
  if not unreached:
    try:
      place = 0, tokens.shape[1]
      jax.eval_shape(lambda: made.apply(theta, backbone, tokens, mask=mask, place=place))
    except NotAtHead as error:
      unreached = str(error)

  def run(variables, tokens, mask, place, caching=False):
    options = {'mask': mask, 'mutable': ['cache'] if caching else False}
    if unreached:
      out = tuned.apply(theta, variables, tokens, **options)
    else:
      out = made.apply(theta, variables, tokens, place=(place, tokens.shape[1]), **options)
    logits, state = out if caching else (out, {})
    if unreached:
      logits = jax.lax.dynamic_slice_in_dim(logits, place, 1, axis=1)
    return logits[:, 0], state.get('cache')

  return run


def _head_at(asked, head, arrays, x):
  """The head on one place of its input [B, N, D], asked as (place, N)."""
  place, length = asked
  if x.shape[1] != length:
    raise NotAtHead(f'the head reads {x.shape[1]} tokens, and the text has {length}')
  return head(arrays, jax.lax.dynamic_slice_in_dim(x, place, 1, axis=1))


def _cache_of(run, backbone, tokens, new_tokens):
  """The shapes of the model's cache with room for prompts and new tokens."""
  room = jnp.zeros((tokens.shape[0], tokens.shape[1] + new_tokens), jnp.int32)
  return jax.eval_shape(lambda: run(backbone, room, room, 0, caching=True)[1])


def _is_cacheable(run, model, backbone, tokens, new_tokens) -> bool:
  """Whether the cache has all that a method computes of earlier tokens.

  It does not if the method adds tokens to the sequence, or reads taps without a cache of its own.
  """
  cache = _cache_of(run, backbone, tokens, new_tokens)
  if grown(cache, tokens.shape[1] + new_tokens):
    return False
  if not isinstance(model, Tuned):
    return True
  # Rules keep their caches in the model's own: [..., EXTRAS, name of the rule, ...].
  cached_rules = set()
  for path in traverse_util.flatten_dict(cache, keep_empty_nodes=True):
    if EXTRAS in path:
      cached_rules.add(path[path.index(EXTRAS) + 1])
  for rule, _ in model.rules:
    if isinstance(rule, Call) and rule.taps and rule.name not in cached_rules:
      return False
  return True


def _cached(run, backbone, tokens, mask, new_tokens):
  """(first, step, state): from the prompts, then from one more token; the state is the cache."""

  def extend(tokens, mask, cache):
    return run({**backbone, 'cache': cache}, tokens, mask, tokens.shape[1] - 1, caching=True)

  def first(token, i, cache):
    return extend(tokens, mask, cache)

  def step(token, i, cache):
    token = token[:, None]  # [B, 1]
    return extend(token, jnp.ones_like(token), cache)

  shapes = _cache_of(run, backbone, tokens, new_tokens)
  return first, step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _uncached(run, backbone, tokens, mask, new_tokens):
  """(None, step, state): from the whole text each time; the state is the text and its mask.

  The room for new tokens is there from the start, masked, so that shapes do not change.
  """
  length = tokens.shape[1]
  room = ((0, 0), (0, new_tokens))

  def step(token, i, state):
    text, mask = state
    end = length + i
    text = text.at[:, end].set(token)
    mask = mask.at[:, end].set(1)
    logits, _ = run(backbone, text, mask, end)
    return logits, (text, mask)

  return None, step, (jnp.pad(tokens, room), jnp.pad(mask, room))


def draw(key: jax.Array, logits: jax.Array, temperature=1.0, top_p=1.0) -> jax.Array:
  """Tokens [B] drawn from logits [B, V], see `generate`."""
  order = jnp.argsort(-logits, -1)
  ranked = jnp.take_along_axis(logits, order, -1) / temperature
  chance = jax.nn.softmax(ranked, -1)
  chance_before = jnp.cumsum(chance, -1) - chance
  allowed = jnp.where(chance_before < top_p, ranked, -jnp.inf)
  rank = jax.random.categorical(key, allowed)
  return jnp.take_along_axis(order, rank[:, None], -1)[:, 0]
