"""A script: what jpeft does with its base dependencies alone, as JSON {what: [exit code, text]}.

    python without_extras.py BACKBONE DECODER RUN IMAGES

It runs in an interpreter that lacks the extras, so it imports nothing of the tests.

Arguments: folders of a ViT, of a decoder with its tokenizer, of a complete run of LoRA on that ViT,
and of images.
"""

import contextlib
import io
import json
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import optax

import jpeft
from jpeft import __main__ as console

COMMANDS = [*([name] for name in console.COMMANDS), *(['bench', name] for name in console.BENCHES)]
CONFIG = """
def get_config(method='lora'):
  return {
    'task': %r,
    'model': {'source': %r},
    'data': {'name': %r, 'batch_size': 2},
    'method': {'name': method},
    'steps': 1,
  }
"""


def command(*words: str) -> tuple[int, str]:
  """(exit code, what it prints) of a command line."""
  sys.argv = ['jpeft', *map(str, words)]
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    try:
      code = console.main()
    except SystemExit as error:
      code = error.code
  return code, printed.getvalue()


def config(name: str, task: str, source: str, data: str) -> str:
  """--config of a new file in the working directory."""
  pathlib.Path(f'{name}.py').write_text(CONFIG % (task, source, data))
  return f'--config={name}.py'


def commands(backbone: str, decoder: str, run: str, images: str) -> dict[str, tuple[int, str]]:
  """What each command says."""
  found = {' '.join(words): command(*words, '--help') for words in COMMANDS}
  found['list'] = command('methods')
  found['values'] = command('config', 'quickstart:lora')

  # What needs no extra.
  image = config('image', 'classification', backbone, f'folder:{images}')
  found['compile'] = command('plan', image, '--target=cpu')
  found['write weights'] = command('merge', '--run', run, '--out', 'merged')
  found['write adapter'] = command('adapter', '--run', run, '--out', 'adapter')

  # What does.
  pathlib.Path('texts.csv').write_text('text,label\na b,0\nc d,1\ne f,0\ng h,1\n' * 4)
  pathlib.Path('pairs.jsonl').write_text('{"prompt": "a", "completion": "b"}\n' * 16)
  text = config('text', 'language', decoder, 'completions:pairs.jsonl')
  packaged = config('packaged', 'classification', backbone, 'mnist5k')
  found['images'] = command('train', image)
  found['events'] = command('train', image, '--config.log.tensorboard=true')
  for tracker in ('wandb', 'mlflow'):
    found[tracker] = command('train', image, f'--config.log.to=("{tracker}",)')
  found['scores'] = command(
    'train', text, '--config.eval.generate=2', '--config.eval.also=("bleu",)'
  )
  found['texts'] = command('train', text, '--config.data.test=train')
  found['packaged'] = command('train', packaged)
  tables = config('tables', 'classification', backbone, 'parquet:rows.parquet')
  found['tables'] = command('train', tables)
  found['plot'] = command('plan', image, '--target=cpu', '--plot=plot.png')
  found['write text'] = command('generate', '--model', decoder, '--prompt', 'a')
  picture = next(pathlib.Path(images).rglob('*.png'))
  found['label'] = command('predict', '--run', run, '--input', picture)
  found['hub'] = command('generate', '--model', 'someone/something', '--prompt', 'a')
  return found


class Classifier(nn.Module):
  """A model of a user."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(16, name='hidden')(x))
    return nn.Dense(3, name='out')(x)


def attached() -> float:
  """How much five updates of LoRA lower the loss of that model."""
  x = np.random.default_rng(0).normal(size=(8, 5)).astype('float32')
  labels = np.arange(8) % 3
  model = Classifier()
  variables = model.init(jax.random.key(0), x)
  tuned = jpeft.attach(model, jpeft.lora(rank=2, targets='.*'), variables, x)
  theta = tuned.init(jax.random.key(1), variables)

  def loss(theta):
    logits = tuned.apply(theta, variables, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  tx = optax.adam(1e-1)
  state = tx.init(theta)
  before = float(loss(theta))
  for _ in range(5):
    updates, state = tx.update(jax.grad(loss)(theta), state, theta)
    theta = optax.apply_updates(theta, updates)
  return before - float(loss(theta))


def main(folders: list[str]) -> None:
  found = commands(*folders)
  pretrained = jpeft.load(folders[0])
  images = np.zeros((2, 8, 8, 3), np.float32)
  shape = pretrained.model.apply(pretrained.variables, images).shape
  found['load'] = (0, str(shape))
  found['attach'] = (0, str(attached()))
  json.dump(found, sys.stdout)


if __name__ == '__main__':
  main(sys.argv[1:])
