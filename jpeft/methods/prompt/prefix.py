"""Prefix tuning and P-tuning v2: learned keys and values before those of every attention layer.

Li & Liang, 2021 (arXiv 2101.00190); Liu et al., 2022, "P-Tuning v2" (2110.07602;
THUDM/P-tuning-v2). With m rows K_p, V_p [m, kv heads, head size] in each layer,

  out = attention(q, [K_p; K], [V_p; V]) = (1 - l) attention(q, K, V) + l attention(q, K_p, V_p),

l being the share of the softmax that falls on the prefix. Masks and biases are widened: every query
sees the prefix. The rows are what the attention function takes, behind any rotation by position.
Cross attention has rows of its own. They start as N(0, 1), as in Hugging Face peft, or as zero;
zero keys take a share of the softmax too, so the function does not start as the backbone.

With `hidden` = h the rows of all L layers are made of one table e [m, d], as in prefix tuning:

  [m, 2 L kv heads head size] = tanh(e W_1 + b_1) W_2 + b_2,    W_1 [d, h], W_2 [h, ..]

e ~ N(0, 1); the maps start as torch's, uniform within 1 / sqrt(fan_in). It is a device of training:
`tuned.expand(theta)` is the theta of a prefix without it, with equal outputs.

Deviations. The rows are trained directly by default, as in P-tuning v2 and peft. Tokens keep their
positions 0, 1, ...; libraries that pass the prefix as a cache count on from m, and a model with
positions must do so itself to run the files that they trained.

In the file format of peft, prompt_embeddings [m, 2 * layers * kv heads * head size], viewed as
[m, 2 * layers, kv heads, head size], has the keys of layer i at 2 i and its values at 2 i + 1. Not
mergeable.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Place, Site, at, factory, generated

from ..check import require, whole, within
from ..keys import more_keys
from ..nn import drop, uniform

# The standard deviation of the rows at first.
STARTS = {'normal': 1.0, 'zero': 0.0}


@factory
def prefix(
  tokens: int = 20,
  dropout: float = 0.0,
  init: str = 'normal',
  hidden: int | None = None,
  targets: str = '{attention}',
  name: str = 'prefix',
) -> Method:
  """Keys and values that every query sees.

  Args:
    tokens: m.
    dropout: rate on the entries of the rows.
    init: 'normal' or 'zero'.
    hidden: h of the maps that make the rows; None to train the rows.
    targets: pattern of the modules that call their own `attention_fn`, or compute attention inline
      and have an anatomy that knows how (`Anatomy.attention`).
    name: in theta: {'keys', 'values'}, [m, kv heads, head size] each; with `hidden`
      {'table', 'w1', 'b1', 'w2', 'b2'} at the path ''.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a module whose attention
      is out of reach.
  """
  whole('prefix', 'tokens', tokens, 0)
  within('prefix', 'dropout', dropout, 0, 1)
  require(init in STARTS, 'prefix', 'init', init, "must be 'normal' or 'zero'")
  method = _Prefix(tokens, dropout, init, targets, name).method()
  if hidden is None:
    return method
  whole('prefix', 'hidden', hidden, 1)
  require(init == 'normal', 'prefix', 'init', init, 'of rows that are made of a table is its own')
  maps = _Reparametrised(tokens, hidden)
  return generated(method, maps.init, maps.expand)


@dataclasses.dataclass(frozen=True, eq=False)
class _Prefix:
  """The rule of `prefix`; the fields are its arguments."""

  tokens: int
  dropout: float
  start: str
  targets: str
  name: str

  def method(self) -> Method:
    rule = Call(self.name, self.apply, self.init, requires='attention')
    return at(self.targets, rule)

  def init(self, key, site: Site, arrays) -> dict:
    key_keys, key_values = jax.random.split(key)
    shape = (self.tokens, *site.heads)
    std = STARTS[self.start]
    return {
      'keys': std * jax.random.normal(key_keys, shape),
      'values': std * jax.random.normal(key_values, shape),
    }

  def apply(self, t, call, *args, **kwargs):
    """Runs an attention module with the rows before its keys and values."""
    dropout_keys = {'keys': None, 'values': None}
    if self.dropout:
      key = call.rng('prefix dropout')
      if key is not None:
        key_keys, key_values = jax.random.split(key)
        dropout_keys = {'keys': key_keys, 'values': key_values}

    def rows(name, *batch):
      """The rows under a name, [*batch, m, kv heads, head size], after dropout."""
      same = jnp.broadcast_to(t[name], (*batch, *t[name].shape))
      return drop(same, dropout_keys[name], self.dropout)

    def wrap(attention_fn):
      def attend(query, key, *args, **kwargs):
        batch = key.shape[:-3]
        with_rows = more_keys(attention_fn, rows('keys', *batch), rows('values', *batch))
        return with_rows(query, key, *args, **kwargs)

      return attend

    return call.attend(wrap, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Reparametrised:
  """The rows of all layers as a function of one table."""

  tokens: int
  hidden: int

  def init(self, key, places: Mapping[str, Place]) -> dict:
    width = next(iter(places.values())).site.input.shape[-1]
    rows = sum(_numbers_of_row(place) for place in places.values())
    key_table, *keys = jax.random.split(key, 5)
    return {
      '': {
        'table': jax.random.normal(key_table, (self.tokens, width)),
        'w1': uniform(keys[0], (width, self.hidden), width**-0.5),
        'b1': uniform(keys[1], (self.hidden,), width**-0.5),
        'w2': uniform(keys[2], (self.hidden, rows), self.hidden**-0.5),
        'b2': uniform(keys[3], (rows,), self.hidden**-0.5),
      }
    }

  def expand(self, t, places: Mapping[str, Place]) -> dict:
    shared = t['']
    inner = jnp.tanh(shared['table'] @ shared['w1'] + shared['b1'])
    rows = inner @ shared['w2'] + shared['b2']  # [m, numbers of a row in all layers]
    made = {}
    start = 0
    for path, place in places.items():
      shape = place.t['keys'].shape  # [layers.., m, kv heads, head size]
      layers = shape[:-3]
      end = start + _numbers_of_row(place)
      own = rows[:, start:end].reshape(self.tokens, *layers, 2, *shape[-2:])
      own = jnp.moveaxis(own, 0, -3)  # [layers.., 2, m, kv heads, head size]
      made[path] = {'keys': own[..., 0, :, :, :], 'values': own[..., 1, :, :, :]}
      start = end
    return made


def _numbers_of_row(place: Place) -> int:
  """How many numbers a row has in the layers of one site: of keys and of values."""
  *layers, _, heads, size = place.t['keys'].shape
  return math.prod(layers) * 2 * heads * size
