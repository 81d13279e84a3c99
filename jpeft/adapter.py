"""LoRA, DoRA, (IA)^3 and norms in the adapter folders of Hugging Face's peft.

Such a folder holds adapter_config.json and adapter_model.safetensors.

    python -m jpeft.adapter --run runs/a --out adapter

writes that of a run, for transformers and others to put on the same base model. In Python,
`save_adapter` does so, and `load_adapter` gives method and theta of an adapter that was trained
elsewhere. The base model stays as it is: its kernels may be plain or in 4 bits, its blocks unrolled
or scanned.
"""

import sys

from jpeft import cli, training
from jpeft.export import CONFIG, FILE, save_adapter

# Methods that such folders hold beside those with an alpha.
WITHOUT_ALPHA = ('ia3', 'norm')


def main(argv: list[str]) -> int:
  flags = cli.run_parser('jpeft.adapter', __doc__, out=True).parse_args(argv)
  with cli.inputs_checked():
    config, _ = training.describe(flags.run)
    values = training.hyperparameters(config)
    if 'alpha' not in values and config.method.name not in WITHOUT_ALPHA:
      raise ValueError(
        f'{config.method.name} is neither LoRA nor DoRA; jpeft.merge writes plain weights where it '
        'can'
      )
    cli.check_new(flags.out)
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
    save_adapter(
      flags.out,
      pretrained,
      theta,
      rslora=values.get('rslora', False),
      base=config.model.source,
      tuned=tuned,
    )
  print(f'{flags.out}: {CONFIG} and {FILE}, for {config.model.source}')
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.adapter', main))
