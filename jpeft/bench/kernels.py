"""What the kernels cost beside XLA alone.

  python -m jpeft.bench.kernels --target=tpu:v5e    # the compiler's figures (docs/kernels.md)
  python -m jpeft.bench.kernels                     # times, after a check of the results

The first needs no TPU, the second runs on the GPU or TPU at hand.

Ahead of time, a row is one compiled program: cycles are libtpu's own estimate of its schedule, the
sum over what it runs (a model of the chip: to be compared within a group, not to be read as a
speed), temp what it allocates beside arguments and results, and moved the bytes that XLA's cost
analysis says it reads and writes (it does not see into kernels).
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import cli, residuals
from jpeft.planning import target
from jpeft.quant import nf4
from pallas_kernels import choice, nf4_matmul, nf4_product, quantize_nf4, reference

F32 = jnp.float32
BF16 = jnp.bfloat16
_MATRICES = ((4096, 4096), (4096, 11008), (8192, 28672))  # [in, out]
_FEW_ROWS = 16  # up to which reading the codes takes the time


class Case(NamedTuple):
  """A program to compile.

  Attributes:
    group: the programs to compare it with.
    name: in the group.
    fn: the function.
    args: shapes of its arguments.
  """

  group: str
  name: str
  fn: Callable
  args: tuple[Any, ...]


def shaped(*sizes: int, dtype=BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, dtype)


def coded(fan_in: int, fan_out: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  """Shapes of the codes and scales of a matrix."""
  codes = shaped(fan_in // 2, fan_out, dtype=jnp.uint8)
  absmax = shaped(fan_in // 64, fan_out, dtype=F32)
  return codes, absmax


def products(
  rows: tuple[int, ...] = (16, 128, 2048, 8192), shape: tuple[int, int] = (4096, 4096)
) -> Iterator[Case]:
  """Forward (x @ W) and backward (g @ W^T): of a bfloat16 W, by XLA from codes, by the kernel."""
  fan_in, fan_out = shape
  codes = coded(fan_in, fan_out)
  for m in rows:
    group = f'x W, {m} rows, {fan_in} x {fan_out}'
    x = shaped(m, fan_in)
    yield Case(group, 'bfloat16 W', _dot(0), (x, shaped(*shape)))
    yield Case(group, 'XLA', functools.partial(reference, transposed=False), (x, *codes))
    yield Case(group, 'kernel', _by_kernel, (x, *codes))

    group = f"g W', {m} rows, {fan_in} x {fan_out}"
    g = shaped(m, fan_out)
    yield Case(group, 'bfloat16 W', _dot(1), (g, shaped(*shape)))
    yield Case(group, 'XLA', functools.partial(reference, transposed=True), (g, *codes))
    yield Case(group, 'kernel', _by_kernel_backward, (g, *codes))


def _dot(axis: int) -> Callable:
  """The product of rows with a matrix, over an axis of it."""
  contracted = ((1,), (axis,))
  return functools.partial(jax.lax.dot_general, dimension_numbers=(contracted, ((), ())))


def float32_products(rows: int = 512, shape: tuple[int, int] = (4096, 4096)) -> Iterator[Case]:
  """x @ W of float32 rows: by XLA as JAX does by default, and by the kernel in full precision."""

  def by_default(x, codes, absmax):
    return x @ nf4().decode({'codes': codes, 'absmax': absmax}, shape)

  group = f'x W, {rows} rows of float32, {shape[0]} x {shape[1]}'
  args = (shaped(rows, shape[0], dtype=F32), *coded(*shape))
  yield Case(group, 'XLA', by_default, args)
  yield Case(group, 'kernel', _by_kernel, args)


def _by_kernel(x, codes, absmax):
  return nf4_matmul(x, codes, absmax, implementation='mosaic')


def _by_kernel_backward(g, codes, absmax):
  # The product is linear in x: XLA drops the forward pass at zeros.
  x = jnp.zeros((len(g), 2 * len(codes)), g.dtype)
  _, vjp = jax.vjp(lambda x: _by_kernel(x, codes, absmax), x)
  (d_x,) = vjp(g)
  return d_x


def quantizing(shape: tuple[int, int] = (4096, 4096)) -> Iterator[Case]:
  """Encoding of a float32 matrix."""
  group = f'quantize {shape[0]} x {shape[1]}'
  for name, implementation in (('XLA', 'xla'), ('kernel', 'mosaic')):
    fn = functools.partial(quantize_nf4, implementation=implementation)
    yield Case(group, name, fn, (shaped(*shape, dtype=F32),))


def lora(rows: int = 2048, width: int = 4096, rank: int = 16) -> Iterator[Case]:
  """Products of one input with three W, forwards and backwards, without LoRA and with it.

  What LoRA adds is all that a fused kernel could win.
  """
  x = shaped(rows, width)
  w = shaped(width, width)
  ab = (shaped(width, rank), shaped(rank, width))
  group = f'3 x {width} x {width}, {rows} rows, LoRA r={rank}'

  def plain(x, ws, abs_):
    return [x @ w for w in ws]

  def adapted(x, ws, abs_):
    return [x @ w + x @ a @ b for w, (a, b) in zip(ws, abs_, strict=True)]

  def both(fn, x, ws, abs_, gs):
    ys, vjp = jax.vjp(lambda x, abs_: fn(x, ws, abs_), x, abs_)
    return ys, vjp(gs)

  for name, fn in (('no LoRA', plain), ('LoRA', adapted)):
    yield Case(group, name, functools.partial(both, fn), (x, [w] * 3, [ab] * 3, [x] * 3))


def gelu(rows: int = 6304, width: int = 768, hidden: int = 3072) -> Iterator[Case]:
  """x @ W1 -> GELU -> @ W2, which keeps x for the backward pass, or four bits an entry."""
  x = shaped(rows, width)
  up = shaped(width, hidden)
  down = shaped(hidden, width)
  group = f'{width} -> GELU({hidden}) -> {width}, {rows} rows'
  exact = jax.checkpoint(residuals.PLAIN['gelu'])

  def forward(fn, x, up, down):
    h, vjp = jax.vjp(fn, x @ up)
    return h @ down, vjp

  def backward(vjp, g, up, down):
    (d_h,) = vjp(g @ down.T)
    return d_h @ up.T

  for name, fn in (('keeps its input', exact), ('keeps 4-bit codes', residuals.gelu)):
    run = functools.partial(forward, fn)
    _, vjp = jax.eval_shape(run, x, up, down)
    yield Case(f'{group}, forward', name, run, (x, up, down))
    yield Case(f'{group}, backward', name, backward, (vjp, x, up, down))


_PROFILE = re.compile(
  r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)'
)


def compiled(name: str, only: str) -> None:
  """Prints the table of a TPU that need not be there.

  Args:
    name: of the TPU, such as tpu:v5e.
    only: a pattern of the groups that are compiled.
  """
  with _profiles(name) as (folder, sharding):
    print('| program | form | kcycles | temp MiB | moved MiB |\n| --- | --- | ---: | ---: | ---: |')
    for case in itertools.chain(products(), float32_products(), quantizing(), lora(), gelu()):
      if re.search(only, case.group):
        print(_row(case, sharding, folder), flush=True)


@contextlib.contextmanager
def _profiles(name: str) -> Iterator[tuple[Path, jax.sharding.Sharding]]:
  """(a folder into which libtpu writes profiles, where programs for a TPU are)."""
  with tempfile.TemporaryDirectory() as folder:
    # The profile is an option of the whole process, read when libtpu is loaded.
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_static_llo_profile_to={folder}'
    yield Path(folder), jax.sharding.SingleDeviceSharding(target(name).devices[0])


def cycles_of(wanted: Iterable[tuple[int, int, int, bool]], name: str) -> list[int]:
  """The cycles of kernels (rows, in, out, transposed), each compiled alone for a TPU.

  One tile of rows is compiled, and counts as often as a kernel has tiles: libtpu's memory for a
  profile grows with the grid, beyond 14 GB at 8192 rows. At 8192 x 4096 x 4096, where both can be
  had, this is 1.2 % above the whole profile.
  """
  found = []
  with _profiles(name) as (folder, sharding):
    for rows, fan_in, fan_out, transposed in wanted:
      fn = functools.partial(nf4_product, transposed=transposed, implementation='mosaic')
      tile = choice(rows, (fan_in, fan_out)).tiles[0]
      x = shaped(tile, fan_out if transposed else fan_in)
      _, cycles = _compiled(fn, (x, *coded(fan_in, fan_out)), sharding, folder)
      found.append(cycles * math.ceil(rows / tile))
  return found


def _row(case: Case, sharding, folder: Path) -> str:
  """Compiles a program, and describes it."""
  program, cycles = _compiled(case.fn, case.args, sharding, folder)
  temp = program.memory_analysis().temp_size_in_bytes
  moved = '-'
  accessed = program.cost_analysis().get('bytes accessed')
  if accessed:
    moved = f'{accessed / 2**20:,.1f}'
  return f'| {case.group} | {case.name} | {cycles / 1000:,.0f} | {temp / 2**20:,.1f} | {moved} |'


def _compiled(fn: Callable, args: tuple, sharding, folder: Path) -> tuple[Any, int]:
  """(a compiled program, its cycles by the profile that libtpu writes into a folder)."""
  for file in folder.glob('*'):
    file.unlink()
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  program = jax.jit(fn).lower(*args).compile()
  profile = '\n'.join(file.read_text() for file in folder.glob('*profile.textproto'))
  cycles = {}
  for op, each, times in _PROFILE.findall(profile):
    cycles[op] = int(each) * int(times)
  return program, sum(cycles.values())


def seconds(fn: Callable, *args, runs: int = 5) -> float:
  """The least time of a call of a compiled function."""
  jax.block_until_ready(fn(*args))
  times = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    times.append(time.perf_counter() - start)
  return min(times)


def check(rows: int, shape: tuple[int, int], dtype) -> None:
  """Compares the device's own result with a float64 product of what the codes stand for.

  Raises:
    AssertionError: it is off.
  """
  w = jax.random.normal(jax.random.key(0), shape, F32)
  x = jax.random.normal(jax.random.key(1), (rows, shape[0]), F32).astype(dtype)
  g = jax.random.normal(jax.random.key(2), (rows, shape[1]), F32).astype(dtype)
  codes, absmax = jax.jit(quantize_nf4)(w)
  decoded = nf4().decode({'codes': codes, 'absmax': absmax}, shape)
  w = np.asarray(decoded, np.float64)
  y, vjp = jax.vjp(lambda x: nf4_matmul(x, codes, absmax), x)
  (d_x,) = vjp(g)
  limit = 1e-2
  if dtype == F32:
    limit = 1e-5
  for found, expected in (
    (y, np.asarray(x, np.float64) @ w),
    (d_x, np.asarray(g, np.float64) @ w.T),
  ):
    error = np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    if error > limit:
      raise AssertionError(f'{rows} rows, {shape}, {jnp.dtype(dtype)}: relative error {error:.2g}')


def timed(shapes: tuple[tuple[int, int], ...] = _MATRICES, copies: int = 16) -> None:
  """Prints times on the device at hand.

  Of few rows as a share of its copy bandwidth, of many as a share of its bfloat16 products.

  Args:
    shapes: [in, out] of the matrices.
    copies: matrices that a program multiplies by one after the other, so that none is found in a
      cache.
  """
  for dtype, rows in itertools.product((F32, BF16), (1, 16, 100)):
    check(rows, (1024, 512), dtype)
  big = jnp.zeros(2**29, BF16)
  bandwidth = 2 * big.nbytes / seconds(jax.jit(lambda x: x + 1), big)
  print(
    f'{jax.devices()[0].device_kind}: results agree; copies {bandwidth / 1e9:,.0f} GB/s\n\n'
    '| rows | matrix | form | us | share of | bitsandbytes, us |\n'
    '| ---: | --- | --- | ---: | --- | ---: |'
  )
  for shape, rows in itertools.product(shapes, (1, 16, 2048, 8192)):
    too_large = rows > _FEW_ROWS and shape[1] > 11008
    if not too_large:
      print(_time_row(rows, shape, copies, bandwidth), flush=True)


def _time_row(rows: int, shape: tuple[int, int], copies: int, bandwidth: float) -> str:
  """Times the product of some rows with a matrix."""
  fan_in, fan_out = shape
  x = jax.random.normal(jax.random.key(0), (rows, fan_in), BF16)
  codes = [jnp.full((fan_in // 2, fan_out), 16 * i + 5, jnp.uint8) for i in range(copies)]
  absmax = [jnp.full((fan_in // 64, fan_out), 1 + i, F32) for i in range(copies)]
  took = seconds(_over_copies(nf4_matmul), x, codes, absmax) / copies
  if rows <= _FEW_ROWS:
    moved = codes[0].nbytes + absmax[0].nbytes + 2 * rows * sum(shape)
    share = f'{moved / took / bandwidth:.0%} of copying'
  else:
    plain = [jnp.full(shape, i, BF16) for i in range(copies)]
    took_plain = seconds(_over_copies(jnp.matmul), x, plain) / copies
    share = f'{took_plain / took:.0%} of bfloat16'
  platform = jax.default_backend()
  if platform == 'gpu':
    platform = 'cuda'
  form = choice(rows, shape, BF16, platform).implementation
  return (
    f'| {rows} | {fan_in} x {fan_out} | {form} | {1e6 * took:,.1f} | {share} | '
    f'{peer(rows, shape, copies)} |'
  )


def _over_copies(fn: Callable) -> Callable:
  """fn(x, *matrix) for each of several matrices, in one program."""
  return jax.jit(lambda x, *arrays: [fn(x, *matrix) for matrix in zip(*arrays, strict=True)])


def peer(rows: int, shape: tuple[int, int], copies: int) -> str:
  """The time of bitsandbytes for the same product, where it is installed and has a GPU."""
  try:
    import bitsandbytes as bnb
    import torch
  except ImportError:
    return '-'
  if not torch.cuda.is_available():
    return '-'
  drawn = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  matrices = []
  for _ in range(copies):
    matrices.append(bnb.functional.quantize_4bit(drawn(shape[::-1]), quant_type='nf4'))
  x = drawn(rows, shape[0])
  times = []
  for _ in range(6):
    start = time.perf_counter()
    for codes, state in matrices:
      bnb.matmul_4bit(x, codes.t(), quant_state=state)
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
  return f'{1e6 * min(times) / copies:,.1f}'


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.kernels',
    description=cli.described(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--target', help='a TPU to compile for, such as tpu:v5e')
  parser.add_argument(
    '--only', default='', help='a pattern of the programs to compile, such as "2048 rows"'
  )
  args = parser.parse_args(argv)
  if not args.target:
    timed()
    return 0
  with cli.inputs_checked():
    compiled(args.target, args.only)
  return 0


if __name__ == '__main__':
  sys.exit(cli.command('jpeft.bench.kernels', main))
