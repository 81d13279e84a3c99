"""What the kernels cost beside XLA alone.

  python -m jpeft.bench.kernels --target=tpu:v5e    # the compiler's figures; no TPU is needed (docs/kernels.md)
  python -m jpeft.bench.kernels                     # on the GPU or TPU at hand: checks results, then takes times

Ahead of time, a row is one compiled program: cycles are libtpu's own estimate of its schedule, the
sum over what it runs (a model of the chip: to be compared within a group, not to be read as a
speed), temp what it allocates beside arguments and results, and moved the bytes that XLA's cost
analysis says it reads and writes (it does not see into kernels).
"""

import argparse
import functools
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import residuals
from jpeft.planning import target
from jpeft.quant import nf4
from pallas_kernels import choice, nf4_matmul, quantize_nf4, reference

Case = tuple[str, str, Callable, tuple[Any, ...]]  # group, name, function, arguments (shapes)
F32, BF16 = jnp.float32, jnp.bfloat16
S = jax.ShapeDtypeStruct


def matrix(shape: tuple[int, int]) -> tuple:
  """Shapes of the codes and scales of a matrix."""
  return S((shape[0] // 2, shape[1]), jnp.uint8), S((shape[0] // 64, shape[1]), F32)


def products(
  rows: tuple[int, ...] = (16, 128, 2048, 8192), shape: tuple[int, int] = (4096, 4096)
) -> Iterator[Case]:
  """Forward (x @ W) and backward (g @ W^T): of a bfloat16 W, by XLA from codes, by the kernel."""
  for m in rows:
    for name, axis in (('x W', 0), ("g W'", 1)):
      group, x = f'{name}, {m} rows, {shape[0]} x {shape[1]}', S((m, shape[axis]), BF16)
      dot = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (axis,)), ((), ())))
      yield group, 'bfloat16 W', dot, (x, S(shape, BF16))
      yield group, 'XLA', functools.partial(reference, transposed=bool(axis)), (x, *matrix(shape))
      forward = functools.partial(nf4_matmul, implementation='mosaic')
      # Linear in x: the backward pass alone is left of it.
      backward = lambda g, *w: jax.vjp(
        lambda x: forward(x, *w), jnp.zeros((len(g), shape[0]), BF16)
      )[1](g)[0]
      yield group, 'kernel', backward if axis else forward, (x, *matrix(shape))


def quantizing(shape: tuple[int, int] = (4096, 4096)) -> Iterator[Case]:
  """Encoding of a float32 matrix."""
  for name, implementation in (('XLA', 'xla'), ('kernel', 'mosaic')):
    yield (
      f'quantize {shape[0]} x {shape[1]}',
      name,
      functools.partial(quantize_nf4, implementation=implementation),
      (S(shape, F32),),
    )


def lora(rows: int = 2048, width: int = 4096, rank: int = 16) -> Iterator[Case]:
  """Products of one input with three W, forwards and backwards: what LoRA adds is all that a fused
  kernel could win.
  """
  x, w, ab = (
    S((rows, width), BF16),
    S((width, width), BF16),
    (S((width, rank), BF16), S((rank, width), BF16)),
  )
  plain = lambda x, ws, abs_: [x @ w for w in ws]
  added = lambda x, ws, abs_: [x @ w + x @ a @ b for w, (a, b) in zip(ws, abs_, strict=True)]

  def both(fn, x, ws, abs_, gs):
    ys, vjp = jax.vjp(lambda x, abs_: fn(x, ws, abs_), x, abs_)
    return ys, vjp(gs)

  for name, fn in (('no LoRA', plain), ('LoRA', added)):
    yield (
      f'3 x {width} x {width}, {rows} rows, LoRA r={rank}',
      name,
      functools.partial(both, fn),
      (x, [w] * 3, [ab] * 3, [x] * 3),
    )


def gelu(rows: int = 6304, width: int = 768, hidden: int = 3072) -> Iterator[Case]:
  """x @ W1 -> GELU -> @ W2, which keeps x for the backward pass, or four bits an entry."""
  x, up, down = S((rows, width), BF16), S((width, hidden), BF16), S((hidden, width), BF16)
  exact = jax.checkpoint(residuals.PLAIN['gelu'])
  for name, fn in (('keeps its input', exact), ('keeps 4-bit codes', residuals.gelu)):

    def forward(x, up, down, fn=fn):
      h, vjp = jax.vjp(fn, x @ up)
      return h @ down, vjp

    kept = jax.eval_shape(forward, x, up, down)[1]
    backward = lambda kept, g, up, down: kept(g @ down.T)[0] @ up.T
    group = f'{width} -> GELU({hidden}) -> {width}, {rows} rows, '
    yield group + 'forward', name, forward, (x, up, down)
    yield group + 'backward', name, backward, (kept, x, up, down)


_PROFILE = re.compile(
  r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)'
)


def compiled(name: str, only: str) -> None:
  """Prints the table of a TPU that need not be there: the programs whose description holds a
  pattern.
  """
  with tempfile.TemporaryDirectory() as folder:
    # The profile is an option of the whole process, read when libtpu is loaded.
    os.environ['LIBTPU_INIT_ARGS'] = f'--xla_jf_dump_static_llo_profile_to={folder}'
    sharding = jax.sharding.SingleDeviceSharding(target(name).devices[0])
    print('| program | form | kcycles | temp MiB | moved MiB |\n| --- | --- | ---: | ---: | ---: |')
    for case, form, fn, args in itertools.chain(products(), quantizing(), lora(), gelu()):
      if not re.search(only, case):
        continue
      for file in Path(folder).glob('*'):
        file.unlink()
      program = (
        jax.jit(fn)
        .lower(*jax.tree.map(lambda a: S(a.shape, a.dtype, sharding=sharding), args))
        .compile()
      )
      text = '\n'.join(file.read_text() for file in Path(folder).glob('*profile.textproto'))
      cycles = sum(
        {op: int(each) * int(times) for op, each, times in _PROFILE.findall(text)}.values()
      )
      temp, moved = (
        program.memory_analysis().temp_size_in_bytes,
        program.cost_analysis().get('bytes accessed'),
      )
      known = f'{moved / 2**20:,.1f}' if moved else '-'
      print(
        f'| {case} | {form} | {cycles / 1000:,.0f} | {temp / 2**20:,.1f} | {known} |', flush=True
      )


def seconds(fn: Callable, *args, runs: int = 5) -> float:
  """The least time of a call of a compiled function."""
  jax.block_until_ready(fn(*args))
  best = np.inf
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    best = min(best, time.perf_counter() - start)
  return best


def check(rows: int, shape: tuple[int, int], dtype) -> None:
  """Raises where the device's own result is off a float64 product of what the codes stand for."""
  w, x, g = (
    jax.random.normal(jax.random.key(i), s, F32)
    for i, s in enumerate((shape, (rows, shape[0]), (rows, shape[1])))
  )
  codes, absmax = jax.jit(quantize_nf4)(w)
  w = np.asarray(nf4().decode({'codes': codes, 'absmax': absmax}, shape), np.float64)
  x, g = x.astype(dtype), g.astype(dtype)
  y, vjp = jax.vjp(lambda x: nf4_matmul(x, codes, absmax), x)
  for found, expected in (
    (y, np.asarray(x, np.float64) @ w),
    (vjp(g)[0], np.asarray(g, np.float64) @ w.T),
  ):
    error = np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)
    if error > (1e-5 if dtype == F32 else 1e-2):
      raise AssertionError(f'{rows} rows, {shape}, {jnp.dtype(dtype)}: relative error {error:.2g}')


def timed(shapes=((4096, 4096), (4096, 11008), (8192, 28672)), copies: int = 16) -> None:
  """Prints times on the device at hand: few rows against its copy bandwidth, many against its
  bfloat16 products.

  A program multiplies by `copies` matrices one after the other, so that none is found in a cache.
  """
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  for dtype in (F32, BF16):
    for rows in (1, 16, 100):
      check(rows, (1024, 512), dtype)
  big = jnp.zeros(2**29, BF16)
  bandwidth = 2 * big.nbytes / seconds(jax.jit(lambda x: x + 1), big)
  print(
    f'{jax.devices()[0].device_kind}: results agree; copies {bandwidth / 1e9:,.0f} GB/s\n\n'
    '| rows | matrix | form | us | share of | bitsandbytes, us |\n| ---: | --- | --- | ---: | --- | ---: |'
  )
  for rows, shape in ((m, s) for s in shapes for m in (1, 16, 2048, 8192)):
    if rows > 16 and shape[1] > 11008:
      continue
    x = jax.random.normal(jax.random.key(0), (rows, shape[0]), BF16)
    codes = [jnp.full((shape[0] // 2, shape[1]), 16 * i + 5, jnp.uint8) for i in range(copies)]
    absmax = [jnp.full((shape[0] // 64, shape[1]), 1 + i, F32) for i in range(copies)]
    each = lambda fn: jax.jit(lambda x, *ws: [fn(x, *w) for w in zip(*ws, strict=True)])
    took = seconds(each(nf4_matmul), x, codes, absmax) / copies
    if rows <= 16:
      moved = codes[0].nbytes + absmax[0].nbytes + 2 * rows * sum(shape)
      share = f'{moved / took / bandwidth:.0%} of copying'
    else:
      dense = [jnp.full(shape, i, BF16) for i in range(copies)]
      share = f'{seconds(each(jnp.matmul), x, dense) / copies / took:.0%} of bfloat16'
    form = choice(rows, shape, BF16, platform).implementation
    print(
      f'| {rows} | {shape[0]} x {shape[1]} | {form} | {1e6 * took:,.1f} | {share} | '
      f'{peer(rows, shape, copies)} |',
      flush=True,
    )


def peer(rows: int, shape: tuple[int, int], copies: int) -> str:
  """The time of bitsandbytes for the same product, where it is installed and has a GPU."""
  try:
    import bitsandbytes as bnb
    import torch
  except ImportError:
    return '-'
  if not torch.cuda.is_available():
    return '-'
  make = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16)
  held = [bnb.functional.quantize_4bit(make(shape[::-1]), quant_type='nf4') for _ in range(copies)]
  x, best = make(rows, shape[0]), np.inf
  for _ in range(6):
    start = time.perf_counter()
    for codes, state in held:
      bnb.matmul_4bit(x, codes.t(), quant_state=state)
    torch.cuda.synchronize()
    best = min(best, time.perf_counter() - start)
  return f'{1e6 * best / copies:,.1f}'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--target', help='a TPU to compile for, such as tpu:v5e')
  parser.add_argument(
    '--only', default='', help='a pattern of the programs to compile, such as "2048 rows"'
  )
  args = parser.parse_args()
  if args.target:
    compiled(args.target, args.only)
  else:
    timed()


if __name__ == '__main__':
  main()
