"""What the compiled program says of the time of a step, as entries and cells of tables."""

from collections.abc import Mapping
from typing import Any

from jpeft import programs


def entries(found: programs.Schedule | None) -> dict[str, float | None]:
  """Entries of a row: cycles in 1e6, MiB (2**20 bytes); None where the compiler has none."""
  if found is None:
    return {'mcycles': None, 'product_share': None, 'kernel_calls': None, 'moved_mib': None}
  mcycles = None
  share = None
  if found.cycles:
    mcycles = round(found.cycles / 1e6, 2)
    share = round(found.products / found.cycles, 3)
  return {
    'mcycles': mcycles,
    'product_share': share,
    'kernel_calls': int(found.kernels),
    'moved_mib': round(found.moved / 2**20, 1),
  }


def cells(row: Mapping[str, Any]) -> tuple[str, str]:
  """(cycles in 1e6 with the calls of kernels that have none, MiB moved) of a row; '-' for none."""
  mcycles = '-'
  if row.get('mcycles') is not None:
    mcycles = f'{row["mcycles"]:,.1f}'
  if row.get('kernel_calls'):
    mcycles += f' + {row["kernel_calls"]:,}'
  moved = '-'
  if row.get('moved_mib') is not None:
    moved = f'{row["moved_mib"]:,.0f}'
  return mcycles, moved
