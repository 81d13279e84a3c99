"""The notebooks run top to bottom, on less of everything."""

import pathlib
import re

import nbclient
import nbformat
import pytest

from tests.runs import backbone, backwards, decoder, images, wide_decoder  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
COLABS = ROOT / 'colabs'
NOTEBOOKS = sorted(path.name for path in COLABS.glob('*.ipynb'))


def is_install(cell):
  return 'install' in cell.metadata.get('tags', [])


def code_cells(notebook):
  return [c for c in notebook.cells if c.cell_type == 'code' and not is_install(c)]


def run(cells, folder=ROOT):
  """(what the cells print, the number of pictures they show) in a kernel of their own."""
  notebook = nbformat.v4.new_notebook(cells=cells)
  client = nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name='python3',
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  pictures = sum('image/png' in output.get('data', {}) for output in outputs)
  return ''.join(output.get('text', '') for output in outputs), pictures


@pytest.fixture
def executed(monkeypatch, tmp_path):
  """executed(notebook, **settings) -> what its cells print, and the number of pictures."""

  def executed(name, **settings):
    for key, value in {'FOLDER': tmp_path / 'kept', 'TARGET': 'cpu', **settings}.items():
      monkeypatch.setenv(f'JPEFT_NOTEBOOK_{key}', str(value))
    return run(code_cells(nbformat.read(COLABS / name, 4)))

  return executed


# The kernel's own libraries, which run in this process too, are not ours to keep quiet.
quiet = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_every_cell_is_python(name):
  cells = code_cells(nbformat.read(COLABS / name, 4))
  assert len(cells) >= 5
  for cell in cells:
    compile(cell.source, name, 'exec')


@quiet
def test_notebooks_install_the_checkout_they_lie_in(tmp_path):
  """Else the package by name; the kernel's pip is one that prints what it is asked for."""
  python = nbformat.v4.new_code_cell
  cells = [
    python(
      'from IPython.core.magic import register_line_magic\n'
      '@register_line_magic\n'
      'def pip(line):\n'
      '  print(line)'
    )
  ]
  for folder in (COLABS, ROOT, tmp_path):
    cells.append(python(f'import os\nos.chdir({str(folder)!r})'))
    for name in NOTEBOOKS:
      installs = [c for c in nbformat.read(COLABS / name, 4).cells if is_install(c)]
      assert len(installs) == 1
      cells.append(python(installs[0].source))
  printed, _ = run(cells)
  asked = printed.splitlines()
  count = len(NOTEBOOKS)
  assert len(asked) == 3 * count
  for line in asked[: 2 * count]:
    assert re.match(rf"install -q '{re.escape(str(ROOT))}(\[[a-z,]+\])?'", line)
  for line in asked[2 * count :]:
    assert re.match(r"install -q 'jpeft(\[[a-z,]+\])?'", line)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_are_kept_without_what_they_print(name):
  notebook = nbformat.read(COLABS / name, 4)
  nbformat.validate(notebook)
  assert not any(cell.get('outputs') for cell in notebook.cells)


@pytest.fixture
def tiny(backbone, images):  # noqa: F811
  """The settings of a run of seconds on the two classes of images."""
  return {
    'MODEL': backbone,
    'DATA': f'folder:{images}',
    'PIXELS': 8,
    'EXAMPLES': 24,
    'BATCH': 4,
    'EPOCHS': 2,
  }


@quiet
def test_the_quickstart_runs_on_a_tiny_backbone(executed, tiny, tmp_path):
  printed, pictures = executed('quickstart.ipynb', **tiny)
  assert 'x forward' in printed and 'total MiB' in printed
  assert re.search(r'\rupdate \d+/12', printed)
  after = re.findall(r'([\d.]+) % of 10 test images', printed)
  assert len(after) == 3 and after[1] == after[2]  # two epochs, and theta loaded again
  assert (tmp_path / 'kept/theta.safetensors').exists() and pictures == 4


@quiet
def test_your_model_is_adapted_in_linen_and_in_nnx(executed, tmp_path):
  printed, pictures = executed('your_model.ipynb', STEPS=100)
  for name in ('Linen', 'NNX'):
    before, after = re.search(
      rf'{name}: ([\d.]+) % of the new pictures before, ([\d.]+) % after', printed
    ).groups()
    assert float(after) > float(before) + 15
    (again,) = re.findall(rf'{name.lower()}-theta.safetensors: .* ([\d.]+) % when loaded', printed)
    assert again == after
  assert 'Linen and NNX: [True, True]' in printed
  assert "refused: lora: no site matches: 'bodi'" in printed and pictures == 4


@quiet
def test_the_ladder_runs_on_a_tiny_backbone(executed, tiny, tmp_path):
  printed, pictures = executed('ladder.ipynb', **tiny)
  assert 'lora_packed' in printed and 'wrong ones red' in printed
  for name in ('linear', 'lst', 'lora'):
    assert (tmp_path / 'kept' / name / 'theta.safetensors').exists()
  assert 'features of 34 examples' in printed and 'an update asks for' in printed
  assert pictures == 7


@pytest.mark.assets
@quiet
def test_the_ladder_runs(executed):
  printed, _ = executed('ladder.ipynb', EXAMPLES=100, EPOCHS=2)
  assert printed.count('an update asks for') == 3 and 'features of 200 examples' in printed


@pytest.mark.assets
@quiet
def test_the_quickstart_runs(executed):
  printed, _ = executed('quickstart.ipynb', EXAMPLES=96, EPOCHS=2)
  assert '% of 96 test images' in printed and 'x forward' in printed


def before_and_after(printed):
  """The perplexities that the notebook of QST prints."""
  return [float(line.split()[-1]) for line in printed.splitlines() if 'held-out perplexity' in line]


@quiet
def test_qst_runs_on_a_tiny_decoder(executed, wide_decoder, backwards, tmp_path):  # noqa: F811
  """Random weights and a made-up task: two letters, to be written backwards in capitals."""
  printed, pictures = executed(
    'qst_llm.ipynb',
    MODEL=wide_decoder,
    DATA=f'completions:{backwards}',
    STEPS=100,
    BATCH=3,
  )
  assert 'weights in' in printed and 'texts in' in printed and 'qlora' in printed
  before, after = before_and_after(printed)
  assert before > 15 and after < before / 3
  assert f'loaded after 100 updates: perplexity {after:.2f}' in printed
  assert (tmp_path / 'kept/theta.safetensors').exists() and pictures == 4


@pytest.mark.assets
@quiet
def test_qst_runs(executed):
  printed, _ = executed('qst_llm.ipynb', WORDS=120, STEPS=3, BATCH=1)
  before, after = before_and_after(printed)
  assert (
    1 < after < 1.2 * before
  )  # three updates leave no more than a sign that it goes the right way
