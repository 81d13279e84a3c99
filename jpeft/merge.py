"""Writes plain weights of a run, in the layout of Hugging Face.

The untouched model computes with them what was trained; transformers opens the folder alone, with
its tokenizer or image processor.

Of a backbone in 4 bits, the decoded kernels are written, in the number format of
`model.param_dtype`.

    python -m jpeft.merge --run runs/a --out merged
"""

import sys

from jpeft import cli, export, models, tasks, training


def main(argv: list[str]) -> int:
  flags = cli.run_parser('jpeft.merge', __doc__, out=True).parse_args(argv)
  with cli.inputs_checked():
    config, info = training.describe(flags.run)
    export.check_mergeable(training.method_of(config))  # before a backbone is loaded
    cli.check_new(flags.out)
    pretrained, tuned, theta = training.reopen(flags.run, flags.best)
  task = tasks.of(config)
  example = task.example(config, pretrained)
  with cli.inputs_checked():
    difference = export.save_merged(
      flags.out,
      pretrained,
      tuned,
      theta,
      example,
      info['labels'],
      config,
      task.problem,
      task.units(info.get('facts', {})),
    )
  print(
    f'{flags.out}: merged; on an empty input its logits and those of the run are '
    f'{difference:.1e} apart'
  )
  departure = models.departure(pretrained)
  if departure:
    print(f'warning: jpeft reads these files as the run did, transformers does not: {departure}')
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.merge', main))
