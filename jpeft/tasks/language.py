"""Texts to write: the completions of prompts, and the assistant's part of chats."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data, models
from jpeft.core import Tuned
from jpeft.models import grown

from . import likeness
from .losses import loss
from .metrics import further_scores
from .modality import check_length
from .task import NO_FACTS, Facts, Task


def source(config, split: str) -> data.Source:
  """The chats or prompts of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or data with labels.
  """
  likeness.asked_for(config.eval.also)  # their packages, before anything is read
  found = data.load(config.data.name, split, config.data.dir)
  if found.classes:
    raise ValueError(
      f"{config.data.name} has labels, and no texts to write: set config.task='classification', or "
      'give phonemes or completions:PATH'
    )
  if config.model.num_classes is not None:
    raise ValueError(
      f'config.model.num_classes is {config.model.num_classes}, but {config.data.name} has '
      'no labels'
    )
  if not config.data.in_memory:
    return found
  return data.in_memory(found, skip=config.data.on_error == 'skip')


def check(config, tuned: Tuned) -> None:
  """Raises a ValueError if a method adds tokens where several texts share a row.

  Only the first text of the row would see them.
  """
  if not config.data.pack:
    return
  tokens = jax.ShapeDtypeStruct((1, config.data.max_length), jnp.int32)

  def cache_of(theta, backbone, x):
    _, state = tuned.apply(theta, backbone, x, mask=x, mutable=['cache'])
    return state['cache']

  # A cache of more rows than there are tokens: the method adds some.
  cache = jax.eval_shape(cache_of, tuned.shapes, tuned.backbone, tokens)
  if grown(cache, config.data.max_length):
    raise ValueError(
      f'{config.method.name} adds tokens to the sequence, which only the first of several texts in '
      'a row would see: set config.data.pack=false'
    )


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[data.Packed, None]:
  """(rows of tokens, None).

  Raises:
    ValueError: rows longer than the model was made for, fewer rows than a batch, or texts that
      cannot be packed; see `Packed`.
  """
  length = config.data.max_length
  check_length(config, pretrained)
  tokenizer = models.decoder_tokenizer(pretrained)
  packed = data.Packed(source, tokenizer, length, config.data.chat, config.data.pack)
  if training and len(packed) < config.data.batch_size:
    raise ValueError(
      f'the training split fills {len(packed)} rows, fewer than the {config.data.batch_size} of a '
      f'batch: {packed.about}; lower config.data.batch_size, or config.data.max_length to have more'
    )
  if not training:
    _check_prompts(config, source, tokenizer, pretrained.config.get('max_position_embeddings'))
  return packed, None


def _check_prompts(config, source, tokenizer, positions: int | None) -> None:
  """Raises a ValueError if one of the prompts that are to be continued is empty or too long."""
  prompts, wanted = _asked(config, source, tokenizer)
  likeness.check_readable(likeness.asked_for(config.eval.also), wanted)
  for i, tokens in enumerate(prompts):
    if not tokens:
      raise ValueError(
        f'example {i} of the test split has an empty prompt, which nothing can be written after: '
        'set config.eval.generate=0'
      )
    if positions is not None and len(tokens) + _room(wanted, tokenizer) > positions:
      raise ValueError(
        f'example {i} of the test split has a prompt of {len(tokens)} tokens, which leaves no room '
        f'for a completion in the {positions} positions that the model was made for: set '
        'config.eval.generate=0'
      )


def _asked(config, source, tokenizer) -> tuple[list[list[int]], list[str]]:
  """(tokens of the prompts, completions that they should be given) of what is to be written."""
  prompts = []
  wanted = []
  for i in range(min(config.eval.generate, len(source))):
    tokens, text = data.prompt(source[i], tokenizer, config.data.chat)
    prompts.append(tokens)
    wanted.append(text)
  return prompts, wanted


def _room(wanted: Sequence[str], tokenizer) -> int:
  """How many tokens may be written: those of the longest completion, and the end."""
  return max(len(tokenizer.encode(text)) for text in wanted) + 1


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty row.

  Raises:
    ValueError: the backbone is no decoder, or rows are longer than it was made for.
  """
  models.check_decoder(pretrained)
  check_length(config, pretrained)
  tokens = np.zeros((1, config.data.max_length), np.int32)
  # The mask of packed rows has the number of the text of each token, from 1 on.
  return {'tokens': tokens, 'token_mask': np.ones_like(tokens), 'label': tokens}


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the tokens of completions.

  Args:
    logits: [B, N, V].
    labels: [B, N] integers, negative for tokens that are not learned.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: in nats; right: how many greedy guesses are right; tokens: how many there are.
  """
  right = logits.argmax(-1) == labels
  return tally_losses(loss(logits, labels), right, labels, mask)


def tally_losses(
  losses: jax.Array, right: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """The same sums from the loss of each token, and whether its label is the likeliest, [B, N]."""
  learned = (labels >= 0) & (mask[:, None] > 0)
  return {
    'loss': jnp.where(learned, losses, 0).sum(),
    'right': (learned & right).sum(),
    'tokens': learned.sum(),
  }


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """perplexity, loss and accuracy a token of the completions, and registered metrics."""
  return of_tokens(tally) | further_scores('language', tally, names)


def of_tokens(tally: dict[str, np.ndarray]) -> dict[str, float]:
  """perplexity, loss and accuracy a token of a summed tally."""
  mean = float(tally['loss'] / tally['tokens'])
  return {
    'perplexity': math.exp(min(mean, 700)),  # exp(710) overflows
    'loss': mean,
    'accuracy': float(tally['right'] / tally['tokens']),
  }


def written(config, pretrained, source, write: Callable, stop: Callable) -> dict[str, float] | None:
  """exact_match and the error rate of greedy completions of the first `eval.generate` examples.

  Beside these, the scores of `likeness` that `eval.also` names.

  The error rate is the number of words to insert, delete or replace, over that of the words that
  were asked for; phonemes are the words of the phoneme data. Blanks at the ends do not count, and a
  text is as long as the longest of the right ones at most. Where no word was asked for there is no
  error rate.
  """
  if not config.eval.generate:
    return {}
  tokenizer = models.decoder_tokenizer(pretrained)
  prompts, wanted = _asked(config, source, tokenizer)
  count = len(prompts)
  longest = _room(wanted, tokenizer)
  texts = write(prompts, new_tokens=longest, stop=(tokenizer.eos,), pad=tokenizer.pad)
  exact = 0
  errors = 0
  words = 0
  found_texts = []
  for tokens, right in zip(texts, wanted, strict=True):
    if stop():
      return None
    text = tokenizer.decode(tokens).strip()
    found_texts.append(text)
    found = text.split()
    asked = right.split()
    exact += found == asked
    errors += distance(found, asked)
    words += len(asked)
  scores = {'exact_match': exact / count}
  if words:
    scores[f'{source.unit}_error_rate'] = errors / words
  named = likeness.asked_for(config.eval.also)
  return scores | likeness.scores(named, found_texts, [text.strip() for text in wanted])


def distance(a: Sequence, b: Sequence) -> int:
  """How many insertions, deletions and replacements make `b` of `a` (Levenshtein's distance)."""
  # row[j] is the distance of the items of a so far and b[:j].
  row = list(range(len(b) + 1))
  for i, item in enumerate(a, 1):
    before = row
    row = [i]
    for j, other in enumerate(b, 1):
      deleted = before[j] + 1
      inserted = row[-1] + 1
      replaced = before[j - 1] + (item != other)
      row.append(min(deleted, inserted, replaced))
  return row[-1]


LANGUAGE = Task(
  source,
  rows,
  example,
  tally,
  scores,
  check=check,
  written=written,
  untuned=True,
  tally_losses=tally_losses,
  head='stored',
  outputs=lambda labels: 0,
)
