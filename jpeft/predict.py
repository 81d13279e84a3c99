"""Labels for images or texts, by the model of a run.

    python -m jpeft.predict --run runs/a --input cat.png dog.png
    python -m jpeft.predict --run runs/b --input reviews.txt --json

A text file has one text a line; - reads stdin.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from jpeft import cli, data, tasks, training
from jpeft.data import decode
from jpeft.tasks import transform as transform_of

ROWS = 32


def main(argv: list[str]) -> int:
  parser = cli.parser('jpeft.predict', __doc__)
  parser.add_argument(
    '--input', nargs='+', required=True, help='images, or files of texts; - is stdin'
  )
  parser.add_argument(
    '--json', action='store_true', help='a JSON object a line, with all probabilities'
  )
  flags = parser.parse_args(argv)

  with cli.inputs_checked():
    config, about = training.describe(flags.run)
    if config.task == 'language':
      raise ValueError(f'{flags.run} writes texts: python -m jpeft.generate --run {flags.run}')
    names, examples = read(flags.input, about['reads'])
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
    transform = transform_of(config, pretrained, False)

  @jax.jit
  def probabilities(theta, backbone, batch):
    args, kwargs = tasks.inputs(batch)
    return jax.nn.softmax(
      tuned.apply(theta, backbone, *args, **kwargs, deterministic=True).astype('float32')
    )

  batches = data.Batches(
    examples, min(ROWS, len(examples)), transform, shuffle=False, epochs=1, drop_remainder=False
  )
  found = [
    np.asarray(probabilities(theta, pretrained.variables, b))[b['mask'] > 0] for b in batches
  ]
  for name, row in zip(names, np.concatenate(found), strict=True):
    label, share = about['labels'][row.argmax()], float(row.max())
    if flags.json:
      every = dict(zip(about['labels'], map(float, row), strict=True))
      print(
        json.dumps({'input': name, 'label': label, 'probability': share, 'probabilities': every})
      )
    else:
      print(f'{name}\t{label}\t{share:.4f}')
  return 0


def read(inputs: list[str], kind: str) -> tuple[list[str], list[dict[str, Any]]]:
  """(names, examples) of image files, or of the lines of text files.

  Raises:
    FileNotFoundError, ValueError: a file is missing or cannot be read, or there is no text.
  """
  for name in inputs:
    if name != '-' and not pathlib.Path(name).is_file():
      raise FileNotFoundError(f'there is no file {name}')
  if kind == 'image':
    return inputs, [{'image': decode(pathlib.Path(name), name)} for name in inputs]
  texts = [
    line.strip()
    for name in inputs
    for line in (sys.stdin if name == '-' else pathlib.Path(name).read_text().splitlines())
  ]
  texts = [text for text in texts if text]
  if not texts:
    raise ValueError(f'there is no text in {", ".join(inputs)}')
  return texts, [{'text': text} for text in texts]


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.predict', main))
