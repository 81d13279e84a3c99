"""Meshes of devices, and arrays that are whole on each or cut by examples; others see layout.py."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh(data: int, model: int) -> Mesh:
  """A mesh of data x model devices.

  Raises:
    ValueError: there are not that many devices.
  """
  devices = jax.devices()
  count = len(devices)
  if data * model > count:
    verb = 'is' if count == 1 else 'are'
    raise ValueError(
      f'mesh.data={data} x mesh.model={model} needs {data * model} devices, there {verb} {count}'
    )
  grid = np.array(devices[: data * model]).reshape(data, model)
  return Mesh(grid, ('data', 'model'))


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


def idles_in_host(mesh: Mesh) -> bool:
  """Whether what `edit` alone reads is in host memory: on one device that is no CPU."""
  return mesh.size == 1 and mesh.devices.flat[0].platform != 'cpu'


def offloads(mesh: Mesh, wanted: bool) -> bool:
  """Whether the optimizer's state goes to host memory: if wanted, and the devices are no CPUs."""
  return wanted and mesh.devices.flat[0].platform != 'cpu'
