"""Folders of VTAB-1k and of FGVC as users have them."""

import json
import os

import pytest
from PIL import Image

from jpeft import config as config_lib
from jpeft import data, training
from jpeft.bench import vtab
from jpeft.data.readers.vtab import TASKS

CLASSES = {
  **{'cifar': 100, 'caltech101': 102, 'dtd': 47, 'oxford_flowers102': 102},
  **{'oxford_iiit_pet': 37, 'svhn': 10, 'sun397': 397},
  **{'patch_camelyon': 2, 'eurosat': 10, 'resisc45': 45, 'diabetic_retinopathy': 5},
  **{'clevr_count': 8, 'clevr_dist': 6, 'dmlab': 6, 'kitti': 4},
  **{'dsprites_loc': 16, 'dsprites_ori': 16, 'smallnorb_azi': 18, 'smallnorb_ele': 9},
}


def test_groups_classes_and_test_sizes_are_those_of_the_benchmark():
  assert {name: task.classes for name, task in TASKS.items()} == CLASSES
  groups = [task.group for task in TASKS.values()]
  sizes = [groups.count(group) for group in ('natural', 'specialised', 'structured')]
  assert sizes == [7, 4, 8] and groups == sorted(groups)
  # Fifths of 27,000 and 31,500 images, a tenth of 737,280, half of 24,300.
  split = {'eurosat': 27_000 // 5, 'resisc45': 31_500 // 5, 'smallnorb_azi': 24_300 // 2}
  split |= {'dsprites_loc': 737_280 // 10, 'dsprites_ori': 737_280 // 10}
  assert {name: TASKS[name].test for name in split} == split


@pytest.fixture(scope='module')
def kitti(tmp_path_factory):
  """A folder of the layout of VTAB-1k; images of one class are links to one file."""
  root = tmp_path_factory.mktemp('vtab-1k') / 'kitti'
  (root / 'images' / 'train').mkdir(parents=True)
  (root / 'images' / 'test').mkdir()
  for label in range(4):
    Image.new('RGB', (5, 4), (label, 0, 0)).save(root / f'{label}.png')
  lines = {}
  for part, count in {'train': 1000, 'test': 711}.items():
    names = [f'images/{part}/{i:06}.png' for i in range(count)]
    for i, name in enumerate(names):
      os.link(root / f'{i % 4}.png', root / name)
    lines[part] = [f'{name} {i % 4}\n' for i, name in enumerate(names)]
  lists = {
    'train800': lines['train'][:800],
    'val200': lines['train'][800:],
    'train800val200': lines['train'],
    'test': lines['test'],
  }
  for name, text in lists.items():
    (root / f'{name}.txt').write_text(''.join(text))
  return root


def test_a_task_is_read_as_it_is(kitti):
  sources = {split: data.load(f'vtab:{kitti}', split) for split in ('train800', 'val200', 'test')}
  assert [len(source) for source in sources.values()] == [800, 200, 711]
  both = data.load(f'vtab:{kitti}', 'train800val200')
  assert len(both) == 1000 and both.classes == ['0', '1', '2', '3'] and not both.notes
  for source in (both, sources['test']):
    for i in (0, 1, 2, 3, len(source) - 1):
      assert source[i]['label'] == source[i]['image'][0, 0, 0] == i % 4
  # A second pass gives the same.
  assert (both[7]['image'] == both[7]['image']).all()
  assert data.labels_of(both) == [i % 4 for i in range(1000)]


@pytest.fixture
def changed(kitti, tmp_path):
  """The task again, whose lists may be changed."""
  root = tmp_path / 'kitti'
  root.mkdir()
  os.symlink(kitti / 'images', root / 'images')
  for file in kitti.glob('*.txt'):
    (root / file.name).write_text(file.read_text())
  return root


@pytest.mark.parametrize(
  ('name', 'old', 'new', 'said'),
  [
    ('train800', 'images/train/000003.png 3\n', '', r'train800\.txt has 799 images, and .* 800 in'),
    ('val200', 'train/000801.png 1', 'train/000001.png 1', '000001.png is in train800.txt and in'),
    (
      'val200',
      'train/000801.png 1',
      'train/000801.png 2',
      'is not train800.txt and val200',
    ),
    (
      'test',
      '000002.png 2',
      '000002.png 4',
      r"line 3 of test\.txt has the label '4', and kitti",
    ),
    ('test', '000002.png 2', '000002.png car', "label 'car', and kitti has the classes 0 to 3"),
  ],
)
def test_lists_that_are_not_those_of_the_task(changed, name, old, new, said):
  file = changed / f'{name}.txt'
  text = file.read_text()
  assert text.count(old) == 1
  file.write_text(text.replace(old, new))
  with pytest.raises(ValueError, match=said):
    data.load(f'vtab:{changed}', 'test')


def test_the_config_trains_on_a_task_and_its_row_is_printed(kitti, backbone, tmp_path, capsys):
  settings = {
    'model.source': str(backbone),
    'model.image_size': '8',
    'data.name': f'vtab:{kitti}',
    'data.eval_batch_size': '711',
    'epochs': 'none',
    'steps': '2',
    'eval.every': '2',
  }
  report = training.train(config_lib.load('vtab:linear', settings), tmp_path / 'run')
  capsys.readouterr()
  assert vtab.main([str(tmp_path / 'run')]) == 0
  row = capsys.readouterr().out
  assert row.startswith('linear, tested once, at the end\n')
  assert f'| kitti | {100 * report["eval"]["accuracy"]:.1f} %' in row


def test_fewer_test_images_are_told(changed):
  lines = (changed / 'test.txt').read_text().splitlines()
  (changed / 'test.txt').write_text('\n'.join(lines[:11]))
  (note,) = data.load(f'vtab:{changed}', 'test').notes
  assert note.endswith('has 11 images, and published rows are of 711')


def test_missing_lists_and_other_folders(changed):
  with pytest.raises(ValueError, match=r"none is called 'kiti'; did you mean 'kitti'\?.*lists:"):
    data.load('vtab:vtab-1k/kiti', 'test')
  with pytest.raises(FileNotFoundError, match='there is no folder .*dtd'):
    data.load(f'vtab:{changed.parent}/dtd', 'test')
  (changed / 'val200.txt').unlink()
  with pytest.raises(
    FileNotFoundError, match=r'no list .*val200\.txt; a task of VTAB-1k has train800'
  ):
    data.load(f'vtab:{changed}', 'test')


@pytest.fixture(params=['images', 'Images', ''])
def birds(request, tmp_path):
  """A folder of FGVC: images below one of the folders that such sets have."""
  root = tmp_path / 'CUB_200_2011'
  images = root / request.param / '001.Albatross'
  images.mkdir(parents=True)
  for i in range(5):
    Image.new('RGB', (4, 3), (i, 0, 0)).save(images / f'{i}.png')
  splits = {'train': {0: 10, 1: 2}, 'val': {2: 10}, 'test': {4: 2, 3: 9}}
  for split, found in splits.items():
    table = {f'001.Albatross/{i}.png': label for i, label in found.items()}
    (root / f'{split}.json').write_text(json.dumps(table))
  return root


def test_fgvc_is_read_as_it_is(birds):
  def found(split):
    return [(int(e['image'][0, 0, 0]), e['label']) for e in data.load(f'fgvc:{birds}', split)]

  # Classes in the order of their numbers: 2, 9, 10.
  assert found('train+val') == [(0, 2), (1, 0), (2, 2)]
  assert found('test') == [(4, 0), (3, 1)]
  source = data.load(f'fgvc:{birds}', 'test')
  assert source.classes == ['2', '9', '10']
  assert source.notes[0].endswith('has 3 classes, and published rows of CUB-200-2011 are of 200')


@pytest.mark.parametrize(
  ('text', 'error', 'said'),
  [
    ('{"001.Albatross/7.png": 1}', FileNotFoundError, 'entry 1 of .*val.json: there is no file'),
    ('{"001.Albatross/0.png": 1, "001.Albatross/7.png": 1}', FileNotFoundError, 'entry 2 of'),
    ('["001.Albatross/0.png"]', ValueError, 'val.json'),
    ('{"001.Albatross/0.png": 1.5}', ValueError, 'val.json'),
    ('{}', ValueError, r'val\.json has no image in it'),
  ],
)
@pytest.mark.parametrize('birds', ['images'], indirect=True)
def test_what_is_wrong_in_fgvc_is_said(birds, text, error, said):
  (birds / 'val.json').write_text(text)
  with pytest.raises(error, match=said):
    data.load(f'fgvc:{birds}', 'test')


def test_a_folder_without_json_files(tmp_path):
  with pytest.raises(ValueError, match=r'no \.json files found in'):
    data.load(f'fgvc:{tmp_path}', 'test')
