"""Folders of images."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from jpeft import data


def image(path, value=0, mode='RGB', size=(5, 3)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


@pytest.fixture
def flat(tmp_path):
  for label, value in (('owl', 10), ('cat', 200)):
    for i in range(20):
      image(tmp_path / label / f'{i}.png', (value, i, 0))
  (tmp_path / 'cat' / 'notes.txt').write_text('no image')
  (tmp_path / 'cat' / '._0.png').write_text('no image')
  return tmp_path


def test_an_undivided_folder_is_split_by_hash(flat):
  train, test = (data.load(f'folder:{flat}', split) for split in ('train', 'test'))
  digest = lambda i, label: int(hashlib.md5(f'{label}/{i}.png'.encode()).hexdigest(), 16)
  names = sorted((digest(i, label), label, i) for label in ('owl', 'cat') for i in range(20))
  expect = [(label, i) for d, label, i in names if d % 10 < 8]
  found = [(train.classes[e['label']], int(e['image'][0, 0, 1])) for e in train]
  assert found == expect and 20 < len(expect) < 39
  assert len(test) == 40 - len(expect)
  assert train.classes == test.classes == ['cat', 'owl']
  assert {e['label'] for e in (train[i] for i in range(8))} == {0, 1}
  assert train[0]['image'].shape == (3, 5, 3) and train[0]['image'].dtype == np.uint8


def test_folders_of_splits(tmp_path):
  for split, sizes in (('train', (3, 2)), ('test', (1, 0)), ('holdout', (0, 2))):
    for label, size in zip('ab', sizes, strict=True):
      for i in range(size):
        image(tmp_path / split / label / 'deep' / f'{i}.jpg')
  assert [len(data.load(f'folder:{tmp_path}', s)) for s in ('train', 'test', 'holdout')] == [
    5,
    1,
    2,
  ]
  assert data.load(f'folder:{tmp_path}', 'holdout').classes == ['a', 'b']
  assert {e['label'] for e in data.load(f'folder:{tmp_path}', 'holdout')} == {1}
  with pytest.raises(ValueError, match="has no split 'tset'; did you mean 'test'"):
    data.load(f'folder:{tmp_path}', 'tset')
  image(tmp_path / 'test' / 'bb' / '0.png')
  with pytest.raises(
    ValueError, match="0.png is of class 'bb', which .*train has not; did you mean 'b'"
  ):
    data.load(f'folder:{tmp_path}', 'train')


def test_a_folder_of_test_images_alone(tmp_path):
  for split, label in (('test', 'a'), ('test', 'b'), ('val', 'b')):
    image(tmp_path / split / label / '0.png')
  assert len(data.load(f'folder:{tmp_path}', 'test')) == 2
  found = data.load(f'folder:{tmp_path}', 'val')
  assert found.classes == ['a', 'b'] and [example['label'] for example in found] == [1]
  with pytest.raises(ValueError, match="has no split 'train'"):
    data.load(f'folder:{tmp_path}', 'train')


@pytest.mark.parametrize('other', ['test/1.png', 'rest/a/0.png'])
def test_folders_called_as_splits_can_be_classes(tmp_path, other):
  image(tmp_path / 'test' / 'deep' / '0.png')
  image(tmp_path / other)
  classes = data.load(f'folder:{tmp_path}', 'train+test').classes
  assert classes == sorted({'test', other.split('/')[0]})


def test_splits_join_to_the_whole(flat):
  both = data.load(f'folder:{flat}', 'train+test')
  assert len({e['image'].tobytes() for e in both}) == len(both) == 40


def test_modes(tmp_path):
  image(tmp_path / 'a' / 'grey.png', 7, 'L')
  image(tmp_path / 'a' / 'half.png', (0, 0, 0, 0), 'RGBA')
  image(tmp_path / 'a' / 'palette.gif', 0, 'P')
  images = [e['image'] for e in data.load(f'folder:{tmp_path}', 'train+test')]
  found = {(*pixels.shape, int(pixels[0, 0, 0])) for pixels in images}
  assert found == {(3, 5, 1, 7), (3, 5, 3, 255), (3, 5, 3, 0)}


@pytest.mark.parametrize('kind', ['text', 'cut', 'empty'])
def test_an_unreadable_image_is_named(flat, kind):
  broken = flat / 'owl' / '3.png'
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
  noise.save(broken)
  whole = broken.read_bytes()
  broken.write_bytes({'text': b'hello', 'cut': whole[: len(whole) // 2], 'empty': b''}[kind])
  with pytest.raises(ValueError, match=r'owl/3\.png is no readable image'):
    list(data.load(f'folder:{flat}', 'train+test'))


def test_deep_pixels_are_refused(tmp_path):
  image(tmp_path / 'a' / 'deep.png', 40_000, 'I;16')
  with pytest.raises(ValueError, match='deep.png has pixels of mode I;16; convert it to 8 bits'):
    list(data.load(f'folder:{tmp_path}', 'train+test'))


@pytest.mark.parametrize(
  ('name', 'content', 'said'),
  [
    ('a.png', b'hello', r'a\.png is no readable image'),
    ('a.jpg', b'', r'a\.jpg is no readable image \(it is empty\)'),
    ('a.HEIC', b'x', r'a\.HEIC is of a format that is not read; convert the \.heic files to \.jpg'),
  ],
)
def test_files_that_are_no_images_are_told_before_any_is_read(flat, name, content, said):
  (flat / 'owl' / name).write_bytes(content)
  with pytest.raises(ValueError, match=said):
    data.load(f'folder:{flat}', 'test[:1]')


def test_what_is_missing_is_said(flat, tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no folder .*/owls; did you mean 'owl'"):
    data.load(f'folder:{flat}/owls', 'train')
  (flat / 'owl' / 'bare').mkdir()
  with pytest.raises(
    ValueError, match='no images found in .*bare: it needs a folder for each class'
  ):
    data.load(f'folder:{flat}/owl/bare', 'train')
  with pytest.raises(ValueError, match='no images found'):  # images, but in no class
    data.load(f'folder:{flat}/owl', 'train')


def test_what_is_left_out_is_noted(flat):
  notes = data.load(f'folder:{flat}', 'train').notes
  (others,) = notes
  assert 'hidden or of no suffix of an image: 1 .png, 1 .txt, such as' in others
  assert 'cat/._0.png' in others
  image(flat / 'lost.png')
  image(flat / 'lost.jpg')
  image(flat / 'owl' / 'deep' / '0.png')
  image(flat / 'owl' / '.thumbs' / '0.png')
  (flat / 'dog').mkdir()
  source = data.load(f'folder:{flat}', 'train+test')
  assert len(source) == 41 and source.classes == ['cat', 'owl']
  beside, empty, deep, others = source.notes
  assert f'images beside the folders of classes in {flat} are left out: 1 .jpg, 1 .png' in beside
  assert empty == f'{flat}/dog has no images and is no class'
  assert deep.endswith(f"1 .png, such as {flat}/owl/deep/0.png, of class 'owl'")
  assert '2 .png, 1 .txt' in others


def test_a_folder_of_unlabelled_images_is_no_split(tmp_path):
  image(tmp_path / 'train' / 'a' / '0.png')
  image(tmp_path / 'test' / '0.png')
  assert data.load(f'folder:{tmp_path}', 'train').notes == ()
  with pytest.raises(ValueError, match="no split 'test': .*/test has no images in folders of clas"):
    data.load(f'folder:{tmp_path}', 'test')


def test_images_without_labels(flat):
  image(flat / 'beside.png', (7, 0, 0))
  splits = [data.load(f'folder:{flat}', split, labels='nothing') for split in ('train', 'test')]
  assert sum(map(len, splits)) == 41 and splits[0].classes == []
  assert all(set(example) == {'image'} for split in splits for example in split)
  reds = sorted(int(example['image'][0, 0, 0]) for split in splits for example in split)
  assert reds == [7] + [10] * 20 + [200] * 20
  assert any('are left out' in note for note in splits[0].notes)


def test_splits_without_labels(tmp_path):
  image(tmp_path / 'train' / '0.png')
  image(tmp_path / 'train' / 'a' / 'b' / '1.png')
  image(tmp_path / 'test' / '2.png')
  (tmp_path / 'notes').mkdir()
  sizes = [len(data.load(f'folder:{tmp_path}', s, labels='nothing')) for s in ('train', 'test')]
  assert sizes == [2, 1]
  with pytest.raises(ValueError, match='notes has no images'):
    data.load(f'folder:{tmp_path}', 'notes', labels='nothing')
  with pytest.raises(ValueError, match='no images found in'):
    data.load(f'folder:{tmp_path / "notes"}', 'train', labels='nothing')
  with pytest.raises(FileNotFoundError, match="there is no folder .*; did you mean 'notes'"):
    data.load(f'folder:{tmp_path / "note"}', 'train', labels='nothing')
