"""JAX for the tests: CPU unless the environment says otherwise, 8 devices, quick compilation,
compilations kept.
"""

import gc
import os
import pathlib
import re

import jax
import pytest

from tests import more

if 'JAX_PLATFORMS' not in os.environ:
  jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

# Tracing and compiling are most of the time of these tests; half of compiling is optimisation that
# tiny arrays do not need. An XLA that does not know a flag ends the process, so they are given to
# versions that are known to have them.
QUICK = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
  '--xla_cpu_parallel_codegen_split_count=1'
)
LONG = (
  'test_notebook.py',
  'test_resume.py',
  'test_train.py',
  'test_storage.py',
  'test_qst.py',
  'test_meft.py',
)
MORE = more.listed()
gc.set_threshold(100_000, 50, 100)  # programs are many small objects, all alive


def pytest_configure(config: pytest.Config) -> None:
  # Who names files or folders wants all of them.
  if (
    config.args_source is pytest.Config.ArgsSource.TESTPATHS
    and 'more' not in config.option.markexpr
  ):
    config.option.markexpr = f'({config.option.markexpr}) and not more'
  # Compilers of accelerators would read the flags as well.
  known = (0, 10) <= jax.__version_info__ < (0, 11)
  if known and jax.config.jax_platforms == 'cpu' and 'not aot' in config.option.markexpr:
    os.environ.setdefault('XLA_FLAGS', QUICK)
  # Imported here and not above: fixtures of runs import JAX programs, which the flags must precede.
  config.pluginmanager.import_plugin('tests.runs')
  if config.option.measure is not None:
    config.pluginmanager.register(more.Measure(config.option.measure))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
  # Two runs may share the folder: an entry read while another run writes it is only compiled again.
  config.addinivalue_line('filterwarnings', 'ignore:Error (reading|writing) persistent compilation')
  cache = getattr(config, 'cache', None)
  if cache is None:  # -p no:cacheprovider
    return
  jax.config.update('jax_compilation_cache_dir', str(cache.mkdir('jax')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  # The processes that tests start keep theirs too; apart for each worker, as an entry that another
  # one is just writing gives a warning, which is an error to some of them.
  worker = os.environ.get('PYTEST_XDIST_WORKER', 'alone')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache.mkdir(f'jax_started_by_{worker}'))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
  """With `-n`: the tests of a backbone, else those of a module, in one process, so that each thing
  is compiled once.
  """
  from xdist.scheduler import LoadScopeScheduling

  class Scheduler(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
      backbone = re.search(
        r'\[.*?((linen|nnx)_[a-z0-9]+)', nodeid
      )  # linen_vit and linen_vit_scan together
      return backbone[1] if backbone else nodeid.split('::')[0]

  config.option.loadscopereorder = False  # by the number of tests, which says little of their time
  return Scheduler(config, log) if config.option.dist == 'load' else None


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    '--begin',
    type=int,
    default=0,
    metavar='N',
    help='begin with the test of this number, and end with those before it: what is stopped for '
    'want of time then runs another part each time',
  )
  parser.addoption(
    '--measure',
    type=pathlib.Path,
    metavar='FILE',
    help='add the CPU seconds of each test to a file, of which tests/more.py makes more.txt',
  )


def pytest_itemcollected(item: pytest.Item) -> None:
  if item.nodeid in MORE:
    item.add_marker(pytest.mark.more)


@pytest.hookimpl(trylast=True)  # of the tests that the markers select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  # What takes a minute comes first: at the end one process would wait for the other.
  items.sort(key=lambda item: item.path.name not in LONG)
  first = config.option.begin % max(len(items), 1)
  items[:] = items[first:] + items[:first]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
  # Compiled programs take gigabytes in all, and memory maps of which a process may have so many.
  # The contract, whose tests go from pair to pair rather than from module to module, sees to that
  # by itself.
  if nextitem is not None and nextitem.path != item.path and 'contract' not in item.path.parts:
    jax.clear_caches()
