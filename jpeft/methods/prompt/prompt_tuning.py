"""Prompt tuning: learned rows before the embedded words of a frozen language model.

Lester et al., 2021 (arXiv 2104.08691; google-research/prompt-tuning). With p rows P [p, d] and the
words x_1 .. x_N of a text, the model runs on

  [P; E(x_1); .. E(x_N)]

in place of the looked-up words E(x): the rows get the positions 0 .. p - 1, the words those from p
on, and everything sees the rows. What the model gives for each token it gives for the words alone.
What reads the first token (a BERT classifier) reads the first row, as in Hugging Face peft. In an
encoder-decoder the rows go before the words of the encoder alone.

The model is called with p more tokens, whose ids -1, -2, .. no word has; where the words are looked
up, row i stands in for the id -1 - i. So whatever the model adds to its words (positions, types, a
norm) it adds to the rows. Types of the rows are 0.

The rows start as words drawn from the first `words` of the table (5000 in the paper, ordered by
frequency there), or as N(0, 1). The function does not start as the backbone's. In the files of peft
they are prompt_embeddings [p, d]; of an encoder-decoder [2 p, d], the last p of which peft never
reads.

Not mergeable. Of rows into which several texts are packed, only the first text sees the prompts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Call, Method, Site, at, chain, factory

from ..arguments import first_array, on_first
from ..check import require, whole, within
from ..masks import has_length
from ..nn import drop
from ..tokens import Tokens

STARTS = ('words', 'normal')


@factory
def prompt_tuning(
  tokens: int = 20,
  init: str = 'words',
  words: int = 5000,
  dropout: float = 0.0,
  embed: str = '{embed}(?:/.*)?',
  lookup: str = '__call__',
  name: str = 'prompt_tuning',
) -> Method:
  """Learned rows before the embedded words.

  Args:
    tokens: p.
    init: 'words', those of drawn words, or 'normal'.
    words: how many of the table's first rows are drawn from.
    dropout: rate on the entries of the rows.
    embed: pattern of the module that embeds words, and of those in it; the first that owns a table
      looks them up.
    lookup: the method of that module that does, of words [B, N].
    name: in theta: {'prompts': [p, d]} at that module.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a model that is not called with
      words [B, N], or looks them up in no module; at the call, an argument of which nothing is
      known for more tokens.
  """
  whole('prompt_tuning', 'tokens', tokens, 0)
  whole('prompt_tuning', 'words', words, 1)
  within('prompt_tuning', 'dropout', dropout, 0, 1)
  require(init in STARTS, 'prompt_tuning', 'init', init, f'must be one of {", ".join(STARTS)}')
  return PromptTuning(tokens, init, words, dropout, embed, lookup, name).method()


@dataclasses.dataclass(frozen=True, eq=False)
class PromptTuning:
  """The rules of `prompt_tuning`; the fields are its arguments."""

  tokens: int
  start: str
  words: int
  dropout: float
  embed: str
  lookup: str
  name: str

  def method(self) -> Method:
    lengthen = Call(self.name, self.apply_at_model, self.init_at_model)
    look_up = Call(self.name, self.apply_at_table, self.init_at_table, method=self.lookup)
    return chain(at('', lengthen), at(self.embed, look_up))

  # ---- At the model: more tokens.

  def init_at_model(self, key, site: Site, arrays) -> dict:
    """Nothing; a model that reads no words is refused."""
    tokens = site.input
    if tokens is None or len(tokens.shape) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      shape = None if tokens is None else f'{tokens.dtype}{list(tokens.shape)}'
      raise ValueError(
        f'{self.name}: prompts stand before words, integers [B, N], and {site.kind} is called with '
        f'{shape}; vpt_deep and vpt_shallow put them among other tokens'
      )
    self._table(site)
    return {}

  def apply_at_model(self, t, call: Bound, *args, **kwargs):
    """Runs the model with the ids of the rows before the words."""
    if call.has_cache:
      raise ValueError(
        f'{self.name}: the model is given a cache of earlier tokens, before which the prompts '
        'would enter again: call without a cache, as jpeft.decoding.generate does, which runs the '
        'whole text for each token'
      )
    words = first_array(call, args, kwargs)
    _, *others = call.inputs(*args, **kwargs)

    def longer(x):
      ids = jnp.broadcast_to(-1 - jnp.arange(self.tokens), (len(x), self.tokens))
      return jnp.concatenate([ids, x.astype(jnp.int32)], 1)

    def other(name, a):
      if not hasattr(a, 'shape') or _is_of_decoder(name):
        return a
      return self._longer(call.site, name, a, *words.shape)

    new_args, new_kwargs = on_first(call, args, kwargs, longer, other)
    out = call(*new_args, **new_kwargs)
    if any(map(_is_of_decoder, others)):
      return out  # of the decoder's words
    return jax.tree.map(lambda x: self._of_words(call.site, x, words.shape[1]), out)

  def _longer(self, site: Site, name: str, a, batch: int, length: int):
    """An argument beside the words, for the rows too.

    Raises:
      ValueError: nothing is known of it.
    """
    if not has_length(a, batch, length):
      return a
    is_kind = any(part in name for part in ('type', 'segment'))
    if is_kind and a.ndim == 2:
      return jnp.pad(a, ((0, 0), (self.tokens, 0)))
    rows = Tokens(self.tokens, 'front', causal=site.model.causal)
    is_bias = jnp.issubdtype(a.dtype, jnp.floating) and a.ndim > 2
    return rows.longer(site, name, a, batch, length, is_bias)

  def _of_words(self, site: Site, x, length: int):
    """An output without what it has for the rows; one that is not of each token as it is."""
    if not hasattr(x, 'ndim') or x.ndim < 2 or x.shape[1] != length + self.tokens:
      return x
    if x.ndim == 2 and (
      site.out is None or site.input is None or site.out.shape != site.input.shape
    ):
      return x  # numbers of a text, by chance as many as it has tokens
    return x[:, self.tokens :]

  # ---- Where words are looked up: the rows.

  def _table(self, site: Site) -> Site:
    """The module that looks words up: the first with a table.

    Raises:
      ValueError: there is none.
    """
    for found in site.model.find(self.embed):
      if found.path and self.lookup in found.methods and _tables(found):
        return found
    raise ValueError(
      f'{self.name}: embed={self.embed!r} names no module with a table whose '
      f'{self.lookup!r} is called: name the one that looks words up, and the method (lookup=)'
    )

  def init_at_table(self, key, site: Site, arrays) -> dict:
    if site.path != self._table(site).path:
      return {}
    (table,) = _tables(site)
    rows, width = site.leaves[table].shape
    if self.start == 'normal':
      return {'prompts': jax.random.normal(key, (self.tokens, width))}
    drawn = jax.random.randint(key, (self.tokens,), 0, min(rows, self.words))
    return {'prompts': jnp.asarray(arrays[table])[drawn].astype(jnp.float32)}

  def apply_at_table(self, t, call: Bound, *args, **kwargs):
    """Looks words up; the rows stand in for the ids below 0."""
    if 'prompts' not in t or not self.tokens:
      return call(*args, **kwargs)
    ids = first_array(call, args, kwargs)
    known_args, known_kwargs = on_first(call, args, kwargs, lambda x: jnp.maximum(x, 0))
    out = call(*known_args, **known_kwargs)
    rows = t['prompts']
    key = call.rng('prompt dropout') if self.dropout else None
    chosen = drop(rows[jnp.maximum(-1 - ids, 0)].astype(out.dtype), key, self.dropout)
    return jnp.where((ids < 0)[..., None], chosen, out)


def _tables(site: Site) -> list[str]:
  """The names of the arrays [V, d] of a site whose rows are looked up."""
  leaves = site.leaves.items()
  return [name for name, leaf in leaves if leaf.use == 'gather' and len(leaf.shape) == 2]


def _is_of_decoder(name: str) -> bool:
  """Whether an argument of a model, by its name, is about the decoder's words."""
  return name.startswith('decoder')
