"""Writes plain weights of a run, in the layout of Hugging Face.

The untouched model computes with them what was trained.

Of a backbone in 4 bits, the decoded kernels are written, in the number format of
`model.param_dtype`.

    python -m jpeft.merge --run runs/a --out merged
"""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp

from jpeft import cli, models, tasks, training
from jpeft.models import FILES as TOKENIZER_FILES
from jpeft.models import save_tokenizer


def main(argv: list[str]) -> int:
  flags = cli.parser('jpeft.merge', __doc__, out=True).parse_args(argv)

  with cli.inputs_checked():
    config, about = training.describe(flags.run)
    for _, rule in training.method_of(config):  # before a backbone is loaded
      if not rule.mergeable:
        raise ValueError(
          f'{config.method.name} cannot be merged: {rule.name} changes the computation, not '
          'the weights; jpeft.predict runs it as it is'
        )
    cli.check_new(flags.out)
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)

  merged = jax.jit(tuned.merge)(theta, pretrained.variables)
  args, kwargs = tasks.inputs(tasks.of(config).blank(config, pretrained))
  tuned_logits = tuned.apply(theta, pretrained.variables, *args, **kwargs, deterministic=True)
  plain_logits = pretrained.model.apply(merged, *args, **kwargs, deterministic=True)
  apart = float(jnp.abs(tuned_logits - plain_logits).max())

  described = dict(pretrained.config)
  if labels := dict(enumerate(about['labels'])):
    described |= {'id2label': labels, 'label2id': {name: i for i, name in labels.items()}}
  models.save_pretrained(flags.out, pretrained.model, merged, described)
  if pretrained.tokenizer and pathlib.Path(pretrained.tokenizer).suffix == '.gguf':
    save_tokenizer(models.load_tokenizer(pretrained.tokenizer), flags.out)
  elif pretrained.tokenizer:
    beside = [pathlib.Path(pretrained.tokenizer).with_name(name) for name in TOKENIZER_FILES]
    for file in filter(pathlib.Path.exists, beside):
      shutil.copy(file, flags.out)
  if pretrained.preprocess:
    told = {
      'image_mean': pretrained.preprocess['mean'],
      'image_std': pretrained.preprocess['std'],
      'size': {side: pretrained.preprocess['image_size'] for side in ('height', 'width')},
    }
    (flags.out / 'preprocessor_config.json').write_text(json.dumps(told, indent=2) + '\n')
  print(
    f'{flags.out}: merged; on an empty input its logits and those of the run are {apart:.1e} apart'
  )
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.merge', main))
