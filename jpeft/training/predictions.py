"""What the model of a run says of examples."""

from collections.abc import Sequence
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
  task = tasks.of(config)

  @jax.jit
  def predicted(theta, backbone, batch):
    args, kwargs = tasks.inputs(batch)
    outputs = tuned.apply(theta, backbone, *args, **kwargs, deterministic=True)
    return task.predicted(outputs, batch, facts)

  transform = tasks.modality_of(pretrained).transform(config, pretrained, False)
  batches = data.Batches(
    examples,
    min(ROWS, len(examples)),
    transform,
    shuffle=False,
    epochs=1,
    drop_remainder=False,
  )
  found = []
  for batch in cli.checked(batches):
    real = batch['mask'] > 0  # the last batch is filled up
    rows = jax.device_get(predicted(theta, pretrained.variables, batch))
    found.append(jax.tree.map(lambda x, real=real: x[real], rows))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
