"""The processes of a run: how they find each other, agree at the start, and share what one of them knows.

JAX's own runtime does the work (`jax.distributed`): it knows TPU pods, Slurm, Open MPI and Kubernetes, or
takes the address, the number and the index from flags. Everything here speaks over its key-value store, which
needs no accelerator and so also works while one hangs.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import EXIT_UNAVAILABLE, EXIT_USAGE, RunStopped, UserError, report, speak_as
from pixart_jax.training import sharding

# Variables of launchers that hold the number of processes.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "MEGASCALE_NUM_SLICES")
# Variables that a single process has no reason to have.
_MARKS = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX")


class Cluster:
    """The processes of a run, seen from one of them.

    Attributes:
      index, count: of this process, and of all.
      client: of JAX's key-value store; None for a single process.
      coordinator: host and port of process 0; "" for a single process.
      progress: told the step and the phase whenever a phase begins; the watchdog listens.
      stop_requested: called after every step with the number of steps since this start; says whether all
        processes are to save now and stop, because one was told to (`preemption.py`).
      reason: says in one line why JAX's runtime is about to end this process; the watchdog knows better, and
        returns "" when it has said so already.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, coordinator: str = ""):
        self.index, self.count = index, count
        self.client, self.coordinator = client, coordinator
        self.progress: Callable[[int, str], None] = lambda step, phase: None
        self.stop_requested: Callable[[int], bool] = lambda steps: False
        self.reason: Callable[[], str] = lambda: (
            f"the processes did not find each other at {coordinator or 'the coordinator'}: see the message "
            "above, and whether all of them were started"
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes metrics and pictures."""
        return self.index == 0

    def say(self, text: str) -> None:
        """Prints what concerns the whole run, once."""
        if self.first:
            print(text, flush=True)

    def gather(self, name: str, value: str, timeout: int = 600) -> list[str]:
        """The `value` of every process, in their order. Waits for all; `name` is used once.

        Raises:
          RunStopped: a process did not come within `timeout` seconds.
        """
        if self.count == 1:
            return [value]
        self.client.key_value_set(f"gather/{name}/{self.index}", value)
        try:
            return [
                self.client.blocking_key_value_get(f"gather/{name}/{index}", 1000 * timeout)
                for index in range(self.count)
            ]
        except Exception as error:
            raise RunStopped(
                f"a process did not answer to '{name}' in {timeout} seconds ({first_line(error)})",
                EXIT_UNAVAILABLE,
            ) from error

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Raises on every process, with the same line, unless all of them have the same `facts`."""
        if jax.process_count() != self.count:
            raise RunStopped(
                f"{self.count} processes were started, their devices belong to {jax.process_count()}: they "
                "would train apart. Check the accelerator's topology variables.",
                EXIT_UNAVAILABLE,
                everywhere=True,
            )
        found = [json.loads(text) for text in self.gather("agreement", json.dumps(dict(facts)))]
        differences = [
            f"{name} is {other.get(name)} on process {index} and {found[0].get(name)} on process 0"
            for index, other in enumerate(found)
            for name in sorted(found[0].keys() | other.keys())
            if other.get(name) != found[0].get(name)
        ]
        if differences:
            more = f", and {len(differences) - 4} more differences" if len(differences) > 4 else ""
            raise RunStopped(
                f"the processes of the run do not agree: {'; '.join(differences[:4])}{more}. Start all of "
                "them with one command, one code and the same data.",
                EXIT_USAGE,
                everywhere=True,
            )

    def close(self) -> None:
        """Leaves together with all others; returns when all came here."""
        if self.client is not None:
            jax.distributed.shutdown()
            self.client = None


def connect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, config: WatchdogConfig
) -> Cluster:
    """Joins the processes of the run. Call it before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0; None for what the environment says.
      num_processes, process_id: likewise. `num_processes=1` alone asks for a single process.
      config: how long to wait, and when JAX gives up on a silent process.

    Returns:
      the cluster; a single process where neither flags nor environment speak of more.

    Raises:
      UserError: flags that do not fit each other.
      RunStopped: the environment speaks of several processes, and they do not come together.
    """
    if num_processes == 1 and coordinator is None:
        return Cluster()
    if process_id is not None:
        speak_as(f"[process {process_id}] ")
    cluster = Cluster(process_id or 0, num_processes or 2, coordinator=coordinator or "")
    _say_why_on_abort(cluster)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=config.connect_seconds,
            # Later than our own watchdog, which knows more.
            heartbeat_timeout_seconds=config.dead_seconds * 3 // 2,
        )
    except (ValueError, TypeError) as error:
        if (
            "coordinator_address should be defined" not in str(error)
            or num_processes
            or process_id is not None
        ):
            raise UserError(
                f"jax.distributed cannot start: {first_line(error)} Give --coordinator, --num_processes and "
                "--process_id, or none of them."
            ) from error
        announced = _announced(os.environ)
        if announced:
            # N copies of the same run over one folder would be worse than no run.
            raise RunStopped(
                f"{announced}, but JAX found no cluster to join: start every process through the launcher "
                "(srun, a JobSet, …), give --coordinator, --num_processes and --process_id, or "
                "--num_processes=1 for a single process.",
                EXIT_UNAVAILABLE,
            ) from error
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        return Cluster()
    except Exception as error:
        raise RunStopped(f"jax.distributed did not start: {first_line(error)}", EXIT_UNAVAILABLE) from error
    # The key-value store has no public name yet; Orbax takes it from the same place.
    runtime = jax._src.distributed.global_state
    cluster.index, cluster.count = runtime.process_id, runtime.num_processes
    cluster.client, cluster.coordinator = runtime.client, runtime.coordinator_address
    if cluster.count > 1:
        speak_as(f"[process {cluster.index} of {cluster.count}] ")
    return cluster


def _announced(environment: Mapping[str, str]) -> str:
    """What in the environment says that this process is one of several; "" for nothing."""
    for name in _COUNTS:
        value = environment.get(name, "")
        if value.isdigit() and int(value) > 1:
            return f"{name} is {value}"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES lists several hosts"
    return next((f"{name} is set" for name in _MARKS if environment.get(name)), "")


# ctypes does not keep the callback alive.
_on_abort: Any = None


def _say_why_on_abort(cluster: Cluster) -> None:
    """Makes JAX's runtime end this process with one line and a status, instead of a core dump alone.

    When the coordinator is gone, or does not come at the start, the runtime calls abort() from a thread of
    its own. It takes a Python callback for that, but in jaxlib 0.10 calling it fails. A handler of Python's
    `signal` would never run: abort() does not return to the interpreter.
    """
    global _on_abort

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        if line := cluster.reason():
            report(f"stopped: {line}")
        sys.stdout.flush()
        os._exit(EXIT_UNAVAILABLE)

    _on_abort = handler
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)


def batch_part(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of a batch this process reads, and of how many.

    Processes whose devices hold the same rows (they share a model over `tensor`) read the same part.

    Raises:
      UserError: the devices of processes hold rows that overlap in part.
    """
    places = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
    rows: dict[int, set[int]] = {}
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*place.indices(batch_size)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != batch_size or len({len(part) for part in parts}) > 1:
        raise UserError(
            f"mesh {dict(mesh.shape)} spreads a batch unevenly over {jax.process_count()} processes: let "
            "mesh.tensor divide the devices of one process, or be a multiple of them."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def place(tree: Any, shardings: Any) -> Any:
    """Lays arrays that every process holds alike over the devices of all; each process gives its own part."""

    def one(value: np.ndarray, target: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, target, lambda index: value[index])

    return jax.tree.map(one, jax.device_get(tree), shardings)


def host_copy(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The whole of every array on the first device of this process; all processes call it together."""
    whole = jax.jit(_identity, out_shardings=sharding.replicated(mesh))(tree)
    return jax.tree.map(lambda array: array.addressable_data(0), whole)


def _identity(tree: Any) -> Any:
    return tree
