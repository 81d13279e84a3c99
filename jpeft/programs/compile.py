"""Compiled programs, and the bytes that they need on a device."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a program runs.

  Attributes:
    argument: what it is called with.
    output: what it returns.
    alias: the part of the output that lies in the memory of donated arguments.
    temp: what it allocates in between.
  """

  argument: int
  output: int
  alias: int
  temp: int

  @property
  def total(self) -> int:
    return self.argument + self.output + self.temp - self.alias


class TooLarge(Exception):
  """The compiler refuses a program for want of memory.

  Attributes:
    bytes: what it needs on one device.
  """

  def __init__(self, needed: int):
    super().__init__(f'the program needs {mib(needed)} on a device')
    self.bytes = needed


def compiled(
  traced: jax.stages.Traced, options: Mapping[str, Any] | None = None, arguments: int = 0
) -> jax.stages.Compiled:
  """The compiled program.

  Args:
    traced: from `jax.jit(fn).trace(...)`.
    options: of the compiler.
    arguments: bytes that it is called with, for a compiler whose refusal counts temporaries alone.

  Raises:
    TooLarge: the device that it is compiled for has too little memory, and the compiler says so.
  """
  try:
    return traced.lower().compile(dict(options or {}))
  except jax.errors.JaxRuntimeError as error:
    found = re.search(
      r'(Used |for HLO temporaries \()(\d+(?:\.\d+)?)([KMGT]?)i?B?(?: of \d|\))', str(error)
    )
    if 'RESOURCE_EXHAUSTED' not in str(error) or found is None:
      raise
    rest = 0 if found[1] == 'Used ' else arguments
    raise TooLarge(int(float(found[2]) * _UNITS[found[3]]) + rest) from error


_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def memory(program: jax.stages.Compiled) -> Memory | None:
  """What the compiler reports; None where it says nothing."""
  found = program.memory_analysis()
  if found is None:
    return None
  return Memory(
    **{f.name: getattr(found, f'{f.name}_size_in_bytes') for f in dataclasses.fields(Memory)}
  )


def nbytes(tree) -> int:
  """The bytes of a tree of arrays or shapes; of what is sharded, those on one device; none of what
  hosts hold.
  """

  def leaf(x):
    sharding = getattr(x, 'sharding', None)
    if getattr(sharding, 'memory_kind', None) == 'pinned_host':
      return 0
    shape = sharding.shard_shape(x.shape) if sharding is not None else x.shape
    size = 4 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(shape) * size

  return sum(map(leaf, jax.tree.leaves(tree)))


def mib(bytes_: float) -> str:
  return f'{bytes_ / 2**20:,.0f} MiB'
