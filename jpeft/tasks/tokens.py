"""Tags of words: named entities, parts of speech."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data

from . import entities, labelled
from .losses import loss
from .metrics import further_scores
from .task import NO_FACTS, Answer, Facts, Task
from .texts import arrays_of, check_entries, encoder_of


def source(config, split: str) -> data.Source:
  """The sentences of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or not as many tags as the config says.
  """
  found = labelled.source(config, split, 'tags')
  check_entries(config, found, ('words', 'label'))
  return found


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple['data.TaggedWords', None]:
  """(rows of tokens, None).

  Raises:
    ValueError: the backbone has no tokenizer, or a word cannot be read; see `TaggedWords`.
  """
  names = tuple(arrays_of(config, pretrained))
  return data.TaggedWords(source, encoder_of(config, pretrained), names), None


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty row.

  Raises:
    ValueError: the backbone does not read texts.
  """
  arrays = arrays_of(config, pretrained)
  return arrays | {'label': np.zeros((1, config.data.max_length), np.int32)}


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over the words of a batch.

  Args:
    logits: [B, N, C].
    labels: [B, N] integers, negative for tokens that do not begin a word.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: a scalar; confusion: [C, C] counts by label and prediction; tags: [B, N, 2], label and
    prediction, kept for each row, since an entity has several words.
  """
  guesses = logits.argmax(-1).astype(jnp.int32)
  learned = (labels >= 0) & (mask[:, None] > 0)
  classes = logits.shape[-1]
  pair = jnp.where(learned, labels * classes + guesses, classes**2)  # the last is left out
  confusion = jnp.zeros(classes**2 + 1, jnp.int32).at[pair].add(1)[:-1]
  return {
    'loss': jnp.where(learned, loss(logits, labels), 0).sum(),
    'confusion': confusion.reshape(classes, classes),
    'tags': jnp.stack([labels, guesses], -1),
  }


def judged(config, tally: dict[str, np.ndarray], rows) -> dict[str, np.ndarray]:
  """The tally with counts of entities in place of the tags of each row.

  Returns:
    loss, confusion: as they are; entities: [T, 3], how many of each type there are, are guessed,
    and are both.
  """
  labels, guesses = np.moveaxis(tally['tags'], -1, 0)  # [R, N] each
  found = entities.counts(labels, guesses, entities.scheme(rows.classes))
  rest = {name: value for name, value in tally.items() if name != 'tags'}
  return rest | {'entities': found}


def by_type(
  tally: dict[str, np.ndarray], labels: Sequence[str], facts: Facts
) -> dict[str, dict[str, float]]:
  """The scores of each type of entity, and how many of it the examples have."""
  types = entities.scheme(labels).types
  return {
    kind: {'examples': int(count[0]), **entities.rates(count)}
    for kind, count in zip(types, tally['entities'], strict=True)
  }


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """f1, precision and recall of entities, accuracy and loss a word, and registered metrics."""
  confusion = np.asarray(tally['confusion'], np.float64)
  own = {
    **entities.rates(tally['entities'].sum(0)),
    'accuracy': float(np.diag(confusion).sum() / confusion.sum()),
    'loss': float(tally['loss'] / confusion.sum()),
  }
  return own | further_scores('tokens', tally, names)


# ---- What a model says of texts.


def asked(config, pretrained, examples: Sequence[dict]) -> tuple['data.TaggedWords', None]:
  """The rows of texts, whose words are what stands between blanks."""
  sentences = data.Source(
    read=lambda i: {'words': examples[i]['text'].split()}, rows=range(len(examples)), classes=[]
  )
  return rows(config, pretrained, sentences, False)


def predicted(logits: jax.Array, batch, facts: Facts) -> dict[str, jax.Array]:
  """The likeliest tag of each token and its probability, [B, N] each."""
  probability = jax.nn.softmax(logits.astype(jnp.float32))
  return {'tag': logits.argmax(-1), 'probability': probability.max(-1)}


def answers(
  config, outputs: dict[str, np.ndarray], rows, examples, labels: Sequence[str], facts: Facts
) -> list[Answer]:
  """The tags of the words of each text, and the entities that they mark.

  A word beyond `data.max_length` tokens, or without a token, has no tag: '-', in JSON null.
  """
  found: dict[int, tuple[dict[int, int], dict[int, float]]] = {}
  for i in range(len(rows)):
    number, tags = rows.of_words(i, outputs['tag'][i])
    _, probability = rows.of_words(i, outputs['probability'][i])
    found[number] = tags, probability
  table = entities.scheme(labels)
  answers = []
  for number, example in enumerate(examples):
    words = example['text'].split()
    tags, probability = found.get(number, ({}, {}))
    names = [labels[tags[word]] if word in tags else None for word in range(len(words))]
    values = {
      'words': words,
      'tags': names,
      'probabilities': [_float(probability.get(word)) for word in range(len(words))],
      'entities': _told(words, tags, table),
    }
    answers.append(Answer((' '.join(name or '-' for name in names),), values))
  return answers


def _float(x: np.floating | None) -> float | None:
  return None if x is None else float(x)


def _told(words: Sequence[str], tags: dict[int, int], table: entities.Scheme) -> list[dict]:
  """The entities of a sentence; a word without a tag is outside of all."""
  outside = len(table.type_of) - 1
  numbers = np.array([tags.get(word, outside) for word in range(len(words))], int)
  found = []
  for first, last, kind in zip(*entities.entities(numbers, table), strict=True):
    text = ' '.join(words[first : last + 1])
    place = {'first': int(first), 'last': int(last)}
    found.append({'type': table.types[kind], **place, 'text': text})
  return found


TOKENS = Task(
  source,
  rows,
  example,
  tally,
  scores,
  head='tokens',
  kept=('tags',),
  judged=judged,
  by_label=by_type,
  asked=asked,
  predicted=predicted,
  answers=answers,
)
