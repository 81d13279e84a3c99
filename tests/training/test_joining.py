"""How a process learns that it is one of several, from flags and from launchers."""

import jax
import pytest

from jpeft import train, training
from jpeft.training.joining import Joining, join

SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}
GKE = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '0'}
OWN = {
  'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}


@pytest.fixture
def joined(monkeypatch):
  """joined(environment, **fields of Joining) -> the arguments that JAX gets, or None."""

  def call(environment, **fields):
    seen = []

    def initialize(*args, **kwargs):
      seen.append((args, kwargs))

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for name in {**SLURM, **GKE, **OWN, 'OMPI_COMM_WORLD_SIZE': ''}:
      monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    join(Joining(**fields))
    if not seen:
      return None
    ((args, kwargs),) = seen
    assert kwargs['heartbeat_timeout_seconds'] == 100
    assert kwargs['initialization_timeout'] > 300
    return args

  return call


@pytest.mark.parametrize('environment', (SLURM, GKE, {'OMPI_COMM_WORLD_SIZE': '2'}))
def test_a_launcher_of_several_is_found(joined, environment):
  assert joined(environment) == (None, None, None)  # JAX detects all
  assert joined(environment, hosts='none') is None


@pytest.mark.parametrize(
  'environment',
  (
    {},
    SLURM | {'SLURM_NTASKS': '1'},
    {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'},  # a batch script, not started by srun
    {'TPU_WORKER_HOSTNAMES': 'a', 'TPU_WORKER_ID': '0'},
    {'OMPI_COMM_WORLD_SIZE': '1'},
  ),
)
def test_one_process_stays_alone(joined, environment):
  assert joined(environment) is None
  assert joined(environment, hosts='auto') == (None, None, None)


def test_flags_come_before_the_environment(joined):
  assert joined(OWN) == ('10.0.0.1:1234', 4, 3)
  assert joined(OWN, process=1) == ('10.0.0.1:1234', 4, 1)
  assert joined(OWN, hosts='b:1', processes=2, process=1) == ('b:1', 2, 1)
  # The address from the user, the numbers from the launcher.
  assert joined(SLURM | {'JAX_COORDINATOR_ADDRESS': 'node1:99'}) == (None, None, None)


@pytest.mark.parametrize(
  ('fields', 'message'),
  (
    ({'hosts': 'a'}, '--hosts=a is not auto, none or ADDRESS:PORT'),
    ({'hosts': 'a:b'}, '--hosts=a:b is not auto'),
    ({'hosts': 'a:1'}, '--hosts=a:1 needs --processes=N'),
    ({'hosts': 'a:1', 'processes': 2, 'process': 2}, '--process=2 is not from 0 to 1'),
    ({'hosts': 'auto', 'process': 0}, 'leave them out'),
    ({'processes': 2}, '--processes and --process need --hosts'),
    ({'hosts': 'auto', 'lost': 0}, 'at least 1'),
  ),
)
def test_flags_that_cannot_be_meant(joined, fields, message):
  with pytest.raises(ValueError, match=message):
    joined({}, **fields)


def test_a_port_in_use_is_told(joined):
  import socket

  with socket.socket() as other:
    other.bind(('', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f'cannot listen at port {port}'):
      joined({}, hosts=f'localhost:{port}', processes=2, process=0)


def test_devices_of_processes_that_have_not_joined_are_refused(load, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(train.cli.Mistake, match='belong to 4 processes, .* give --hosts=auto'):
    training.train(load('linear'), tmp_path / 'run')
