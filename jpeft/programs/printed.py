"""Compiled programs with their text, of which some cannot be printed by jaxlib."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from .compile import compiled


def compiled_with_text(
  traced: jax.stages.Traced, options: Mapping[str, Any], arguments: int, platform: str
) -> tuple[jax.stages.Compiled, str | None]:
  """(the compiled program, its text; None if it cannot be printed).

  libtpu makes instructions (async-update) that jaxlib does not read, so that `as_text` raises. It
  writes its programs to a folder by itself, as it is asked to here.

  Args:
    traced, options, arguments: see `compiled`.
    platform: of the devices, such as 'tpu'.

  Raises:
    TooLarge: see `compiled`.
  """
  if platform != 'tpu':
    program = compiled(traced, options, arguments)
    return program, _printed(program)
  with tempfile.TemporaryDirectory() as folder:
    program = compiled(traced, {**options, 'xla_dump_to': folder}, arguments)
    written = list(Path(folder).glob('*.after_optimizations.txt'))
    if len(written) == 1:
      return program, written[0].read_text('utf-8')
  return program, _printed(program)


def _printed(program: jax.stages.Compiled) -> str | None:
  try:
    return program.as_text()
  except jax.errors.JaxRuntimeError:
    return None
