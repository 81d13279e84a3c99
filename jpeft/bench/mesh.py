"""What a training step of a large decoder needs of each chip of a slice, and what the chips send.

    python -m jpeft.bench.mesh [--methods=qst,qlora] [--target=tpu:v5p:4x4x4] [--data=8] [--model=8]
        [--sequence=1] [--backbone=sharded] [--shape=70b] [--batch=8] [--length=2048] [--layers=80]
        [--json]

The decoder has the shape of Llama-3-70B or 8B, in bfloat16 with kernels in NF4 and blocks
recomputed in the backward pass. Nothing is run, and no TPU is needed: whole steps are compiled from
shapes.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp

from jpeft import cli, planning, training
from jpeft.models import Llama

# Sizes of Llama-3, by their names.
SHAPES = {
  '8b': {'width': 4096, 'depth': 32, 'heads': 32, 'mlp_dim': 14336},
  '70b': {'width': 8192, 'depth': 80, 'heads': 64, 'mlp_dim': 28672},
}


def decoder(shape: str, layers: int | None = None) -> Llama:
  """A decoder of the shape of Llama-3, with all of its layers or some."""
  sizes = dict(SHAPES[shape])
  if layers is not None:
    sizes['depth'] = layers
  return Llama(
    **sizes,
    kv_heads=8,
    vocab=128256,
    scan=True,
    remat=True,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
  )


def plans(flags: argparse.Namespace) -> planning.Plans:
  """The plans of the methods that the flags name."""
  texts = jax.ShapeDtypeStruct((flags.batch, flags.length), jnp.int32)
  return planning.plan(
    decoder(flags.shape, flags.layers),
    flags.methods,
    {'tokens': texts, 'token_mask': texts, 'label': texts},
    target=flags.target,
    mesh=(flags.data, flags.model, flags.sequence),
    sharded=flags.backbone,
    head=False,
    storage='nf4',
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.mesh',
    description=cli.described(__doc__),
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--methods', default=['qst', 'qlora'], type=lambda text: text.split(','), help='of the registry'
  )
  parser.add_argument('--target', default='tpu:v5p:4x4x4', help='a slice of TPUs')
  parser.add_argument('--data', default=8, type=int, help='devices that share a batch')
  parser.add_argument('--model', default=8, type=int, help='devices that share a kernel')
  parser.add_argument('--sequence', default=1, type=int, help='devices that share a text')
  parser.add_argument('--backbone', default='sharded', help=', '.join(training.BACKBONES))
  parser.add_argument('--batch', default=8, type=int, help='texts an update, over all devices')
  parser.add_argument('--length', default=2048, type=int, help='tokens of a text')
  parser.add_argument('--shape', default='70b', choices=list(SHAPES), help='of Llama-3')
  parser.add_argument('--layers', type=int, help='blocks of the decoder; those of its shape')
  parser.add_argument('--json', action='store_true', help='as JSON')
  return parser


def main(argv: list[str]) -> int:
  flags = _parser().parse_args(argv)
  planning.leave_accelerators()
  with cli.inputs_checked():
    found = plans(flags)
  if flags.json:
    print(json.dumps([plan.row() for plan in found], indent=1))
  else:
    print(found)
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.mesh', main))
