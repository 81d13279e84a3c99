"""Probabilities of labels, by the model of a run."""

from collections.abc import Sequence

import jax
import numpy as np

from jpeft import cli, data, tasks
from jpeft.core import Tuned

ROWS = 32  # examples a batch


def predictions(config, pretrained, tuned: Tuned, theta, examples: Sequence[dict]) -> np.ndarray:
  """The probability of each label [N, C] for each example, in float32.

  Args:
    config: of the run.
    pretrained, tuned, theta: from `reopen`.
    examples: of the backbone's modality: {'image': uint8 [H, W, C]} or {'text': str} each, or what
      a registered modality reads.
  """

  @jax.jit
  def probabilities(theta, backbone, batch):
    args, kwargs = tasks.inputs(batch)
    logits = tuned.apply(theta, backbone, *args, **kwargs, deterministic=True)
    return jax.nn.softmax(logits.astype('float32'))

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
    found.append(np.asarray(probabilities(theta, pretrained.variables, batch))[real])
  return np.concatenate(found)
