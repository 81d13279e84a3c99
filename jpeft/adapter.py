"""Trained methods in the adapter folders of Hugging Face's peft and of the `adapters` library.

LoRA, DoRA, VeRA, (IA)^3, LoHa, LoKr, HiRA, AdaLoRA, OFT, BOFT, FourierFT, VB-LoRA, RandLoRA, norms,
prompts and prefixes are written for peft; houlsby, pfeiffer, parallel and adaptformer for adapters.
Such a folder holds adapter_config.json and a file of safetensors.

    python -m jpeft.adapter --run runs/a --out adapter

writes that of a run, for transformers and others to put on the same base model. In Python,
`save_adapter` does so, and `load_adapter` gives method and theta of an adapter that was trained
elsewhere. The base model stays as it is: its kernels may be plain or in 4 bits, its blocks unrolled
or scanned.
"""

import sys

from jpeft import cli, training
from jpeft.export import BOTTLENECK_FILE, CONFIG, FILE, PEFT_KINDS, save_adapter

# Methods that such folders hold beside those with an alpha.
WITHOUT_ALPHA = ('ia3', 'norm', 'vera', 'prefix', 'prompt_tuning', *PEFT_KINDS)
# Methods that folders of the adapters library hold.
BOTTLENECKS = ('houlsby', 'pfeiffer', 'parallel', 'adaptformer')


def main(argv: list[str]) -> int:
  flags = cli.run_parser('jpeft.adapter', __doc__, out=True).parse_args(argv)
  with cli.inputs_checked():
    config, _ = training.describe(flags.run)
    values = training.hyperparameters(config)
    is_bottleneck = config.method.name in BOTTLENECKS
    if 'alpha' not in values and config.method.name not in WITHOUT_ALPHA and not is_bottleneck:
      raise ValueError(
        f'{config.method.name} is neither LoRA nor DoRA; jpeft.merge writes plain weights where it '
        'can'
      )
    if values.get('init') == 'loftq' and values['iterations'] > 1:
      raise ValueError(
        f"{flags.run} was trained with init='loftq' and iterations={values['iterations']}: its "
        '4-bit kernels are not those of the base model that adapters are put on; jpeft.merge '
        'writes plain weights'
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
      layout='adapters' if is_bottleneck else 'peft',
    )
  file = BOTTLENECK_FILE if is_bottleneck else FILE
  print(f'{flags.out}: {CONFIG} and {file}, for {config.model.source}')
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.adapter', main))
