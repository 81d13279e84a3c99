"""A run reads sources of other formats as it reads folders, and tells what was left out."""

import tarfile

from jpeft import training


def test_a_run_on_tars_tells_what_was_left_out(load, images, tmp_path, capsys):
  for split in ('train', 'test'):
    with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
      for file in sorted((images / split).rglob('*.png')):
        key = f'{file.parent.name}-{file.stem}'
        label = tmp_path / f'{key}.cls'
        label.write_text(file.parent.name)
        tar.add(file, f'{key}.png')
        if key != 'red-3':
          tar.add(label, f'{key}.cls')
  name = f'wds:{tmp_path}?unlabelled=skip'
  report = training.train(load(steps=2, **{'data.name': name}), tmp_path / 'run')
  assert 0 <= report['eval']['accuracy'] <= 1
  said = capsys.readouterr()
  assert "1 rows without a label are left out, the first is sample 'red-3'" in said.out + said.err
