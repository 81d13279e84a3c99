"""What the model of a run says of examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jpeft import cli, data, tasks
from jpeft.core import Tuned

ROWS = 32  # examples a batch


def predictions(
  config,
  pretrained,
  tuned: Tuned,
  theta,
  examples: Sequence[dict],
  facts: tasks.Facts = tasks.NO_FACTS,
) -> Any:
  """What `Task.predicted` says of all examples, [N, ...]; of classes their probabilities [N, C].

  Args:
    config: of the run.
    pretrained, tuned, theta: from `reopen`.
    examples: of the backbone's modality: {'image': uint8 [H, W, C]} or {'text': str} each, or what
      a registered modality reads.
    facts: of run.json.
  """
  transform = tasks.modality_of(pretrained).transform(config, pretrained, False)
  return _of_rows(config, pretrained, tuned, theta, examples, transform, facts)


def answers(
  config, pretrained, tuned: Tuned, theta, examples: Sequence[dict], info: Mapping[str, Any]
) -> list[tasks.Answer]:
  """What the model of a run says of each example.

  Args:
    config: of the run.
    pretrained, tuned, theta: from `reopen`.
    examples: that the task or the modality reads, see `Task.read`.
    info: run.json.

  Raises:
    ValueError: an example that cannot be read.
  """
  task = tasks.of(config)
  labels = info['labels']
  facts = info.get('facts', {})
  if task.asked is not None:
    with cli.inputs_checked():
      rows, transform = task.asked(config, pretrained, examples)
    found = _of_rows(config, pretrained, tuned, theta, rows, transform, facts)
    return task.answers(config, found, rows, examples, labels, facts)
  found = predictions(config, pretrained, tuned, theta, examples, facts)
  answers = []
  for i, example in enumerate(examples):
    row = jax.tree.map(lambda x, i=i: x[i], found)
    answers.append(task.answer(row, example, labels, facts))
  return answers


def _of_rows(config, pretrained, tuned: Tuned, theta, rows, transform, facts: tasks.Facts) -> Any:
  """`Task.predicted` of all rows."""
  task = tasks.of(config)

  @jax.jit
  def predicted(theta, backbone, batch):
    args, kwargs = tasks.inputs(batch)
    outputs = tuned.apply(theta, backbone, *args, **kwargs, deterministic=True)
    return task.predicted(outputs, batch, facts)

  batches = data.Batches(
    rows,
    min(ROWS, len(rows)),
    transform,
    shuffle=False,
    epochs=1,
    drop_remainder=False,
  )
  found = []
  for batch in cli.checked(batches):
    real = batch['mask'] > 0  # the last batch is filled up
    made = jax.device_get(predicted(theta, pretrained.variables, batch))
    found.append(jax.tree.map(lambda x, real=real: x[real], made))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
