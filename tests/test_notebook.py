"""The notebook runs top to bottom, on fewer digits."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOK = pathlib.Path(__file__).parent.parent / 'colabs' / 'quickstart.ipynb'


def code_cells(notebook):
  return [c for c in notebook.cells if c.cell_type == 'code' and 'install' not in c.metadata.get('tags', [])]


def test_every_cell_is_python():
  cells = code_cells(nbformat.read(NOTEBOOK, 4))
  assert len(cells) >= 5
  for cell in cells:
    compile(cell.source, NOTEBOOK.name, 'exec')


@pytest.mark.assets
# The kernel's own libraries, which run in this process too, are not ours to keep quiet.
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')
def test_the_notebook_runs(monkeypatch):
  monkeypatch.setenv('JPEFT_NOTEBOOK_EXAMPLES', '96')
  monkeypatch.setenv('JPEFT_NOTEBOOK_EPOCHS', '2')
  notebook = nbformat.read(NOTEBOOK, 4)
  notebook.cells = code_cells(notebook)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute()
  printed = ''.join(o.get('text', '') for c in notebook.cells for o in c.get('outputs', []))
  assert '% of 96 test digits' in printed
  assert 'x forward' in printed
