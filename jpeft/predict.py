"""Labels for images or texts, by the model of a run.

    python -m jpeft.predict --run runs/a --input cat.png dog.png
    python -m jpeft.predict --run runs/b --input reviews.txt --json

A text file has one text a line; - reads stdin. A run of task='tokens' tags what stands between
blanks, one of task='masked' names the words for [MASK], and one of task='questions' reads JSON
lines with 'question' and 'context'.
"""

import json
import sys

from jpeft import cli, tasks, training


def main(argv: list[str]) -> int:
  parser = cli.run_parser('jpeft.predict', __doc__)
  parser.add_argument(
    '--input', nargs='+', required=True, help='images, or files of texts; - is stdin'
  )
  parser.add_argument(
    '--json', action='store_true', help='a JSON object a line, with all probabilities'
  )
  flags = parser.parse_args(argv)

  with cli.inputs_checked():
    config, info = training.describe(flags.run)
    task = tasks.of(config)
    if task.answer is None and task.answers is None:
      raise ValueError(f'{flags.run} writes texts: python -m jpeft.generate --run {flags.run}')
    for name in flags.input:
      cli.check_input(name)
    read = task.read or tasks.modality(info['reads']).read
    names, examples = read(flags.input)
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
  answers = training.answers(config, pretrained, tuned, theta, examples, info)

  for name, answer in zip(names, answers, strict=True):
    if flags.json:
      print(json.dumps({'input': name, **answer.values}))
    else:
      print('\t'.join((name, *answer.columns)))
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.predict', main))
