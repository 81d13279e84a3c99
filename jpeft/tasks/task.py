"""What tasks have in common."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core import Method, chain

from .losses import Objective, softmax

# What a run found out about its labels, as in run.json: numbers, texts, lists and dicts of them.
Facts = Mapping[str, Any]
NO_FACTS: Facts = MappingProxyType({})


def _nothing_found(config, source) -> dict[str, Any]:
  return {}


def _softmax(config, facts: Facts) -> Objective:
  return softmax(config.loss.label_smoothing)


def _as_they_are(outputs, batch, facts: Facts):
  return outputs


def _no_units(facts: Facts) -> None:
  return None


def _no_labels(tally, labels, facts: Facts) -> dict[str, dict[str, float]]:
  return {}


def _tally_itself(config, tally, rows):
  return tally


def _no_parts(config, pretrained) -> Method:
  return chain()


class Teacher(NamedTuple):
  """A teacher that is the moving average of the model: it says what the model is to say.

  Attributes:
    momentum: (config, updates in all) -> a function: number of updates -> the share of itself that
      the teacher keeps in the next one.
    shown: batch -> the batch that it reads.
    told: its outputs for a whole batch -> arrays [B, ...]. They are in the batch of the update as
      'told', which a rule of `Task.parts` takes.
  """

  momentum: Callable[..., Callable[[Any], Any]]
  shown: Callable[[Mapping[str, Any]], dict[str, Any]]
  told: Callable[[Any], Any]


class Answer(NamedTuple):
  """What a model says of one example.

  Attributes:
    columns: what a line shows after the name of the input.
    values: the same and more, for JSON.
  """

  columns: tuple[str, ...]
  values: dict[str, Any]


class Task(NamedTuple):
  """One kind of thing to learn. Its batches have 'label', of any shape.

  Attributes:
    source: (config, split) -> the examples of a split.
    rows: (config, pretrained, source, training, facts) -> (rows, transform), what `Batches` makes
      batches of. Rows have 'index', the number of their first example, and may have `about`, a
      sentence for the report.
    example: (config, pretrained, outputs) -> a batch of one empty row: the shapes to attach a
      method and to compile with. `outputs` is the number of outputs of the head.
    tally: (outputs, labels, mask) -> what `scores` needs of one batch, mask [B] being False for
      rows that only fill up the last one. Tallies are added, but for those that `kept` names.
    scores: (a summed tally, names of further metrics, facts) -> {metric: value}.
    check: (config, tuned) -> nothing; raises a ValueError for a method that the rows do not go
      with.
    written: (config, pretrained, source, write, stop) -> {metric: value} of texts that the model
      writes, {} where it writes none, None if stop() came true; `write` is `generate.completions`
      of the model.
    untuned: whether the untouched model can be scored, so that a report may say what it was before.
    tally_losses: (losses, right, labels, mask) -> the same tally from the loss of each label and
      whether it is the likeliest; None where a tally needs outputs.
    head: what the head gives, see `models.load`.
    outputs: labels -> the number of outputs of a fresh head; 0 where the model keeps its own.
    keeps_head: whether a head that the files have is kept in place of a fresh one: one whose
      outputs mean the same in all models.
    usual: how many labels to plan for where the data are not read.
    facts: (config, training split) -> what has to be known of the labels to learn and to predict
      them, such as their mean. It is kept in run.json.
    objective: (config, facts) -> the loss. Facts may be missing, for a plan without data.
    kept: entries [B, ...] of the tally that are kept for each example rather than added.
    judged: (config, summed tally, rows) -> the tally that `scores` reads, where what is right
      depends on more of the rows than their labels.
    predicted: (outputs, batch, facts) -> arrays [B, ...] of what `jpeft predict` says.
    answer: (one row of `predicted`, its example, labels, facts) -> Answer; None for a task whose
      runs `jpeft predict` does not serve, or that has `answers`.
    read: files that a user names -> (a name for each example, the examples); None where the
      modality of the backbone reads them.
    asked: (config, pretrained, examples) -> (rows, transform) of `jpeft predict`; None where the
      modality makes a row of each example.
    answers: (config, all rows of `predicted`, the rows, examples, labels, facts) -> an Answer for
      each example, of a task whose examples may have several rows, or several answers.
    by_label: (the tally that `scores` reads, labels, facts) -> {label: {score: value}} for the
      report; {} where a task has none.
    units: facts -> (shift, scale) [K] by which outputs become what the data have; None where they
      are that already. Merged weights hold it.
    problem: what the config of a Hugging Face model calls the task; None to leave it as it is.
    parts: (config, pretrained) -> the method that the task itself adds, behind that of the run: its
      theta, such as a decoder, is trained along and dropped at the end. Arguments that its rules
      take (`takes=`) are the arrays of a batch that have their names.
    teacher: a moving average of the model that teaches it; None for none.
  """

  source: Callable[..., Any]
  rows: Callable[..., tuple[Any, Callable | None]]
  example: Callable[..., dict[str, Any]]
  tally: Callable[..., dict[str, jax.Array]]
  scores: Callable[..., dict[str, float]]
  check: Callable[..., None] = lambda *_: None
  written: Callable[..., dict[str, float] | None] = lambda *_: {}
  untuned: bool = False
  tally_losses: Callable[..., dict[str, jax.Array]] | None = None
  head: str | None = 'classification'
  outputs: Callable[[Sequence[str]], int] = len
  keeps_head: bool = False
  usual: int = 10
  facts: Callable[..., dict[str, Any]] = _nothing_found
  objective: Callable[[Any, Facts], Objective] = _softmax
  kept: tuple[str, ...] = ()
  judged: Callable[..., dict[str, Any]] = _tally_itself
  predicted: Callable[..., Any] = _as_they_are
  answer: Callable[..., Answer] | None = None
  by_label: Callable[..., dict[str, dict[str, float]]] = _no_labels
  units: Callable[[Facts], tuple[np.ndarray, np.ndarray] | None] = _no_units
  problem: str | None = None
  read: Callable[..., tuple[list[str], list[dict[str, Any]]]] | None = None
  asked: Callable[..., tuple[Any, Callable | None]] | None = None
  answers: Callable[..., list[Answer]] | None = None
  parts: Callable[..., Method] = _no_parts
  teacher: Teacher | None = None
