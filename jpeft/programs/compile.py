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
    found = _REFUSAL.search(str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or found is None:
      raise
    kind, number, unit = found.groups()
    needed = int(float(number) * _UNITS[unit])
    if kind != 'Used ':  # temporaries alone
      needed += arguments
    raise TooLarge(needed) from error


_REFUSAL = re.compile(r'(Used |for HLO temporaries \()(\d+(?:\.\d+)?)([KMGT]?)i?B?(?: of \d|\))')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def memory(program: jax.stages.Compiled) -> Memory | None:
  """What the compiler reports; None if it reports nothing."""
  found = program.memory_analysis()
  if found is None:
    return None
  names = [field.name for field in dataclasses.fields(Memory)]
  return Memory(**{name: getattr(found, f'{name}_size_in_bytes') for name in names})


def nbytes(tree) -> int:
  """The bytes on one device of a tree of arrays or shapes, without arrays in the host's memory."""
  return sum(_nbytes(x) for x in jax.tree.leaves(tree))


def _nbytes(x) -> int:
  sharding = getattr(x, 'sharding', None)
  if getattr(sharding, 'memory_kind', None) == 'pinned_host':
    return 0
  shape = x.shape
  if sharding is not None:
    shape = sharding.shard_shape(shape)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return 4 * math.prod(shape)
  return x.dtype.itemsize * math.prod(shape)


def mib(bytes_: float) -> str:
  return f'{bytes_ / 2**20:,.0f} MiB'
