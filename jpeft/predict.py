"""Labels for images or texts, by the model of a run.

    python -m jpeft.predict --run runs/a --input cat.png dog.png
    python -m jpeft.predict --run runs/a --input photos/ --out labels.csv
    python -m jpeft.predict --run runs/b --input reviews.txt --json
    python -m jpeft.predict --run runs/b --input 'new.csv?keep=id' --out labels.jsonl

Of a folder, all images below it are read. A text file has one text a line; - reads stdin. Tables
(.csv, .tsv, .jsonl) have the columns that the run was trained on, or others: new.csv?text=sentence,
with the options of csv:PATH and jsonl:PATH. keep=id,source names columns that are kept in the file.

A run of task='tokens' tags what stands between blanks, one of task='masked' names the words for
[MASK], and one of task='questions' reads JSON lines with 'question' and 'context'.
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jpeft import cli, data, tasks, training


def main(argv: list[str]) -> int:
  parser = cli.run_parser('jpeft.predict', __doc__)
  parser.add_argument(
    '--input',
    nargs='+',
    required=True,
    help='images and folders of them, or texts: files of lines and tables; - is stdin',
  )
  parser.add_argument(
    '--json', action='store_true', help='a JSON object a line, with all probabilities'
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    help='a file to write, FILE.csv or FILE.jsonl, with all probabilities',
  )
  parser.add_argument('--overwrite', action='store_true', help='replace the file of --out')
  flags = parser.parse_args(argv)

  with cli.inputs_checked():
    _check_out(flags)
    config, info = training.describe(flags.run)
    task = tasks.of(config)
    if task.answer is None and task.answers is None:
      if task.head is None:
        raise ValueError(
          f'{flags.run} learned no labels (config.task={config.task!r}), so there is nothing to '
          'predict: merge it, and train a method for your labels on the merged folder'
        )
      raise ValueError(f'{flags.run} writes texts: python -m jpeft.generate --run {flags.run}')
    names = flags.input
    if task.read is None:
      names = [_input(name, config.data.name) for name in names]
    for name in names:
      _check_input(name)
    read = task.read or tasks.modality(info['reads']).read
    places, examples = read(names)
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
  places = [place if isinstance(place, dict) else {'input': place} for place in places]
  found = training.answers(config, pretrained, tuned, theta, examples, info)
  if flags.out is None:
    _print(places, list(found), flags.json)
    return 0

  progress = training.Progress()
  count = progress.stage('predicting', len(examples))
  with cli.inputs_checked():
    training.save_answers(flags.out, places, _shown(found, count))
  progress.note(f'{flags.out}: {len(places):,} predictions')
  return 0


def _check_out(flags) -> None:
  """Raises an error if the file of --out cannot be written, or is not asked for as it must be."""
  if flags.out is None:
    if flags.overwrite:
      raise ValueError('--overwrite is of the file of --out, which is not given')
    return
  if flags.json:
    raise ValueError('--json is of what is printed; with --out, give FILE.jsonl')
  training.check_writable(flags.out, flags.overwrite)


def _input(name: str, of_run: str) -> str:
  """A name of --input as a modality reads it: tables have the columns of the data of the run."""
  if data.kind_of_table(name) is None:
    return name
  if of_run.startswith('glue:'):
    return data.glue_input(name, of_run)
  return data.like_columns(name, of_run)


def _check_input(name: str) -> None:
  """Raises a FileNotFoundError unless there is such a file, folder or table, or it is stdin."""
  if data.kind_of_table(name) is not None:
    name = name.partition('?')[0]
  if not pathlib.Path(name).is_dir():
    cli.check_input(name)


def _shown(found: Iterator[tasks.Answer], count) -> Iterator[tasks.Answer]:
  """The answers; each is counted when the next is asked for."""
  for answer in found:
    yield answer
    count.add(1)


def _print(places: Sequence[dict[str, Any]], found: list[tasks.Answer], as_json: bool) -> None:
  for place, answer in zip(places, found, strict=True):
    if as_json:
      print(json.dumps({'input': place['input'], **answer.values}))
    else:
      print('\t'.join((place['input'], *answer.columns)))


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.predict', main))
