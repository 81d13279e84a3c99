"""A fresh process that is given a folder with theta: `python -m tests.contract.restore FOLDER
METHOD:BACKBONE ...`
"""

import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.contract.pair import Pair


def output(pair: Pair, theta) -> dict[str, np.ndarray]:
  """The leaves of the output, by number."""
  run = lambda theta, held: pair.tuned.apply(theta, held, *pair.b.args, **pair.b.kwargs)
  out = jax.jit(run)(theta, pair.b.backbone)
  return {str(i): np.asarray(y) for i, y in enumerate(jax.tree.leaves(out))}


def main(folder: str, *names: str) -> None:
  for name in names:
    pair, path = Pair(*name.split(':')), pathlib.Path(folder) / name
    theta = ocp.StandardCheckpointer().restore(path / 'theta', pair.tuned.shapes)
    np.savez(path / 'out.npz', **output(pair, theta))


if __name__ == '__main__':
  main(*sys.argv[1:])
