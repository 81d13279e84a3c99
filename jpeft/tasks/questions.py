"""Questions whose answer is a span of a text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import cli, data

from . import spans
from .losses import Objective, known, likeliest, loss, loss_of_teacher
from .metrics import further_scores
from .task import NO_FACTS, Answer, Facts, Task
from .texts import arrays_of, check_entries, check_unlabelled, encoder_of


def source(config, split: str) -> data.Source:
  """The questions of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or an answer that is not in its text.
  """
  found = data.load(config.data.name, split, config.data.dir, 'answers')
  check_entries(config, found, ('question', 'context', 'answers'))
  check_unlabelled(config)
  if config.eval.no_answer is None:
    for i in range(len(found)):
      if not found[i]['answers']:
        raise ValueError(
          f'example {i} of {split!r} has no answer: set config.eval.no_answer=0.0, by how much the '
          'score of no answer must be above that of the best span'
        )
  return found


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple['data.Windows', None]:
  """(windows of texts, None).

  Raises:
    ValueError: the backbone has no tokenizer, or a question has no room; see `Windows`.
  """
  names = tuple(arrays_of(config, pretrained))
  stride = config.data.stride
  if stride is None:
    stride = config.data.max_length // 4
  return data.Windows(source, encoder_of(config, pretrained), stride, names), None


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty row.

  Raises:
    ValueError: the backbone does not read texts.
  """
  return arrays_of(config, pretrained) | {'label': np.zeros((1, 2), np.int32)}


def objective(config, facts: Facts = NO_FACTS) -> Objective:
  """Softmax cross-entropy over the tokens of a row, of the first and of the last of the answer."""

  def losses(logits, labels):
    return loss(_by_end(logits), labels)

  def right(logits, labels):
    return likeliest(_by_end(logits), labels)

  def distances(logits, told, labels):
    return loss_of_teacher(_by_end(logits), _by_end(told), labels)

  return Objective(losses, right, known, distances=distances)


def _by_end(logits: jax.Array) -> jax.Array:
  """[B, N, 2] as [B, 2, N]: scores of tokens, to start and to end the answer."""
  return jnp.moveaxis(logits, -1, -2)


def tally(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """What is kept of the rows of a batch.

  Args:
    logits: [B, N, 2].
    labels: [B, 2] integers, the first and the last token of the answer.
    mask: [B], 0 for rows that only fill the batch up.

  Returns:
    loss: a scalar; ends: how many labels there are; logits: [B, N, 2], kept for each row.
  """
  losses = loss(_by_end(logits), labels)  # [B, 2]
  return {
    'loss': (losses * mask[:, None]).sum(),
    'ends': 2 * mask.sum(),
    'logits': logits.astype(jnp.float32),
  }


def judged(config, tally: dict[str, np.ndarray], windows: 'data.Windows') -> dict[str, np.ndarray]:
  """The tally with sums over the questions in place of the logits of windows.

  Returns:
    loss, ends: as they are; exact, f1 and questions: [2] each, of questions that have an answer and
    of those that have none.
  """
  sums = {name: np.zeros(2) for name in ('exact', 'f1', 'questions')}
  found = _best(config, tally['logits'], windows)
  for example, one in zip(windows.examples, found, strict=True):
    answer = _answer(config, example, one)
    given = [text for text, _ in example['answers']]
    kind = int(not given)
    sums['exact'][kind] += spans.exact(answer, given)
    sums['f1'][kind] += spans.f1(answer, given)
    sums['questions'][kind] += 1
  rest = {name: value for name, value in tally.items() if name != 'logits'}
  return rest | sums


def _best(config, logits: np.ndarray, windows: 'data.Windows') -> list[spans.Best]:
  """The best span of each question."""
  of_example: list[list] = [[] for _ in windows.examples]
  for window, row in zip(windows.windows, logits, strict=True):
    of_example[window.example].append((row, window.offsets))
  return [spans.best(one, config.eval.answer_tokens) for one in of_example]


def _answer(config, example: dict, best: spans.Best) -> str:
  """The text of the best span; '' where no answer is likelier by `eval.no_answer`."""
  if _has_none(config, best):
    return ''
  start, end = _place(example, best)
  return example['context'][start:end]


def _place(example: dict, best: spans.Best) -> tuple[int, int]:
  """(first character, the one after the last) of the best span, without blanks of its tokens."""
  text = example['context'][best.start : best.end]
  start = best.start + len(text) - len(text.lstrip())
  return start, start + len(text.strip())


def _has_none(config, best: spans.Best) -> bool:
  threshold = config.eval.no_answer
  return threshold is not None and best.none - best.score > threshold


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """f1 and exact_match of all questions, the loss, and registered metrics.

  Where some questions have an answer and some have none, also f1 and exact_match of those that
  have one (`answered_`), and the accuracy on those that have none.
  """
  questions = tally['questions']
  own = {
    'f1': float(tally['f1'].sum() / questions.sum()),
    'exact_match': float(tally['exact'].sum() / questions.sum()),
    'loss': float(tally['loss'] / tally['ends']),
  }
  if questions.all():
    own['answered_f1'] = float(tally['f1'][0] / questions[0])
    own['answered_exact_match'] = float(tally['exact'][0] / questions[0])
    own['no_answer_accuracy'] = float(tally['exact'][1] / questions[1])
  return own | further_scores('questions', tally, names)


# ---- What a model says to questions.


def read(names: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
  """(the questions, the examples) of JSON lines {"question", "context"}.

  Raises:
    ValueError: a line that is no such object.
  """
  examples = []
  for name in names:
    for number, line in enumerate(cli.lines(name), 1):
      if line.strip():
        examples.append(data.question(line, f'line {number} of {name}'))
  if not examples:
    raise ValueError(f'there is no question in {", ".join(names)}')
  return [example['question'] for example in examples], examples


def asked(config, pretrained, examples: Sequence[dict]) -> tuple['data.Windows', None]:
  """The windows of questions."""
  return rows(config, pretrained, examples, False)


def answers(
  config, outputs: np.ndarray, windows: 'data.Windows', examples, labels, facts: Facts
) -> list[Answer]:
  """The best span of each question, or '' for none, and its probability in its window."""
  found = []
  for example, best in zip(examples, _best(config, outputs, windows), strict=True):
    text = _answer(config, example, best)
    values = {'answer': text, 'probability': float(best.probability)}
    values['start'], values['end'] = _place(example, best)
    if _has_none(config, best):
      values |= {'probability': float(best.none_probability), 'start': None, 'end': None}
    found.append(Answer((text, f'{values["probability"]:.4f}'), values))
  return found


QUESTIONS = Task(
  source,
  rows,
  example,
  tally,
  scores,
  head='questions',
  outputs=lambda labels: 2,
  keeps_head=True,
  objective=objective,
  kept=('logits',),
  judged=judged,
  read=read,
  asked=asked,
  answers=answers,
)
