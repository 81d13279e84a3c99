"""The numbers of a model's layers, and the choice of some of them."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from .paths import natural
from .sites import Site, Sites

# What `layers=` takes: numbers, negative from the end; a slice, or a text such as '-4:' or '0,2,5';
# '!-4:' is everything else, what lies outside of all layers too.
Layers = int | str | slice | Sequence[int]


def text_of(layers: Layers) -> str:
  """A choice as a text."""
  if isinstance(layers, str):
    return layers
  if isinstance(layers, slice):
    bounds = (layers.start, layers.stop, layers.step)
    return ':'.join('' if bound is None else str(bound) for bound in bounds)
  if isinstance(layers, int):
    layers = (layers,)
  return ','.join(str(int(layer)) for layer in layers)


def all_but(layers: Layers) -> str:
  """Everything that a choice leaves out."""
  text = text_of(layers)
  return text.removeprefix('!') if text.startswith('!') else f'!{text}'


def numbered(sites: Sites) -> None:
  """Gives every site the numbers of its layers.

  A layer is a block of the model's family; without a family, the first number in a path that
  differs between paths. The blocks of an encoder and those of a decoder are numbered apart.
  """
  owner = _blocks(sites) if sites.anatomy is not None else {}
  if not owner:
    owner = _numbered_parents(sites)
  stacks: dict[str, list[str]] = {}
  for block in sorted(set(owner.values()), key=natural):
    stacks.setdefault(re.sub(r'\d+', '*', block), []).append(block)

  first: dict[str, int] = {}
  depth: dict[str, int] = {}
  for blocks in stacks.values():
    number = 0
    for block in blocks:
      first[block] = number
      number += _lengths_of(block, owner, sites)
    for block in blocks:
      depth[block] = number
  for path, block in owner.items():
    site = sites[path]
    here = range(first[block], first[block] + site.layers)
    sites[path] = dataclasses.replace(site, numbers=tuple(here), depth=depth[block])


def _blocks(sites: Sites) -> dict[str, str]:
  """{path: path of the block that it is, or lies in}, by the model's family."""
  blocks = {site.path for site in sites.find('{block}')}
  owner = {}
  for path in sites:
    parts = path.split('/')
    for end in range(len(parts), 0, -1):
      if '/'.join(parts[:end]) in blocks:
        owner[path] = '/'.join(parts[:end])
        break
  return owner


def _numbered_parents(sites: Sites) -> dict[str, str]:
  """{path: its start up to the first number that differs between paths, or up to its stack}."""
  values: dict[str, set[str]] = {}
  for path in sites:
    for prefix, number, _ in _cuts(path):
      values.setdefault(prefix, set()).add(number)
  owner = {}
  for path, site in sites.items():
    for prefix, number, end in _cuts(path):
      if len(values[prefix]) > 1:
        owner[path] = prefix + number + end
        break
    else:
      if site.axes:
        owner[path] = _stack_root(path, sites)
  return owner


def _cuts(path: str) -> Iterable[tuple[str, str, str]]:
  """(what stands before, the number, the rest of the path's part) for every number of a path."""
  for found in re.finditer(r'\d+', path):
    end = re.match(r'[^/]*', path[found.end() :])
    yield path[: found.start()], found[0], end[0] if end else ''


def _stack_root(path: str, sites: Sites) -> str:
  """The outermost site of the stack that a site lies in."""
  parts = path.split('/')
  for end in range(1, len(parts) + 1):
    start = '/'.join(parts[:end])
    if start in sites and sites[start].axes:
      return start
  return path


def _lengths_of(block: str, owner: dict[str, str], sites: Sites) -> int:
  """How many layers a block stands for."""
  if block in sites:
    return sites[block].layers
  return max(sites[path].layers for path, found in owner.items() if found == block)


def restricted(site: Site, layers: Layers) -> Site | None:
  """The site with the layers of a choice; None if it has none of them.

  Raises:
    ValueError: a number that there is not, or a text that is no choice.
  """
  inverted = isinstance(layers, str) and layers.startswith('!')
  if not site.numbers:
    return site if inverted else None
  wanted = _numbers(all_but(layers) if inverted else layers, site.depth)
  chosen = tuple(i for i, number in enumerate(site.numbers) if (number in wanted) != inverted)
  if not chosen:
    return None
  if len(chosen) == len(site.numbers):
    return site
  return dataclasses.replace(site, chosen=chosen)


def _numbers(layers: Layers, depth: int) -> set[int]:
  """The numbers, from 0 on, that a choice means among `depth` layers."""
  if isinstance(layers, str):
    layers = _parsed(layers)
  if isinstance(layers, slice):
    return set(range(depth)[layers])
  if isinstance(layers, int):
    layers = (layers,)
  numbers = set()
  for number in layers:
    if not -depth <= number < depth:
      raise ValueError(
        f'layers={number} is not among the {depth} layers, 0 to {depth - 1} or -{depth} to -1'
      )
    numbers.add(number % depth)
  return numbers


def _parsed(text: str) -> slice | tuple[int, ...]:
  """'-4:' as a slice, '0,2,5' as numbers."""
  try:
    if ':' in text:
      return slice(*(int(part) if part.strip() else None for part in text.split(':')))
    return tuple(int(part) for part in text.split(','))
  except (TypeError, ValueError):
    raise ValueError(
      f"layers={text!r} is no choice of layers: give numbers ('0,2,5') or a slice ('-4:', '::2'), "
      "after '!' what is left out"
    ) from None
