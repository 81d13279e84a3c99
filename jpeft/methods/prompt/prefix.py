"""Prefix tuning and P-tuning v2: learned keys and values before those of every attention layer.

Li & Liang, 2021 (arXiv 2101.00190); Liu et al., 2022, "P-Tuning v2" (2110.07602;
THUDM/P-tuning-v2). With m rows K_p, V_p [m, kv heads, head size] in each layer,

  out = attention(q, [K_p; K], [V_p; V]) = (1 - l) attention(q, K, V) + l attention(q, K_p, V_p),

l being the share of the softmax that falls on the prefix. Masks and biases are widened: every query
sees the prefix. The rows are what the attention function takes, behind any rotation by position.
Cross attention has rows of its own. They start as N(0, 1), as in Hugging Face peft, or as zero;
zero keys take a share of the softmax too, so the function does not start as the backbone.

Deviations. The rows are trained directly, the default of P-tuning v2 and of peft: the MLP of prefix
tuning, over one table for all layers, is a device of training that is dropped afterwards, and would
couple the layers, whose rows are separate entries of theta. Tokens keep their positions 0, 1, ...;
libraries that pass the prefix as a cache count on from m, and a model with positions must do so
itself to run the files that they trained.

In the file format of peft, prompt_embeddings [m, 2 * layers * kv heads * head size], viewed as
[m, 2 * layers, kv heads, head size], has the keys of layer i at 2 i and its values at 2 i + 1. Not
mergeable.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, at, factory

from ..check import require, whole, within
from ..masks import seen_keys
from ..nn import drop

# The standard deviation of the rows at first.
STARTS = {'normal': 1.0, 'zero': 0.0}

# The arguments of an attention function behind query, key and value, by position.
ARGUMENTS = (
  'bias',
  'mask',
  'broadcast_dropout',
  'dropout_rng',
  'dropout_rate',
  'deterministic',
  'dtype',
)
# What would silently mean something else with more keys.
_REFUSED = ('key_value_seq_lengths', 'local_window_size')


@factory
def prefix(
  tokens: int = 20,
  dropout: float = 0.0,
  init: str = 'normal',
  targets: str = '{attention}',
  name: str = 'prefix',
) -> Method:
  """Keys and values that every query sees.

  Args:
    tokens: m.
    dropout: rate on the entries of the rows.
    init: 'normal' or 'zero'.
    targets: pattern of the modules that call their own `attention_fn`; others work where their
      anatomy has `attend`.
    name: in theta: {'keys', 'values'}, [m, kv heads, head size] each.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a module that computes attention
      inline.
  """
  whole('prefix', 'tokens', tokens, 0)
  within('prefix', 'dropout', dropout, 0, 1)
  require(init in STARTS, 'prefix', 'init', init, "must be 'normal' or 'zero'")
  return _Prefix(tokens, dropout, init, targets, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _Prefix:
  """The rule of `prefix`; the fields are its arguments."""

  tokens: int
  dropout: float
  start: str
  targets: str
  name: str

  def method(self) -> Method:
    return at(self.targets, Call(self.name, self.apply, self.init))

  def init(self, key, site: Site, arrays) -> dict:
    key_keys, key_values = jax.random.split(key)
    shape = (self.tokens, *self.heads(site))
    std = STARTS[self.start]
    return {
      'keys': std * jax.random.normal(key_keys, shape),
      'values': std * jax.random.normal(key_values, shape),
    }

  def heads(self, site: Site) -> tuple[int, int]:
    """(kv heads, head size) of a module that a prefix can be put into.

    Raises:
      ValueError: the module has no door for more keys.
    """
    if site.heads is not None:
      return site.heads
    anatomy = site.model.anatomy
    if anatomy is None or anatomy.attend is None or anatomy.heads is None:
      raise ValueError(
        f'{self.name}: {site.kind} at {site.path!r} calls no attention_fn of its own that could '
        'see more keys; give its class that field, or its anatomy `attend` and `heads` '
        '(jpeft.register_anatomy)'
      )
    return anatomy.heads(site)

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

    if call.site.heads is None:  # it computes attention inline, as its anatomy knows
      attend = call.site.model.anatomy.attend
      return attend(call, rows('keys'), rows('values'), *args, **kwargs)
    attention = _prefixed(call.module.attention_fn, rows, self.tokens)
    with call.inject(attention_fn=attention):
      return call(*args, **kwargs)


def _prefixed(attention: Callable, rows: Callable, tokens: int) -> Callable:
  """An attention function with rows before its keys and values [*batch, M, kv heads, head size].

  Args:
    attention: (query, key, value, bias, mask, ...) -> out.
    rows: ('keys' or 'values', *batch) -> [*batch, tokens, kv heads, head size].
    tokens: m.
  """

  def run(query, key, value, *args, is_causal: bool = False, **kwargs):
    *batch, length, _, _ = key.shape
    kwargs.update(zip(ARGUMENTS, args, strict=False))
    for name in _REFUSED:
      if kwargs.get(name) is not None:
        raise ValueError(
          f'prefix: {name} counts keys, and there are {tokens} more: use a mask instead'
        )
    if is_causal:  # a mask instead: the function itself would count the rows among the tokens
      kwargs['mask'] = _causal(query.shape[-3], length, kwargs.get('mask'))
    for name in ('bias', 'mask'):
      mask = kwargs.get(name)
      # An axis of one entry is for all keys, and broadcasts over the rows too.
      if mask is not None and mask.shape[-1] == length:
        kwargs[name] = jnp.concatenate([seen_keys(mask, tokens), mask], -1)
    key = jnp.concatenate([rows('keys', *batch).astype(key.dtype), key], -3)
    value = jnp.concatenate([rows('values', *batch).astype(value.dtype), value], -3)
    return attention(query, key, value, **kwargs)

  return run


def _causal(queries: int, keys: int, mask: jax.Array | None) -> jax.Array:
  """A causal mask [1, 1, queries, keys], and what another mask hides."""
  seen = jnp.tril(jnp.ones((1, 1, queries, keys), bool))
  if mask is None:
    return seen
  return seen & mask
