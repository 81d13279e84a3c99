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
  writes its programs to a folder by itself, without estimates of cycles: such a program is compiled
  a second time for that.

  Args:
    traced, options, arguments: see `compiled`.
    platform: of the devices, such as 'tpu'.

  Raises:
    TooLarge: see `compiled`.
  """
  program = compiled(traced, options, arguments)
  text = _printed(program)
  if text is not None or platform != 'tpu':
    return program, text
  with tempfile.TemporaryDirectory() as folder:
    compiled(traced, {**options, 'xla_dump_to': folder}, arguments)
    written = list(Path(folder).glob('*.after_optimizations.txt'))
    if len(written) == 1:
      text = written[0].read_text('utf-8')
  return program, text


def _printed(program: jax.stages.Compiled) -> str | None:
  try:
    return program.as_text()
  except jax.errors.JaxRuntimeError:
    return None
