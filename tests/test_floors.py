"""Imports go down the floors of docs/architecture.md, to the faces of packages alone."""

import ast
import dataclasses
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROW = re.compile(r'\| (\d+) \| `([\w.]+)` \| [^|]* \| ([^|]*)\|')


@dataclasses.dataclass(frozen=True)
class Package:
  """A row of the table: a package, or a module that stands alone.

  Attributes:
    floor: what stands lower may be imported.
    outside: the third-party packages that it may import.
  """

  floor: int
  outside: frozenset[str]


def floors() -> dict[str, Package]:
  """{name: package} of the table in docs/architecture.md."""
  text = (ROOT / 'docs' / 'architecture.md').read_text()
  found = {}
  for floor, name, outside in ROW.findall(text):
    listed = frozenset(part.strip() for part in outside.split(',') if part.strip())
    found[name] = Package(int(floor), listed)
  return found


def modules() -> dict[str, pathlib.Path]:
  """{dotted name: file} of the library."""
  found = {}
  for top in ('jpeft', 'pallas_kernels'):
    for path in sorted((ROOT / top).rglob('*.py')):
      parts = path.relative_to(ROOT).with_suffix('').parts
      found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
  return found


FLOORS, MODULES = floors(), modules()


def package_of(module: str) -> str | None:
  """The row of the table that a module belongs to: the longest name that it starts with."""
  if module == 'jpeft':
    return module
  fit = [name for name in FLOORS if name != 'jpeft' and f'{module}.'.startswith(f'{name}.')]
  return max(fit, key=len, default=None)


def imports(module: str) -> list[tuple[str, str | None, int]]:
  """(imported module, imported name, line) of every import statement, wherever it stands."""
  path = MODULES[module]
  parent = module if path.name == '__init__.py' else module.rpartition('.')[0]
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [(alias.name, None, node.lineno) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      source = node.module or ''
      if node.level:
        base = '.'.join(parent.split('.')[: len(parent.split('.')) - node.level + 1])
        source = f'{base}.{source}'.rstrip('.')
      found += [(source, alias.name, node.lineno) for alias in node.names]
  return found


def exported(package: str) -> set[str]:
  """The names in the `__all__` of a package's face; all names of a module that stands alone."""
  tree = ast.parse(MODULES[package].read_text())
  for node in tree.body:
    if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == '__all__':
      return set(ast.literal_eval(node.value))
  return set()


def faults(module: str) -> list[str]:
  """One sentence for each import of a module that the table does not allow."""
  own = package_of(module)
  if own is None:
    return [f'{module} stands on no floor']
  found = []
  for source, name, line in imports(module):
    # `from jpeft import core` imports the package jpeft.core, not a name of jpeft.
    if name is not None and f'{source}.{name}' in MODULES and source in ('jpeft', own):
      source, name = f'{source}.{name}', None
    where = f'{module}, line {line}'
    top = source.partition('.')[0]
    if top not in ('jpeft', 'pallas_kernels'):
      if top not in sys.stdlib_module_names and top not in FLOORS[own].outside:
        found.append(f'{where}: {top} is not among the third-party packages of {own}')
      continue
    other = package_of(source)
    if other == own:
      continue
    if other is None or FLOORS[other].floor >= FLOORS[own].floor:
      found.append(f'{where}: {source} does not stand below {own}')
    elif source != other:
      found.append(f'{where}: {source} is behind the face of {other}')
    elif name is not None and MODULES[other].name == '__init__.py' and name not in exported(other):
      found.append(f'{where}: {name} is not in the __all__ of {other}')
  return found


def test_the_table_names_what_there_is():
  assert FLOORS and set(FLOORS) <= set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_down(module):
  assert faults(module) == []


def test_a_climb_and_a_reach_are_found(tmp_path, monkeypatch):
  file = tmp_path / 'wrong.py'
  file.write_text(
    'from jpeft.methods import lora\n'
    'from jpeft.programs.cost import flops\n'
    'from jpeft.programs import _private\n'
    'import torch\n'
    'from jpeft import programs\n'
  )
  monkeypatch.setitem(MODULES, 'jpeft.core.wrong', file)
  assert faults('jpeft.core.wrong') == [
    'jpeft.core.wrong, line 1: jpeft.methods does not stand below jpeft.core',
    'jpeft.core.wrong, line 2: jpeft.programs.cost is behind the face of jpeft.programs',
    'jpeft.core.wrong, line 3: _private is not in the __all__ of jpeft.programs',
    'jpeft.core.wrong, line 4: torch is not among the third-party packages of jpeft.core',
  ]


@pytest.mark.parametrize('module', [name for name in modules() if name.startswith('jpeft.methods')])
def test_methods_use_what_is_public(module):
  """No method reads a private attribute of something that is not its own."""
  tree = ast.parse(modules()[module].read_text())
  reached = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.Attribute) or not node.attr.startswith('_'):
      continue
    is_own = isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls')
    is_of_python = node.attr.startswith('__') or node.attr in ('_replace', '_asdict', '_fields')
    if not is_own and not is_of_python:
      reached.append(f'line {node.lineno}: {ast.unparse(node)}')
  assert not reached
