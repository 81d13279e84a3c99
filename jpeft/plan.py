"""Will it fit? Compiles a whole training step from shapes alone and says what it asks of a device.

    python -m jpeft.plan --config=configs/quickstart.py --methods=lst,lora,full --target=tpu:v5e

No accelerator and no weights are needed: TPUs are compiled for by topology (tpu:v5e, tpu:v5p,
tpu:v6e, or slices such as tpu:v5p:4x4x4 with the mesh of the config), GPUs by description
(gpu:a100, gpu:h100). `cpu` is functional only: its bytes say nothing of an accelerator's. The step
is the trainer's own: forward, backward and optimizer, its state donated.

In a notebook:

    batch = {'image': jnp.zeros((32, 224, 224, 3)), 'label': jnp.zeros(32, int)}
    jpeft.plan(model, ['lst', 'lora', 'full'], batch)
"""

import argparse
import dataclasses
import json
import sys
import types
from typing import Any

from jpeft import cli, models, planning, tasks
from jpeft import config as config_lib
from jpeft.lazy import extra
from jpeft.messages import did_you_mean
from jpeft.planning import Plans, of_configs, plan, plot, with_method


def main(argv: list[str]) -> int:
  if cli.asks_help(argv):
    _parser().print_help()
    return 0
  planning.leave_accelerators()
  with cli.inputs_checked():
    flags, rest = _flags(argv)
    command = config_lib.parse(rest)
    where = planning.target(flags.target)
    if flags.plot:
      with extra('plan'):
        import matplotlib  # noqa: F401  (said before anything is compiled)
    plans = of_configs(_configs(command, flags), where, flags.search_batch)
    if flags.plot:
      plot(plans, flags.plot)
  if flags.json:
    print(json.dumps([plan.row() for plan in plans], indent=2))
  else:
    print(plans)
  return 0


VALUES = ('--methods', '--plot', '--target', '--batch', '--seq', '--remat')
SWITCHES = ('--search-batch', '--json')


def _flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(the planner's flags, the arguments that are left for the config)."""
  known = [*VALUES, *SWITCHES]
  for word in argv:
    flag = word.partition('=')[0]
    if flag.startswith('--') and flag not in known and not flag.startswith('--config'):
      raise ValueError(f'unknown argument {flag!r}{did_you_mean(flag, [*known, "--config"])}')
  try:
    return _parser().parse_known_args(argv)
  except argparse.ArgumentError as error:
    raise ValueError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='jpeft.plan',
    usage='jpeft.plan --config=CONFIG [--config.KEY=VALUE ...] [options]',
    description=cli.described(__doc__),
    epilog=cli.described(f'--config and --config.KEY=VALUE are those of jpeft.train. {cli.SHARED}'),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    exit_on_error=False,
    add_help=False,
  )
  parser.add_argument(
    '--methods',
    metavar='A,B',
    help='arguments of the config, where it takes one, else methods of the registry or presets of '
    "them (lora_all, lst_mlp); the config's own if left out",
  )
  parser.add_argument(
    '--target',
    help='what to compile for; if left out tpu:v5e where libtpu, the TPU compiler, is installed, '
    'else cpu, and the plan says why',
  )
  parser.add_argument('--batch', type=int, metavar='N', help='in place of data.batch_size')
  parser.add_argument('--seq', type=int, metavar='N', help='in place of data.max_length')
  parser.add_argument(
    '--remat', nargs='?', const='true', metavar='dots', help='in place of model.remat'
  )
  parser.add_argument(
    '--search-batch',
    action='store_true',
    help='also find the largest batch that fits, to an eighth, by bisection',
  )
  parser.add_argument('--json', action='store_true', help='rows as JSON on stdout')
  parser.add_argument('--plot', metavar='FILE.png', help='draw memory against FLOPs')
  return parser


def _configs(command: config_lib.Command, flags) -> dict[str, Any]:
  """{name: configuration} of what the command line asks for."""
  given = {'data.batch_size': flags.batch, 'data.max_length': flags.seq, 'model.remat': flags.remat}
  overrides = {key: str(value) for key, value in given.items() if value is not None}
  command = dataclasses.replace(command, overrides={**command.overrides, **overrides})
  if not flags.methods:
    config = command.load()
    return {config.method.name: config}
  if flags.seq:
    _check_length(command.load())
  names = [name for name in flags.methods.split(',') if name]
  if command.takes_argument:
    return {name: command.baseline(name).load() for name in names}
  return {name: with_method(command.load(), name) for name in names}


def _check_length(config) -> None:
  """Raises a ValueError if the configuration's backbone reads no sequences."""
  modality = tasks.modality_of(models.describe(config.model.source))
  if modality.name == 'image':
    raise ValueError(
      '--seq is for texts, and this backbone reads images: give --config.model.image_size=PIXELS'
    )
  if not modality.has_length:
    raise ValueError(f'--seq is for texts, and the modality of this backbone is {modality.name!r}')


class _Callable(types.ModuleType):
  """`jpeft.plan` is this module, and the function of that name."""

  def __call__(self, *args, **kwargs) -> Plans:
    return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == '__main__':
  sys.exit(cli.command('jpeft.plan', main))
