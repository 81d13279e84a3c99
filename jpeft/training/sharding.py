"""Meshes of devices, and arrays that are whole on each or cut by examples; others see layout.py."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import tasks

# Of a mesh, in the order of its devices: neighbours share a copy of the backbone.
AXES = ('data', 'sequence', 'model')


def mesh(data: int, model: int, sequence: int = 1) -> Mesh:
  """A mesh of data x sequence x model devices.

  Raises:
    ValueError: there are not that many devices.
  """
  devices = jax.devices()
  count = len(devices)
  needed = data * sequence * model
  if needed > count:
    verb = 'is' if count == 1 else 'are'
    raise ValueError(f'{named(data, model, sequence)} needs {needed} devices, there {verb} {count}')
  return mesh_of(devices, data, model, sequence)


def mesh_of(devices, data: int, model: int, sequence: int = 1) -> Mesh:
  """A mesh of the first of some devices."""
  grid = np.array(devices[: data * sequence * model])
  return Mesh(grid.reshape(data, sequence, model), AXES)


def named(data: int, model: int, sequence: int = 1) -> str:
  """The sizes of a mesh by their keys in a configuration; no sequence of one device."""
  text = f'mesh.data={data} x mesh.model={model}'
  if sequence > 1:
    text += f' x mesh.sequence={sequence}'
  return text


def token_parts(mesh: Mesh) -> int:
  """Devices that the tokens of a row are cut over; 1 on a mesh without such an axis."""
  return mesh.shape.get('sequence', 1)


def with_sharding(tree, sharding) -> Any:
  """The shapes of a tree with a sharding, or with a tree of shardings."""
  if isinstance(sharding, NamedSharding):
    sharding = jax.tree.map(lambda _: sharding, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, sharding
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The first axis, that of examples, over the data axis of the mesh."""
  return NamedSharding(mesh, PartitionSpec('data'))


def of_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
  """Where the arrays of a batch are: cut by examples, and those of tokens by tokens too.

  Args:
    mesh: of the run.
    batch: {name: array or shape}.
  """
  length = None
  if token_parts(mesh) > 1:
    length = tasks.length_of(batch)
  found = {}
  for name, x in batch.items():
    found[name] = over_data(mesh)
    if length is not None and len(x.shape) > 1 and x.shape[1] == length:
      found[name] = NamedSharding(mesh, PartitionSpec('data', 'sequence'))
  return found


def idles_in_host(mesh: Mesh) -> bool:
  """Whether what `edit` alone reads is in host memory: on one device that is no CPU."""
  return mesh.size == 1 and mesh.devices.flat[0].platform != 'cpu'


def offloads(mesh: Mesh, wanted: bool) -> bool:
  """Whether the optimizer's state goes to host memory: if wanted, and the devices are no CPUs."""
  return wanted and mesh.devices.flat[0].platform != 'cpu'
