"""Prefix tuning and P-tuning v2: learned keys and values in front of those of every attention
layer.

Li & Liang, 2021 (arXiv 2101.00190); Liu et al., 2022, "P-Tuning v2" (2110.07602;
THUDM/P-tuning-v2). With m rows K_p, V_p [m, kv heads, head size] in each layer,

  out = attention(q, [K_p; K], [V_p; V]) = (1 - l) attention(q, K, V) + l attention(q, K_p, V_p),

l being the share of the softmax that falls on the prefix. Masks and biases are widened: every query
sees the prefix. The rows are what the attention function takes, behind any rotation by position.
Cross attention has rows of its own. They start as N(0, 1), as in Hugging Face peft, or as zero;
zero keys take a share of the softmax too, so the function does not start as the backbone.

Deviations. The rows are trained directly, the default of P-tuning v2 and of peft: the MLP of prefix
tuning, over one table for all layers, is a device of training that is dropped afterwards, and would
couple what theta holds apart layer by layer. Tokens keep their positions 0, 1, ...; libraries that
pass the prefix as a cache count on from m, and a model with positions must do so itself to run the
files that they trained.

In the file format of peft, prompt_embeddings [m, 2 * layers * kv heads * head size] holds, viewed
as [m, 2 * layers, kv heads, head size], the keys of layer i at 2 i and its values at 2 i + 1. Not
mergeable.
"""

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Site, at, factory

from ..nn import drop

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
    targets: pattern of the modules that call their own `attention_fn`; others are served where
      their anatomy has `attend`.
    name: in theta: {'keys', 'values'}, [m, kv heads, head size] each.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a module that computes attention
      inline.
  """
  if int(tokens) != tokens or tokens < 0:
    raise ValueError(f'tokens={tokens!r} must be a whole number, at least 0')
  if not 0 <= dropout <= 1:
    raise ValueError(f'dropout={dropout!r} must lie in [0, 1]')
  if init not in ('normal', 'zero'):
    raise ValueError(f"prefix: init={init!r} must be 'normal' or 'zero'")
  std = 1.0 if init == 'normal' else 0.0

  def begin(key, site, arrays):
    keys, shape = jax.random.split(key), (tokens, *_heads(site, name))
    return {
      n: std * jax.random.normal(k, shape) for n, k in zip(('keys', 'values'), keys, strict=True)
    }

  def apply(t, call, *args, **kwargs):
    key = call.rng('prefix dropout') if dropout else None
    sub = dict(zip(t, (None, None) if key is None else jax.random.split(key), strict=True))
    rows = lambda n, *batch: drop(jnp.broadcast_to(t[n], (*batch, *t[n].shape)), sub[n], dropout)
    if call.site.heads is None:
      return call.site.model.anatomy.attend(call, rows('keys'), rows('values'), *args, **kwargs)
    with call.inject(attention_fn=_prefixed(call.module.attention_fn, rows, tokens)):
      return call(*args, **kwargs)

  return at(targets, Call(name, apply, begin))


def _heads(site: Site, name: str) -> tuple[int, int]:
  """(kv heads, head size) of a module that a prefix can be put into."""
  anatomy = site.model.anatomy
  if site.heads is not None:
    return site.heads
  if anatomy is None or anatomy.attend is None or anatomy.heads is None:
    raise ValueError(
      f'{name}: {site.kind} at {site.path!r} calls no attention_fn of its own that could see '
      'more keys; give its class that field, or its anatomy `attend` and `heads` '
      '(jpeft.register_anatomy)'
    )
  return anatomy.heads(site)


def _prefixed(attention, rows, tokens: int):
  """attention(query, key, value, bias, mask, ...) with rows before keys [.., M, heads, size] and
  values.
  """

  def run(query, key, value, *args, is_causal: bool = False, **kwargs):
    length, batch = key.shape[-3], key.shape[:-3]
    kwargs |= dict(zip(ARGUMENTS, args, strict=False))
    if refused := [n for n in _REFUSED if kwargs.get(n) is not None]:
      raise ValueError(
        f'prefix: {refused[0]} counts keys, and there are {tokens} more: use a mask instead'
      )
    if is_causal:
      kwargs['mask'] = _causal(query.shape[-3], length, kwargs.get('mask'))
    kwargs |= {n: _widened(kwargs[n], length, tokens) for n in ('bias', 'mask') if n in kwargs}
    key = jnp.concatenate([rows('keys', *batch).astype(key.dtype), key], -3)
    value = jnp.concatenate([rows('values', *batch).astype(value.dtype), value], -3)
    return attention(query, key, value, **kwargs)

  return run


def _causal(queries: int, keys: int, mask) -> jax.Array:
  seen = jnp.tril(jnp.ones((1, 1, queries, keys), bool))
  return seen if mask is None else seen & mask


def _widened(x, length: int, tokens: int):
  """A mask or bias [.., M] for `tokens` more keys, which everyone sees; one for all keys as it
  is.
  """
  if x is None or x.shape[-1] != length:
    return x
  seen = jnp.full(
    (*x.shape[:-1], tokens), 0 if jnp.issubdtype(x.dtype, jnp.floating) else 1, x.dtype
  )
  return jnp.concatenate([seen, x], -1)
