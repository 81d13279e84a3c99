"""Images in lists, as those of VTAB-1k."""

import numpy as np
import pytest
from PIL import Image

from jpeft import data


@pytest.fixture
def root(tmp_path):
  """Lists of five images; the red channel of an image is its number."""
  (tmp_path / 'images' / 'a b').mkdir(parents=True)
  for i in range(5):
    Image.new('RGB', (4, 3), (i, 0, 0)).save(tmp_path / 'images' / 'a b' / f'{i}.png')
  line = 'images/a b/{}.png {}\n'.format
  (tmp_path / 'train800.txt').write_text(line(3, 2) + '\n' + line(1, 0))
  (tmp_path / 'val200.txt').write_text(line(0, '02'))
  (tmp_path / 'train800val200.txt').write_text(line(3, 2) + line(1, 0) + line(0, 2))
  (tmp_path / 'test.txt').write_text(line(4, 3) + line(2, 0))
  return tmp_path


def found(root, split):
  return [(int(e['image'][0, 0, 0]), e['label']) for e in data.load(f'lists:{root}', split)]


def test_splits_are_the_lists_in_their_order(root):
  assert found(root, 'train800') == [(3, 2), (1, 0)] and found(root, 'val200') == [(0, 2)]
  assert found(root, 'train800val200') == found(root, 'train800+val200')
  assert found(root, 'test') == [(4, 3), (2, 0)]
  # A number is its own class, though no image has label 1.
  assert data.load(f'lists:{root}', 'test').classes == ['0', '1', '2', '3']
  assert data.load(f'lists:{root}', 'test')[0]['image'].dtype == np.uint8


def test_labels_may_be_words(root):
  (root / 'val200.txt').write_text('images/a b/0.png owl\n')
  assert data.load(f'lists:{root}', 'val200').classes == ['0', '2', '3', 'owl']
  assert found(root, 'val200') == [(0, 3)]


@pytest.mark.parametrize(
  ('line', 'error', 'said'),
  [
    ('images/a b/9.png 1', FileNotFoundError, r'line 2 of .*own\.txt: there is no file .*9\.png'),
    ('images/a.png', ValueError, r'line 2 of .*own\.txt is no path of an image with a label'),
    ('own.txt 1', ValueError, r'own\.txt is no readable image'),
    ('images/a b/1.png 1000', ValueError, 'have 4 labels up to 1000: numbers of classes count'),
  ],
)
def test_what_is_wrong_is_said(root, line, error, said):
  (root / 'own.txt').write_text(f'images/a b/0.png 0\n{line}\n')
  with pytest.raises(error, match=said):
    data.load(f'lists:{root}', 'test')


def test_missing_folders_and_lists(tmp_path):
  with pytest.raises(FileNotFoundError, match='there is no folder .*none'):
    data.load(f'lists:{tmp_path}/none', 'test')
  with pytest.raises(ValueError, match=r'no \.txt files found in'):
    data.load(f'lists:{tmp_path}', 'test')
  (tmp_path / 'test.txt').write_text('\n')
  with pytest.raises(ValueError, match='the lists in .* are empty'):
    data.load(f'lists:{tmp_path}', 'test')
