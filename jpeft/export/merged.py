"""Merged weights in the layout of Hugging Face: the untouched model computes what was trained."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import models, tasks
from jpeft.core import Method, Tuned, Weight, leaf_paths
from jpeft.writing import filled

from .beside import save_preprocessing, save_tokenizer


def check_mergeable(method: Method) -> None:
  """Raises a ValueError if no weights express a method."""
  for _, rule in method:
    if not rule.mergeable:
      raise ValueError(
        f'{method.names[0]} cannot be merged: {rule.name} changes the computation, not '
        'the weights; jpeft.predict runs it as it is'
      )


def save_merged(
  folder: pathlib.Path,
  pretrained: models.Pretrained,
  tuned: Tuned,
  theta: Any,
  example: dict,
  labels: Sequence[str],
  config: Any,
  problem: str | None = None,
  units: tuple[np.ndarray, np.ndarray] | None = None,
) -> float:
  """Writes what AutoModelFor... of transformers opens: a merged backbone and all beside it.

  Heads and hidden units that a method prunes are cut off.

  Args:
    folder: new or empty.
    pretrained: the backbone.
    tuned: a method attached to it, which merges.
    theta: as trained.
    example: a batch on which merged and tuned model are compared.
    labels: of the head; none for a model that writes text.
    config: of the run.
    problem: what the config calls the task, see `Task.problem`.
    units: (shift, scale) of the outputs, see `Task.units`; the merged head gives outputs * scale +
      shift.

  Returns:
    The largest difference of the logits of both on the example.

  Raises:
    ValueError: the head has no bias that can hold the shift.
  """
  merged = jax.jit(tuned.merge)(theta, pretrained.variables)
  args, kwargs = tasks.inputs(example)
  tuned_logits = tuned.apply(theta, pretrained.variables, *args, **kwargs, deterministic=True)
  if units is not None:
    shift, scale = units
    merged = _in_units(merged, tuned, shift, scale)
    tuned_logits = tuned_logits * scale + shift
  model, merged = _without_zeros(pretrained.model, merged, tuned, theta)
  plain_logits = model.apply(merged, *args, **kwargs, deterministic=True)

  about = dict(pretrained.config)
  if labels:
    about['id2label'] = dict(enumerate(labels))
    about['label2id'] = {name: i for i, name in enumerate(labels)}
  if problem is not None:
    about['problem_type'] = problem
  max_length = config.data.max_length
  if config.task in ('language', 'preferences'):
    max_length = None  # there, of rows and of texts that are compared
  about.pop('torch_dtype', None)  # the old name of the next one
  about['dtype'] = str(jax.tree.leaves(merged)[0].dtype)
  with filled(folder) as part:
    about |= save_tokenizer(part, pretrained, max_length)
    models.save_pretrained(part, model, merged, about)
    save_preprocessing(part, pretrained, config.data.resize)
  return float(jnp.abs(tuned_logits - plain_logits).max())


def _without_zeros(model: Any, merged: Any, tuned: Tuned, theta: Any) -> tuple[Any, Any]:
  """(model, weights) without the heads and hidden units that a method has multiplied by zero."""
  if not any(isinstance(rule, Weight) and rule.cuts for rule, _ in tuned.rules):
    return model, merged
  try:
    keep = models.keep_of(tuned, theta)
  except TypeError as error:  # not a model whose sizes jpeft knows
    raise ValueError(f'{tuned.method.names[0]}: {error}') from error
  if not models.cuts_anything(keep):
    return model, merged
  return models.narrowed(model, merged, keep)


def _in_units(merged: Any, tuned: Tuned, shift: np.ndarray, scale: np.ndarray) -> Any:
  """Weights whose outputs are those of `merged` times scale plus shift, [K] each.

  The Dense layers of the head that give the outputs are scaled; of two heads the model takes the
  mean, so that each of them is.
  """
  arrays = leaf_paths(merged)
  outputs = tuned.sites[''].out.shape[-1]
  last = [
    site
    for site in tuned.sites.find('{head}')
    if {'kernel', 'bias'} <= site.leaves.keys() and site.leaves['bias'].shape == (outputs,)
  ]
  if not last:
    raise ValueError(
      'the head learned standardised numbers and has no bias that could hold their mean: predict '
      'with jpeft.predict, or train with config.loss.standardize=false to merge'
    )
  changed = {}
  for site in last:
    for path, x in arrays.items():
      if path == f'params/{site.path}/kernel':
        changed[path] = x * scale.astype(x.dtype)
      if path == f'params/{site.path}/bias':
        changed[path] = (x * scale + shift).astype(x.dtype)
  leaves = [changed.get(path, x) for path, x in arrays.items()]
  return jax.tree.unflatten(jax.tree.structure(merged), leaves)
