"""Texts to write: the completions of prompts, and the assistant's part of chats."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data, models
from jpeft.core import Tuned
from jpeft.models import grown

from .metrics import registered_scores
from .task import Task, loss


def source(config, split: str) -> data.Source:
  """The chats or prompts of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or data with labels.
  """
  found = data.load(config.data.name, split, config.data.dir)
  if found.classes:
    raise ValueError(
      f"{config.data.name} has labels, and no texts to write: set config.task='classification', or "
      'give phonemes or completions:PATH'
    )
  if config.model.num_classes is not None:
    raise ValueError(
      f'config.model.num_classes is {config.model.num_classes}, but {config.data.name} has no labels'
    )
  return data.in_memory(found) if config.data.in_memory else found


def check(config, tuned: Tuned) -> None:
  """Raises a ValueError if a method adds tokens where several texts share a row: only the first
  would see them.
  """
  room = jax.ShapeDtypeStruct((1, config.data.max_length), jnp.int32)
  run = lambda theta, backbone, x: tuned.apply(theta, backbone, x, mask=x, mutable=['cache'])[1][
    'cache'
  ]
  if config.data.pack and grown(
    jax.eval_shape(run, tuned.shapes, tuned.backbone, room), room.shape[1]
  ):
    raise ValueError(
      f'{config.method.name} adds tokens to the sequence, which only the first of several texts in a '
      'row would see: set config.data.pack=false'
    )


def rows(config, pretrained, source, training: bool) -> tuple[data.Packed, None]:
  """(rows of tokens, None)."""
  tokenizer = models.decoder_tokenizer(pretrained)
  return data.Packed(
    source, tokenizer, config.data.max_length, config.data.chat, config.data.pack
  ), None


def blank(config, pretrained) -> dict[str, np.ndarray]:
  """A batch of one empty row.

  Raises:
    ValueError: the backbone is no decoder.
  """
  models.check_decoder(pretrained)
  tokens = np.zeros((1, config.data.max_length), np.int32)
  return {'tokens': tokens, 'token_mask': np.ones_like(tokens), 'label': tokens}


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Of logits [B, N, V] and labels [B, N], sums over the tokens of completions: loss, right
  guesses, their number.
  """
  learnt = (labels >= 0) & (mask[:, None] > 0)
  right = learnt & (logits.argmax(-1) == labels)
  return {
    'loss': jnp.where(learnt, loss(logits, labels), 0).sum(),
    'right': right.sum(),
    'tokens': learnt.sum(),
  }


def scores(tally: dict[str, np.ndarray]) -> dict[str, float]:
  """perplexity, loss and accuracy a token of the completions."""
  mean = float(tally['loss'] / tally['tokens'])
  own = {
    'perplexity': math.exp(min(mean, 700)),
    'loss': mean,
    'accuracy': float(tally['right'] / tally['tokens']),
  }
  return own | registered_scores('language', tally)


def written(config, pretrained, source, write: Callable, stop: Callable) -> dict[str, float] | None:
  """exact_match and the error rate of greedy completions of the first `eval.generate` examples.

  The error rate is the number of words to insert, delete or replace, over that of the words that
  were asked for; phonemes are the words of the phoneme data. Blanks at the ends do not count, and a
  text is as long as the longest of the right ones at most.
  """
  count = min(config.eval.generate, len(source))
  if not count:
    return {}
  tokenizer = models.decoder_tokenizer(pretrained)
  prompts, wanted = zip(
    *(data.prompt(source[i], tokenizer, config.data.chat) for i in range(count)), strict=True
  )
  most = 1 + max(len(tokenizer.encode(text)) for text in wanted)
  pairs = []
  for ids, right in zip(
    write(prompts, new_tokens=most, stop=(tokenizer.eos,), pad=tokenizer.pad), wanted, strict=True
  ):
    if stop():
      return None
    pairs.append((tokenizer.decode(ids).split(), right.split()))
  return {
    'exact_match': sum(a == b for a, b in pairs) / count,
    f'{source.unit}_error_rate': sum(distance(*pair) for pair in pairs)
    / sum(len(b) for _, b in pairs),
  }


def distance(a: Sequence, b: Sequence) -> int:
  """How many insertions, deletions and replacements make a of b."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    before, row = row, [i]
    for j, y in enumerate(b, 1):
      row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
  return row[-1]


LANGUAGE = Task(source, rows, blank, tally, scores, check, written, untuned=True)
