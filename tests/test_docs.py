"""What the documents say runs: their Python, in a fresh process a page, and their links.

A fenced block marked `python` runs, one marked `pycon` is compared with what it prints, and one
marked `py` is a fragment that is only shown. The blocks of README.md run alone; those of another
page run one after another.
"""

import doctest
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
# Tables of benchmarks; their code is only shown.
MEASURED = ('accuracy.md', 'kernels.md', 'memory.md')
_BLOCK = re.compile(r'^```(python|pycon)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_LINK = re.compile(r'\]\(([^)\s#]+)(?:#[\w-]+)?\)')


def blocks(page: pathlib.Path) -> Iterator[tuple[str, str, int]]:
  """(kind, code, lines before it) of each block of a page that runs."""
  text = page.read_text()
  for match in _BLOCK.finditer(text):
    yield match[1], match[2], text.count('\n', 0, match.start(2))


def run(page: pathlib.Path) -> None:
  """Runs the blocks of a page. A traceback shows the lines of the page."""
  namespace = {'__name__': page.stem}
  for kind, code, line in blocks(page):
    if page.name == 'README.md':
      namespace = {'__name__': '__main__'}
    if kind == 'python':
      exec(compile('\n' * line + code, page, 'exec'), namespace)
    else:
      test = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line)
      runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
      runner.run(test, clear_globs=False)
      namespace.update(test.globs)
      if runner.failures:
        raise SystemExit(f'{page.name}: {runner.failures} examples print something else')


@pytest.mark.parametrize(
  'page', [p.name for p in PAGES if p.name not in MEASURED and list(blocks(p))]
)
def test_its_python_runs_as_it_stands(page):
  # A process for each page: what it registers must not reach other tests.
  found = subprocess.run(
    [sys.executable, '-W', 'error', '-m', 'tests.test_docs', page],
    cwd=ROOT,
    env={'JAX_PLATFORMS': 'cpu', **os.environ},
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize('page', [page.name for page in PAGES])
def test_every_file_it_links_to_exists(page):
  (path,) = [p for p in PAGES if p.name == page]
  links = [link for link in _LINK.findall(path.read_text()) if '://' not in link]
  assert [link for link in links if not (path.parent / link).exists()] == []


if __name__ == '__main__':
  run(next(page for page in PAGES if page.name == sys.argv[1]))
