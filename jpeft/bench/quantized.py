"""What kernels change in whole programs of a 4-bit Llama-2-7B, by the compiler's estimate.

  python -m jpeft.bench.quantized --target=tpu:v5e

Programs of one and of two blocks are compiled, unrolled, and the difference is taken for every
further block. Cycles are those that XLA's text says of its operations, and of a kernel those of its
profile, compiled alone at the same shapes (libtpu's profile of kernels aborts on whole programs).
Gathers have no estimate; they are the same in both forms. Loops, such as that of attention in long
contexts, count with all their rounds.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpeft import cli, models, programs
from jpeft.core import attach, chain
from jpeft.methods import lora
from jpeft.planning import target
from jpeft.quant import nf4, quantize

from . import kernels

LLAMA_2_7B = {
  'model_type': 'llama',
  'hidden_size': 4096,
  'num_attention_heads': 32,
  'intermediate_size': 11008,
  'vocab_size': 32000,
}
LAYERS = 32
_KERNEL = re.compile(
  r'%(nf4_matmul(?:_transposed)?)[.\d]* = bf16\[([\d,]+)\].* custom-call\(.*"tpu_custom_call"'
)
_CODES = re.compile(r'u8\[(\d+),(\d+)\]')


class Kernel(NamedTuple):
  """A kernel in a program: rows of x, the matrix [in, out], and whether it is transposed."""

  rows: int
  fan_in: int
  fan_out: int
  transposed: bool


class Found(NamedTuple):
  """The cycles of a compiled program without its kernels, and how often it runs each of these."""

  cycles: float
  kernels: collections.Counter

  def total(self, each: dict[Kernel, int]) -> float:
    """The cycles with those of the kernels, one run each."""
    return self.cycles + sum(each[kernel] * count for kernel, count in self.kernels.items())


def decoding(layers: int, implementation: str) -> tuple[Callable, tuple]:
  """The forward pass of one token: (function, shapes of its arguments)."""
  tuned, backbone, tokens = _tuned(layers, implementation, chain(), (1, 1), remat=False)

  def forward(backbone, tokens):
    return tuned.apply({}, backbone, tokens)

  return forward, (backbone, tokens)


def training(layers: int, implementation: str, batch: tuple[int, int]) -> tuple[Callable, tuple]:
  """The gradient of QLoRA of rank 64, with its blocks recomputed: see `decoding`."""
  method = lora(64, targets='{linear}')
  tuned, backbone, tokens = _tuned(layers, implementation, method, batch, remat=True)

  def gradient(theta, backbone, tokens):
    def loss(theta):
      logits = tuned.apply(theta, backbone, tokens).astype(jnp.float32)
      return jnp.sum(jax.nn.logsumexp(logits, -1))

    return jax.grad(loss)(theta)

  return gradient, (tuned.shapes, backbone, tokens)


def _tuned(layers: int, implementation: str, method, batch: tuple[int, int], remat: bool):
  """(the attached method, shapes of the backbone in NF4, of tokens)."""
  config = LLAMA_2_7B | {'num_hidden_layers': layers}
  model = models.from_config(config, dtype='bfloat16', param_dtype='bfloat16', remat=remat)
  tokens = jax.ShapeDtypeStruct(batch, jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def coded(held):
    return quantize(model, nf4(), held, tokens, implementation=implementation)

  backbone = jax.eval_shape(coded, held)
  return attach(model, method, backbone, tokens), backbone, tokens


def found_in(text: str) -> Found:
  """What the text of a compiled program says of its cost, with all rounds of its loops.

  Raises:
    ValueError: the text cannot be read, or has kernels that are not those of 4-bit products.
  """
  schedule = programs.scheduled(text)
  if schedule is None:
    raise ValueError('the rounds of the loops of a compiled program cannot be read')
  program = programs.parsed(text)
  found = collections.Counter()
  for run in program.runs():
    for instruction in program.computations[run.name].values():
      kernel = _kernel(instruction.text)
      if kernel is not None:
        found[kernel] += run.rounds
  if sum(found.values()) != schedule.kernels:
    raise ValueError(
      f'a program has {schedule.kernels:.0f} calls of kernels, {sum(found.values())} of them known'
    )
  return Found(schedule.cycles, found)


def _kernel(line: str) -> Kernel | None:
  """The kernel that an instruction calls."""
  match = _KERNEL.search(line)
  if match is None:
    return None
  name, sizes = match.groups()
  rows = int(sizes.split(',')[0])
  half, fan_out = map(int, _CODES.search(line).groups())
  return Kernel(rows, 2 * half, fan_out, name.endswith('transposed'))


def compared() -> Iterator[tuple[str, Callable]]:
  """(title, (layers, implementation) -> program) of what is measured."""
  yield 'one token', decoding
  for batch in ((1, 512), (4, 2048)):

    def of_batch(layers, implementation, batch=batch):
      return training(layers, implementation, batch)

    yield f'QLoRA, {batch[0]} x {batch[1]:,} tokens', of_batch


def measured(make: Callable, implementation: str, sharding) -> tuple[Found, Found, float]:
  """(what one block costs with embedding and head, what two do, seconds of compiling)."""
  found = []
  start = time.perf_counter()
  for layers in (1, 2):
    fn, args = make(layers, implementation)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    found.append(found_in(jax.jit(fn).lower(*args).compile().as_text()))
  return *found, time.perf_counter() - start


def profiled(wanted: list[Kernel], name: str) -> dict[Kernel, int]:
  """The cycles of kernels, each in a process of its own.

  There libtpu writes profiles, and gives back the gigabytes that it takes for one.
  """
  command = [sys.executable, '-m', 'jpeft.bench.quantized', f'--target={name}', '--kernels']
  cycles = {}
  for kernel in wanted:
    answer = subprocess.run(
      [*command, json.dumps([kernel])], check=True, capture_output=True, text=True
    )
    (cycles[kernel],) = json.loads(answer.stdout.splitlines()[-1])
  return cycles


def compare(name: str, only: str) -> None:
  """Prints the table of a TPU that need not be there."""
  sharding = jax.sharding.SingleDeviceSharding(target(name).devices[0])
  print('| program | XLA, Mcycles | kernels, Mcycles | ratio | kernels in a block |')
  print('| --- | ---: | ---: | ---: | ---: |')
  for title, make in compared():
    if not re.search(only, title):
      continue
    totals = []
    for implementation in ('xla', 'auto'):
      one, two, _ = measured(make, implementation, sharding)
      each = profiled(sorted({*one.kernels, *two.kernels}), name)
      first, second = one.total(each), two.total(each)
      totals.append(first + (LAYERS - 1) * (second - first))
    plain, fast = totals
    print(
      f'| {title} | {plain / 1e6:,.0f} | {fast / 1e6:,.0f} | {fast / plain:.2f} | '
      f'{sum(one.kernels.values())} |',
      flush=True,
    )


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.quantized',
    description=cli.described(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--target', default='tpu:v5e', help='a TPU to compile for')
  parser.add_argument('--only', default='', help='a pattern of the programs to compile')
  parser.add_argument('--kernels', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  with cli.inputs_checked():
    if args.kernels:
      wanted = [Kernel(*one) for one in json.loads(args.kernels)]
      print(json.dumps(kernels.cycles_of(wanted, args.target)))
    else:
      compare(args.target, args.only)
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.quantized', main))
