"""Small decoders whose updates are made on a mesh of devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import quant, training
from jpeft.models import Llama
from jpeft.planning import Work

ROWS, LENGTH, WORDS = 8, 8, 48
METHODS = {
  'lora': ('lora', None, {}),
  'qlora': ('lora', 'nf4', {}),
  'qst': ('qst', 'nf4', {'reduction': 8}),  # heads of one number
  'lst': ('lst', None, {}),
  'saved_bits': ('lora', None, {'saved_bits': 4}),
  'meft': ('meft', None, {}),
  'full': ('full', None, {}),
}
# float32 rounds by 1e-7, which moves some residuals to the next of their 4-bit codes, and theta by
# 5e-5 of its way. In float64 so many do not lie between two codes.
IN_FLOAT64 = ('saved_bits',)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a decoder of two layers is, and the rows that it reads.

  Attributes:
    kv_heads, scan, remat: of `Llama`, which has 8 query heads.
    length: tokens of a row.
    packed: rows have two texts, and padding in front of them or behind.
  """

  kv_heads: int = 4
  scan: bool = True
  remat: bool = False
  length: int = LENGTH
  packed: bool = False

  def mask(self) -> np.ndarray:
    """[ROWS, length], as `Llama` takes it."""
    mask = np.ones((ROWS, self.length), np.int32)
    if self.packed:
      mask[:, self.length // 3 :] = 2
      mask[::2, :3] = 0
      mask[1::2, -2:] = 0
    return mask


PLAIN = Shape()


def precision(kind):
  """A context in which the arrays of a method have the dtype that it is compared in."""
  return jax.enable_x64(kind in IN_FLOAT64)


@functools.cache
def decoder(storage, shape, dtype):
  """(model, variables) of a decoder of two layers."""
  tokens = jnp.ones((1, LENGTH), jnp.int32)
  fields = {'kv_heads': shape.kv_heads, 'scan': shape.scan, 'remat': shape.remat, 'dtype': dtype}
  model = Llama(64, 2, 8, 128, WORDS, tied=False, **fields)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  variables = jax.tree.map(lambda x: x.astype(dtype), variables)
  if storage:
    variables = quant.quantize(model, quant.named(storage), variables, tokens)
  return model, variables


def work_of(kind, mesh, backbone, whole_below=1, shape=PLAIN):
  """(work, tuned) of a method on a decoder of two layers."""
  name, storage, options = METHODS[kind]
  dtype = jnp.float64 if kind in IN_FLOAT64 else jnp.float32
  model, variables = decoder(storage, shape, dtype)
  names = ('tokens', 'token_mask', 'label')

  def batch(size):
    return {name: jax.ShapeDtypeStruct((size, shape.length), jnp.int32) for name in names}

  work = Work(model, variables, batch, ROWS, mesh=mesh, backbone=backbone, whole_below=whole_below)
  return work, work.tuned(jpeft.make(name, head=False, **options))


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An update of a method on a mesh.

  Attributes:
    kind, shape: the method, and the decoder.
    program: the compiled update.
    state, arrays: before the first update, and the backbone, both on their devices.
    layout: of both.
  """

  kind: str
  shape: Shape
  program: Callable
  state: dict
  arrays: Any
  layout: training.Layout

  def trained(self, updates):
    """theta after some updates."""
    rng = np.random.default_rng(1)
    mask = self.shape.mask()
    with precision(self.kind):
      state = jax.tree.map(jnp.copy, self.state)  # it is donated
      for _ in range(updates):
        tokens = rng.integers(0, WORDS, (ROWS, self.shape.length)).astype(np.int32)
        label = np.where(mask > 0, np.roll(tokens, -1, 1), -1)
        batch = {'tokens': tokens, 'token_mask': mask, 'label': label}
        batch = jax.device_put(batch, training.of_batch(self.layout.mesh, batch))
        state, _ = self.program(state, self.arrays, batch)
      return jax.device_get(state['theta'])


@functools.cache
def prepared(kind, mesh, backbone, shape=PLAIN, **changes):
  """An update of a method, compiled for a mesh, and its state before the first."""
  with precision(kind):
    work, tuned = work_of(kind, mesh, backbone, shape=shape, **changes)
    tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-2), eps=1e-2)
    devices = training.mesh(*mesh)
    layout = work.layout(tuned, devices)
    shapes = training.state_shapes(tuned, tx, work.variables)
    placed = work.placed(tuned, devices, shapes, ROWS)
    program, _ = training.fitting(work.step(tuned, tx, devices), *placed)
    arrays = jax.device_put(work.variables, layout.of_backbone(work.variables))
    where = layout.of_state(shapes)
    state = training.initial_state(tuned, tx, arrays, 0, shardings=where)
  return Prepared(kind, shape, program, state, arrays, layout)


def distance(a, b):
  parts = jax.tree.map(lambda x, y: np.square(x - y).sum(), a, b)
  return math.sqrt(sum(jax.tree.leaves(parts)))


def named(kind, mesh, backbone, *more):
  """The name of a cell."""
  return '-'.join((kind, 'x'.join(map(str, mesh)), backbone, *map(str, more)))
