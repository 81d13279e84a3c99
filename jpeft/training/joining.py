"""How the processes of a run find each other, before any device is touched."""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn

import jax

from jpeft import cli

from . import hosts

AUTO = 'auto'
NONE = 'none'

# How errors of collectives begin, which are of several classes: the name of a status.
_LOST = re.compile(r'(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ')


class Joining(NamedTuple):
  """How this process finds the others.

  Attributes:
    hosts: 'auto' as JAX detects it, 'none' for one process alone, or ADDRESS:PORT of process 0;
      None where the environment decides.
    processes: their number, beside an address.
    process: the number of this one, from 0.
    connect: seconds that it waits for the others at the start.
    lost: seconds after which a process that does not answer counts as dead.
  """

  hosts: str | None = None
  processes: int | None = None
  process: int | None = None
  connect: int = 300
  lost: int = 100


def join(wanted: Joining) -> None:
  """Starts JAX's distributed runtime where the run has several processes; else does nothing.

  A process that cannot reach the others in time ends with one sentence and exit code 2.

  Raises:
    ValueError: an address or number that cannot be meant.
    RuntimeError: JAX finds no cluster, or its devices have been touched.
  """
  if jax.distributed.is_initialized():
    return
  wanted = _with_environment(wanted, os.environ)
  if wanted.hosts in (None, NONE):
    return
  _check(wanted)
  if wanted.hosts == AUTO:
    address, processes, process = None, None, None
  else:
    address, processes, process = wanted.hosts, wanted.processes, wanted.process
  # JAX would take SIGTERM for itself: `Signals` does what it should.
  jax.config.update('jax_enable_preemption_service', False)
  with _Patience(wanted):
    try:
      jax.distributed.initialize(
        address,
        processes,
        process,
        # Longer than ours: at its end JAX aborts the process with a trace of C++.
        initialization_timeout=wanted.connect + 60,
        heartbeat_timeout_seconds=wanted.lost,
        shutdown_timeout_seconds=wanted.lost,
      )
    except ValueError as error:
      raise ValueError(
        f'--hosts={wanted.hosts}: JAX finds no cluster here ({error}); give '
        '--hosts=ADDRESS:PORT --processes=N --process=I'
      ) from error


def _with_environment(wanted: Joining, environment: Mapping[str, str]) -> Joining:
  """The same, with what the environment says where no flag does."""
  if wanted.hosts is not None:
    return wanted
  if 'JAX_COORDINATOR_ADDRESS' in environment:
    numbers = {}
    for name, variable in (('processes', 'JAX_NUM_PROCESSES'), ('process', 'JAX_PROCESS_ID')):
      text = environment.get(variable)
      if text is not None and not text.isdigit():
        raise ValueError(f'{variable}={text} is not a number')
      if text is not None and getattr(wanted, name) is None:
        numbers[name] = int(text)
    if numbers or _cluster_size(environment) == 1:
      return wanted._replace(hosts=environment['JAX_COORDINATOR_ADDRESS'], **numbers)
  if _cluster_size(environment) > 1:
    # JAX takes the address, where there is one, and has the rest from the launcher.
    return wanted._replace(hosts=AUTO)
  if wanted.processes is not None or wanted.process is not None:
    raise ValueError('--processes and --process need --hosts=ADDRESS:PORT, that of process 0')
  return wanted


def _cluster_size(environment: Mapping[str, str]) -> int:
  """How many processes a launcher says that it has started: SLURM, Open MPI, TPUs of GKE."""
  sizes = [1]
  if 'SLURM_STEP_NODELIST' in environment:  # started by srun
    sizes.append(int(environment.get('SLURM_NTASKS', 1)))
  sizes.append(int(environment.get('OMPI_COMM_WORLD_SIZE', 1)))
  workers = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
  sizes.append(len(workers) * int(environment.get('MEGASCALE_NUM_SLICES', 1)))
  return max(sizes)


def _check(wanted: Joining) -> None:
  """Raises a ValueError for flags that say too little, or what cannot be."""
  if wanted.connect < 1 or wanted.lost < 1:
    raise ValueError('--connect-timeout and --lost-after are seconds, at least 1')
  if wanted.hosts == AUTO:
    if wanted.processes is not None or wanted.process is not None:
      raise ValueError('--hosts=auto finds --processes and --process by itself: leave them out')
    return
  address, _, port = wanted.hosts.rpartition(':')
  if not address or not port.isdigit():
    raise ValueError(f'--hosts={wanted.hosts} is not auto, none or ADDRESS:PORT of process 0')
  if wanted.processes is None or wanted.process is None:
    raise ValueError(
      f'--hosts={wanted.hosts} needs --processes=N, how many there are, and --process=I, which of '
      'them this is, from 0'
    )
  if not 0 <= wanted.process < wanted.processes:
    raise ValueError(
      f'--process={wanted.process} is not from 0 to {wanted.processes - 1}, of '
      f'--processes={wanted.processes}'
    )
  if wanted.process == 0:
    _check_free(int(port))


def _check_free(port: int) -> None:
  """Raises a ValueError if process 0 could not listen there: JAX would wait for itself."""
  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise ValueError(f'process 0 cannot listen at port {port}: {error.strerror}') from None


class _Patience:
  """Ends this process with a sentence, if what is inside takes too long.

  JAX waits in C++ and then aborts, so that no exception could end the waiting.
  """

  def __init__(self, wanted: Joining):
    self._wanted = wanted
    self._timer = threading.Timer(wanted.connect, self._end)
    self._timer.daemon = True

  def __enter__(self):
    self._timer.start()

  def __exit__(self, *exception):
    self._timer.cancel()

  def _end(self):
    wanted = self._wanted
    if wanted.process == 0:
      missing = f'not all of the other {wanted.processes - 1} processes have come'
    elif wanted.hosts == AUTO:
      missing = 'the processes that JAX has detected have not all come'
    else:
      missing = 'process 0 does not answer there, or others have not come'
    _end(
      f'--hosts={wanted.hosts}: {missing} in {wanted.connect} s (--connect-timeout); does the '
      'command run on every host, and is the address right?',
      cli.Mistake.code,
    )


def _end(sentence: str, code: int) -> NoReturn:
  """Ends this process at once: what JAX does at the end would wait for others."""
  print(f'jpeft.train: error: {sentence}', file=sys.stderr, flush=True)
  os._exit(code)


@contextlib.contextmanager
def last_words() -> Iterator[None]:
  """Ends one of several processes at once where the others do not know that it ends.

  Else it would wait for them, and they for it. What all of them know is raised as it is.
  """
  try:
    yield
  except cli.Stopped as stopped:
    if hosts.several() and isinstance(stopped.__cause__, KeyboardInterrupt):
      _end(str(stopped), stopped.code)  # the others do not know
    if hosts.first():
      raise
    sys.exit(stopped.code)  # told by process 0
  except (hosts.Everywhere, cli.Diverged):
    raise
  except Exception as error:
    if not hosts.several():
      raise
    if isinstance(error, cli.Mistake):
      _end(f'process {jax.process_index()}: {error}', error.code)
    if _LOST.match(str(error)):
      _end(
        f'another process is lost ({" ".join(str(error).split())[:200]}): end all, and start the '
        'same command on all hosts again; it goes on from the last checkpoint',
        1,
      )
    traceback.print_exc()
    _end(f'process {jax.process_index()} has failed, and the others end without it', 1)
