"""DePT: a short prompt, and a low-rank change of the embedded words by position.

Shi and Lipani, 2024 (arXiv 2309.05173); official code ZhengxiangShi/DePT. With m prompt rows P
[m, d], factors A [s, r] and B [r, d], and c = alpha / sqrt(r), the model runs on

  [P; E(x_1) + c (A B)_1; .. E(x_N) + c (A B)_N]         N <= s

in place of the embedded words: of a prompt of l rows, l d numbers, m d + (s + d) r are made, and
the sequence is l - m tokens shorter. P enters as in `prompt_tuning`. Row t of A B belongs to the
t-th word of every text, whatever word it is, so that texts are padded behind their words. In an
encoder-decoder the change is that of the encoder's words, told by the prompt before them.

A ~ U(-1, 1) / sqrt(r), B = 0: with B = 0 it is prompt tuning with m rows. The paper trains P at a
far higher rate than A and B: `optimizer.groups=(('.*/prompts', 100),)`.

Deviation. The paper writes the change without c, which is in the official code alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jpeft.core import Bound, Method, Site, at, factory

from ..arguments import first_array
from ..check import require, whole, within
from ..nn import uniform
from .prompt_tuning import STARTS, PromptTuning


@factory
def dept(
  tokens: int = 40,
  rank: int = 45,
  length: int = 256,
  alpha: float = 8,
  init: str = 'words',
  words: int = 5000,
  dropout: float = 0.0,
  embed: str = '{embed}(?:/.*)?',
  lookup: str = '__call__',
  name: str = 'dept',
) -> Method:
  """Decomposed prompt tuning.

  Args:
    tokens: m.
    rank: r.
    length: s, the most words of a text.
    alpha: the change is scaled by alpha / sqrt(rank).
    init, words, dropout, embed, lookup: of the prompt, see `prompt_tuning`.
    name: in theta: {'prompts': [m, d], 'a': [s, r], 'b': [r, d]} at the module that embeds.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, what `prompt_tuning` refuses, and
      no prompts before the words of an encoder-decoder; at the call, texts of more than s words.
  """
  whole('dept', 'tokens', tokens, 0)
  whole('dept', 'rank', rank, 1)
  whole('dept', 'length', length, 1)
  require(alpha > 0, 'dept', 'alpha', alpha, 'must be greater than 0')
  whole('dept', 'words', words, 1)
  within('dept', 'dropout', dropout, 0, 1)
  require(init in STARTS, 'dept', 'init', init, f'must be one of {", ".join(STARTS)}')
  prompts = PromptTuning(tokens, init, words, dropout, embed, lookup, name)
  return _ByPosition(prompts, rank, length, alpha / rank**0.5).method()


@dataclasses.dataclass(frozen=True, eq=False)
class _ByPosition:
  """The rules of `dept`.

  Attributes:
    prompts: the rules of its prompt.
    rank, length: r and s.
    scale: c.
  """

  prompts: PromptTuning
  rank: int
  length: int
  scale: float

  def method(self) -> Method:
    rules = []
    for pattern, rule in self.prompts.method():
      if pattern:  # where words are looked up
        rule = dataclasses.replace(rule, apply=self.apply, init=self.init)
      else:
        rule = dataclasses.replace(rule, apply=self.apply_at_model, init=self.init_at_model)
      rules += at(pattern, rule)
    return Method(rules)

  def init_at_model(self, key, site: Site, arrays) -> dict:
    is_pair = any(name.startswith('decoder') for name in site.inputs)
    if is_pair and not self.prompts.tokens:
      raise ValueError(
        f'{self.prompts.name}: in an encoder-decoder the words of the encoder are told by the '
        'prompt before them: tokens must be at least 1'
      )
    return self.prompts.init_at_model(key, site, arrays)

  def apply_at_model(self, t, call: Bound, *args, **kwargs):
    count = first_array(call, args, kwargs).shape[1]
    if count > self.length:
      raise ValueError(
        f'{self.prompts.name}: length={self.length} words of a text have a change, and a text has '
        f'{count}: cut the texts (data.max_length), or set length={count}'
      )
    return self.prompts.apply_at_model(t, call, *args, **kwargs)

  def init(self, key, site: Site, arrays) -> dict:
    theta = self.prompts.init_at_table(key, site, arrays)
    if not theta:
      return {}
    width = theta['prompts'].shape[1]
    a = uniform(jax.random.fold_in(key, 1), (self.length, self.rank), self.rank**-0.5)
    return {**theta, 'a': a, 'b': jnp.zeros((self.rank, width))}

  def apply(self, t, call: Bound, *args, **kwargs):
    if not t:
      return call(*args, **kwargs)
    ids = first_array(call, args, kwargs)
    out = self.prompts.apply_at_table(t, call, *args, **kwargs)
    change = self.scale * (t['a'] @ t['b'])  # [s, d]
    change = jnp.pad(change, ((self.prompts.tokens, ids.shape[1]), (0, 0)))[: ids.shape[1]]
    if self.prompts.tokens:
      # A decoder's words have no prompt before them.
      has_prompt = ids[:, :1, None] < 0
      change = jnp.where(has_prompt, change, 0)
    return out + change.astype(out.dtype)
