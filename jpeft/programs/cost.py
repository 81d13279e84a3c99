"""What a compiled program costs: bytes on a device, and FLOPs with every round of every loop."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
from jax.interpreters.partial_eval import dce_jaxpr


class Flops(NamedTuple):
  """FLOPs of the matrix products and convolutions of a program, two for each multiply-add.

  Attributes:
    all: with the rounds of its loops.
    once: with the body of each loop counted once, as XLA counts.
  """

  all: float
  once: float


def flops(traced: jax.stages.Traced) -> Flops:
  """Counts a traced program, without what no output needs; nothing is compiled.

  A branch counts as its most expensive arm; a `while` loop, whose rounds are not known, as one round.
  """
  jaxpr = traced.jaxpr.jaxpr
  return _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def uncounted(traced: jax.stages.Traced, devices: int = 1) -> float:
  """The FLOPs that XLA's cost analysis leaves out: it counts the body of a loop once."""
  found = flops(traced)
  return (found.all - found.once) / devices


def _count(jaxpr) -> Flops:
  total, once = 0.0, 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in _PRODUCTS:
      found = [Flops(*[_PRODUCTS[name](eqn)] * 2)]
    else:
      found = [_count(sub) for sub in _subs(eqn.params)]
      if name == 'cond' and found:
        found = [max(found)]
    rounds = eqn.params['length'] if name == 'scan' else 1
    total += rounds * sum(f.all for f in found)
    once += sum(f.once for f in found)
  return Flops(total, once)


def _subs(params: dict) -> list:
  """The jaxprs among the parameters of an equation."""
  values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
  return [getattr(v, 'jaxpr', v) for v in values if isinstance(v, (jex.Jaxpr, jex.ClosedJaxpr))]


def _dot(eqn) -> float:
  left, _ = eqn.params['dimension_numbers'][0]
  inner = math.prod(eqn.invars[0].aval.shape[i] for i in left)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner


def _conv(eqn) -> float:
  kernel, spec = eqn.invars[1].aval.shape, eqn.params['dimension_numbers'].rhs_spec
  window = math.prod(kernel[i] for i in spec[2:])  # rhs_spec: out features, in features, then space
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * kernel[spec[1]] * window


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _conv}


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


def compiled(traced: jax.stages.Traced, options: Mapping[str, Any] | None = None,
             arguments: int = 0) -> jax.stages.Compiled:
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
    found = re.search(r'(Used |for HLO temporaries \()(\d+(?:\.\d+)?)([KMGT]?)i?B?(?: of \d|\))', str(error))
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
  return Memory(**{f.name: getattr(found, f'{f.name}_size_in_bytes') for f in dataclasses.fields(Memory)})


def nbytes(tree) -> int:
  """The bytes of a tree of arrays or shapes; of what is sharded, those on one device; none of what hosts hold."""
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
