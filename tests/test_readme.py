"""What the README says of the code is what the code is."""

import pathlib
import re

from jpeft.methods.__main__ import rows

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()


def section(name: str) -> str:
  return re.search(rf'<!-- {name} -->\n(.*?)<!-- /{name} -->', README, re.DOTALL)[1]


def methods_table() -> str:
  lines = [
    '| method | what it is | arXiv | memory class | merges |',
    '| --- | --- | --- | --- | --- |',
  ]
  for r in rows():
    merges = 'yes' if r['mergeable'] else 'no'
    lines.append(f'| `{r["name"]}` | {r["title"]} | {r["paper"]} | {r["memory"]} | {merges} |')
  return '\n'.join(lines) + '\n'


def test_the_methods_table_is_the_registry():
  assert section('methods') == methods_table()


def test_every_file_it_names_exists():
  root = pathlib.Path(__file__).parent.parent
  named = re.findall(r'\]\(([\w./]+)\)', README) + re.findall(r'configs/\w+\.py', README)
  assert len(named) >= 4
  for path in named:
    assert (root / path).exists(), path
