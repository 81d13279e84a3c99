"""What the model of a run says of examples, and files of it."""

import csv
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from jpeft import cli, data, tasks, writing
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
  return _joined(_of_rows(config, pretrained, tuned, theta, examples, transform, facts))


def answers(
  config, pretrained, tuned: Tuned, theta, examples: Sequence[dict], info: Mapping[str, Any]
) -> Iterator[tasks.Answer]:
  """What the model of a run says of each example, batch by batch.

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
    found = _joined(_of_rows(config, pretrained, tuned, theta, rows, transform, facts))
    yield from task.answers(config, found, rows, examples, labels, facts)
    return
  transform = tasks.modality_of(pretrained).transform(config, pretrained, False)
  remaining = iter(examples)
  for made in _of_rows(config, pretrained, tuned, theta, examples, transform, facts):
    for i in range(len(jax.tree.leaves(made)[0])):
      row = jax.tree.map(lambda x, i=i: x[i], made)
      yield task.answer(row, next(remaining), labels, facts)


def _of_rows(
  config, pretrained, tuned: Tuned, theta, rows, transform, facts: tasks.Facts
) -> Iterator[Any]:
  """`Task.predicted` of all rows, batch by batch."""
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
  for batch in cli.checked(batches):
    real = batch['mask'] > 0  # the last batch is filled up
    made = jax.device_get(predicted(theta, pretrained.variables, batch))
    yield jax.tree.map(lambda x, real=real: x[real], made)


def _joined(batches: Iterable[Any]) -> Any:
  return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


# ---- Files.

SUFFIXES = ('.csv', '.jsonl')


def check_writable(file: pathlib.Path, overwrite: bool) -> None:
  """Raises a ValueError or an OSError unless answers can be written to `file`."""
  if file.suffix not in SUFFIXES:
    raise ValueError(f'--out {file} must end in {" or ".join(SUFFIXES)}')
  if file.is_dir() or (file.exists() and not overwrite):
    raise ValueError(f'--out {file} is there already; give another file, or --overwrite')
  if not file.absolute().parent.is_dir():
    raise FileNotFoundError(f'--out {file}: there is no folder {file.parent}')


def save_answers(
  file: pathlib.Path, places: Sequence[dict[str, Any]], found: Iterable[tasks.Answer]
) -> None:
  """Writes a line for each example as its answer comes; the file appears when all are there.

  A line has what its place has, and the values of the answer. In a .csv a dict is a column for each
  of its keys, 'probabilities:red', and a list is JSON.

  Args:
    file: .csv or .jsonl; one that is there is replaced.
    places: what says which example it is, see `Modality.read`.
    found: an answer for each.
  """
  with (
    writing.appearing(file) as part,
    part.open('w', encoding='utf-8', newline='') as lines,
  ):
    write = _json_lines(lines)
    if file.suffix == '.csv':
      write = _table(lines, places)
    for place, answer in zip(places, found, strict=True):
      write(place, answer.values)


def _json_lines(lines: TextIO) -> Callable[[dict, dict], None]:
  """A function (place, values) that writes an object a line."""

  def write(place: dict, values: dict) -> None:
    lines.write(json.dumps(place | values) + '\n')

  return write


def _table(lines: TextIO, places: Sequence[dict[str, Any]]) -> Callable[[dict, dict], None]:
  """The same for a row of a table; its columns are those of all places and of the first values."""
  names = dict.fromkeys(name for place in places for name in _cells(place))
  table: csv.DictWriter | None = None

  def write(place: dict, values: dict) -> None:
    nonlocal table
    cells = _cells(values)
    if table is None:
      table = csv.DictWriter(lines, [*names, *cells], restval='', lineterminator='\n')
      table.writeheader()
    table.writerow(_cells(place) | cells)

  return write


def _cells(values: dict[str, Any]) -> dict[str, Any]:
  """{column: cell} of values."""
  cells = {}
  for name, value in values.items():
    if isinstance(value, dict):
      cells |= {f'{name}:{key}': cell for key, cell in _cells(value).items()}
    elif isinstance(value, list):
      cells[name] = json.dumps(value)
    else:
      cells[name] = value
  return cells
