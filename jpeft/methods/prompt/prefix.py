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

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, at, factory

from ..check import require, whole, within
from ..keys import more_keys
from ..nn import drop

# The standard deviation of the rows at first.
STARTS = {'normal': 1.0, 'zero': 0.0}


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
    targets: pattern of the modules that call their own `attention_fn`, or compute attention inline
      and have an anatomy that knows how (`Anatomy.attention`).
    name: in theta: {'keys', 'values'}, [m, kv heads, head size] each.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a module whose attention
      is out of reach.
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
