"""Labels for images or texts, by the model of a run.

    python -m jpeft.predict --run runs/a --input cat.png dog.png
    python -m jpeft.predict --run runs/b --input reviews.txt --json

A text file has one text a line; - reads stdin.
"""

import json
import pathlib
import sys
from typing import Any

from jpeft import cli, training
from jpeft.data import decode


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
    if config.task == 'language':
      raise ValueError(f'{flags.run} writes texts: python -m jpeft.generate --run {flags.run}')
    names, examples = read(flags.input, info['reads'])
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
  rows = training.predictions(config, pretrained, tuned, theta, examples)

  labels = info['labels']
  for name, row in zip(names, rows, strict=True):
    label = labels[row.argmax()]
    probability = float(row.max())
    if not flags.json:
      print(f'{name}\t{label}\t{probability:.4f}')
      continue
    result = {
      'input': name,
      'label': label,
      'probability': probability,
      'probabilities': dict(zip(labels, map(float, row), strict=True)),
    }
    print(json.dumps(result))
  return 0


def read(inputs: list[str], kind: str) -> tuple[list[str], list[dict[str, Any]]]:
  """(names, examples) of image files, or of the lines of text files.

  Raises:
    FileNotFoundError, ValueError: a file is missing or cannot be read, or there is no text.
  """
  for name in inputs:
    cli.check_input(name)
  if kind == 'image':
    return inputs, [{'image': decode(pathlib.Path(name), name)} for name in inputs]
  texts = [line.strip() for name in inputs for line in cli.lines(name)]
  if not texts:
    raise ValueError(f'there is no text in {", ".join(inputs)}')
  return texts, [{'text': text} for text in texts]


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.predict', main))
