"""Metrics: what an evaluation reports, computed from a tally that is summed over its batches."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jpeft.config import TASKS, TEXT_METRICS, allow
from jpeft.registering import module_of

from . import agreement
from .agreement import Tally


class Metric(NamedTuple):
  """A number that says how good theta is.

  Attributes:
    compute: summed tally -> float.
    task: the name of the task whose tally it reads.
    lower_is_better: whether the best theta has the least value.
    module: where it was registered; None for a metric of jpeft.
  """

  compute: Callable[[Tally], float] | None
  task: str
  lower_is_better: bool
  module: str | None = None


# Those of jpeft are computed together, by the tasks; see `Task.scores`.
_OWN = {
  'accuracy': Metric(None, 'both', False),
  'macro_f1': Metric(None, 'classification', False),
  'loss': Metric(None, 'both', True),
  'perplexity': Metric(None, 'language', True),
  'mean_average_precision': Metric(None, 'multilabel', False),
  'micro_f1': Metric(None, 'multilabel', False),
  'subset_accuracy': Metric(None, 'multilabel', False),
  'mse': Metric(None, 'regression', True),
  'rmse': Metric(None, 'regression', True),
  'mae': Metric(None, 'regression', True),
  'r2': Metric(None, 'regression', False),
  'precision': Metric(None, 'tokens', False),
  'recall': Metric(None, 'tokens', False),
  'exact_match': Metric(None, 'questions', False),
  'margin': Metric(None, 'preferences', False),
}
# Computed where `eval.metric` or `eval.also` names them.
_ON_REQUEST = {
  'f1': Metric(agreement.f1, 'classification', False),
  'balanced_accuracy': Metric(agreement.balanced_accuracy, 'classification', False),
  'matthews': Metric(agreement.matthews, 'classification', False),
  'pearson': Metric(agreement.pearson, 'classification', False),
  'spearman': Metric(agreement.spearman, 'classification', False),
}
METRICS: dict[str, Metric] = {**_OWN, **_ON_REQUEST}


def register_metric(
  name: str,
  compute: Callable[[Tally], float],
  *,
  task: str = 'classification',
  lower_is_better: bool = False,
) -> None:
  """Adds a metric to every evaluation of a task, and to the choices of `eval.metric`.

  Args:
    name: in metrics.jsonl, reports and configurations.
    compute: summed tally -> float. The tally of 'classification' has 'loss', a sum over examples,
      and 'confusion' [C, C], counts by label and prediction; that of 'multilabel' 'logit' and
      'label' [N, C] (NaN where it is not known); that of 'regression' 'prediction' and 'label'
      [N, K] (NaN where it is missing), in the units of the data; that of 'language' 'loss', 'right'
      and 'tokens', sums over the tokens of completions, and so has that of 'masked', of the words
      that were chosen; that of 'tokens' has 'loss', 'confusion' and 'entities' [T, 3], how many of
      each type there are, are guessed, and are both; that of 'questions' 'exact', 'f1' and
      'questions' [2], sums over questions with an answer and without; that of 'preferences'
      'rewards' [N, 2], of the chosen and the rejected answer, and 'losses' [N].
    task: its name, as in `config.task`.
    lower_is_better: whether the best theta has the least value.

  Raises:
    ValueError: jpeft has a metric of that name, or no such task.
  """
  if name in _OWN or name in _ON_REQUEST or name in TEXT_METRICS:
    raise ValueError(f'{name!r} is a metric of jpeft: choose another name')
  if task not in TASKS:
    raise ValueError(f'task={task!r} must be {_or(TASKS)}')
  METRICS[name] = Metric(compute, task, lower_is_better, module_of(compute))
  allow('eval.metric', name, task)


def _or(names: Iterable[str]) -> str:
  """'a', 'b' or 'c'."""
  *others, last = map(repr, names)
  return f'{", ".join(others)} or {last}'


def registered_module(name: str) -> str | None:
  """The module that registered a metric; None for a metric of jpeft."""
  return METRICS[name].module


def requested(config) -> tuple[str, ...]:
  """The metrics that a configuration names."""
  return (config.eval.metric, *config.eval.also)


def further_scores(task: str, tally: Tally, names: Sequence[str] = ()) -> dict[str, float]:
  """{name: value} of the metrics of a task that were registered from outside jpeft, or are named.

  Args:
    task: its name.
    tally: summed over an evaluation.
    names: from `requested`.
  """
  chosen = {
    name: metric
    for name, metric in METRICS.items()
    if metric.task == task and (name in names or name not in _ON_REQUEST)
  }
  return {
    name: float(metric.compute(tally))
    for name, metric in chosen.items()
    if metric.compute is not None
  }


def best(metric: str, rows: list[dict]) -> dict:
  """The evaluation that is best by a metric, the first of equals."""
  if METRICS[metric].lower_is_better:
    return min(rows, key=lambda row: row[metric])
  return max(rows, key=lambda row: row[metric])


def stale(metric: str, rows: list[dict]) -> int:
  """How many evaluations followed the best one; 0 if there is none."""
  if not rows:
    return 0
  return len(rows) - 1 - rows.index(best(metric, rows))


def better(metric: str, new: dict, rows: list[dict]) -> bool:
  """Whether an evaluation is better than all before it."""
  return best(metric, [*rows, new]) is new
