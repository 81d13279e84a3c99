"""The notebooks run top to bottom, on less of everything."""

import pathlib

import nbclient
import nbformat
import pytest

from tests.runs import backwards, decoder, wide_decoder  # noqa: F401

COLABS = pathlib.Path(__file__).parent.parent / 'colabs'
NOTEBOOKS = sorted(path.name for path in COLABS.glob('*.ipynb'))


def code_cells(notebook):
  return [
    c
    for c in notebook.cells
    if c.cell_type == 'code' and 'install' not in c.metadata.get('tags', [])
  ]


@pytest.fixture
def executed(monkeypatch):
  """executed(notebook, **settings) -> what its cells print."""

  def run(name, **settings):
    for key, value in settings.items():
      monkeypatch.setenv(f'JPEFT_NOTEBOOK_{key}', str(value))
    notebook = nbformat.read(COLABS / name, 4)
    notebook.cells = code_cells(notebook)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
    return ''.join(o.get('text', '') for c in notebook.cells for o in c.get('outputs', []))

  return run


# The kernel's own libraries, which run in this process too, are not ours to keep quiet.
quiet = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_every_cell_is_python(name):
  cells = code_cells(nbformat.read(COLABS / name, 4))
  assert len(cells) >= 5
  for cell in cells:
    compile(cell.source, name, 'exec')


@pytest.mark.assets
@quiet
def test_the_quickstart_runs(executed):
  printed = executed('quickstart.ipynb', EXAMPLES=96, EPOCHS=2)
  assert '% of 96 test digits' in printed
  assert 'x forward' in printed


def before_and_after(printed):
  """The perplexities that the notebook of QST prints."""
  return [float(line.split()[-1]) for line in printed.splitlines() if 'held-out perplexity' in line]


@quiet
def test_qst_runs_on_a_tiny_decoder(executed, wide_decoder, backwards):  # noqa: F811
  """Random weights and a made-up task: two letters, to be written backwards in capitals."""
  printed = executed(
    'qst_llm.ipynb',
    MODEL=wide_decoder,
    DATA=f'completions:{backwards}',
    STEPS=100,
    BATCH=3,
    TARGET='cpu',
  )
  assert 'weights in' in printed and 'texts in' in printed and 'qlora' in printed
  before, after = before_and_after(printed)
  assert before > 15 and after < before / 3


@pytest.mark.assets
@quiet
def test_qst_runs(executed):
  printed = executed('qst_llm.ipynb', WORDS=120, STEPS=3, BATCH=1, TARGET='cpu')
  before, after = before_and_after(printed)
  assert (
    1 < after < 1.2 * before
  )  # three updates leave no more than a sign that it goes the right way
