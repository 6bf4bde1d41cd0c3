"""The processes of a run: how they connect, check that they agree, and exchange values.

Connecting is done by `jax.distributed`, which detects TPU pods, Slurm, Open MPI and Kubernetes, or takes the
coordinator address, the process count and the process index from flags. Values are exchanged through its
key-value store. The store does not use accelerators, so it keeps working while an accelerator hangs.
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
from etils import epath

from pixart_jax.config import WatchdogConfig
from pixart_jax.errors import (
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    RunStopped,
    UserError,
    report,
    set_message_prefix,
    short,
)
from pixart_jax.files import replace_text
from pixart_jax.flags import whole_number
from pixart_jax.training import sharding

# Environment variables in which launchers pass the number of processes.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "MEGASCALE_NUM_SLICES")
# Environment variables that are set only if there are several processes.
_MARKS = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX")


class Cluster:
    """The processes of a run, from the point of view of one of them.

    Attributes:
      index: index of this process, from 0.
      count: number of processes.
      client: client of JAX's key-value store; None for a single process.
      coordinator: host and port of process 0; "" for a single process.
      progress: called with the step and the phase whenever a phase begins. The watchdog replaces it.
      stop_requested: called after every step with the number of steps since this start; returns whether all
        processes must save a checkpoint now and stop, because one of them was asked to (`preemption.py`).
      reason: returns one line that explains why JAX's runtime is about to end this process, or "" if the
        reason was already reported. The watchdog replaces it by a more specific function.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None, coordinator: str = ""):
        self.index, self.count = index, count
        self.client, self.coordinator = client, coordinator
        self.progress: Callable[[int, str], None] = lambda step, phase: None
        self.stop_requested: Callable[[int], bool] = lambda steps: False
        self.reason: Callable[[], str] = lambda: (
            f"the processes did not find each other at {coordinator or 'the coordinator'}: check the message "
            "above, and that all processes were started"
        )

    @property
    def first(self) -> bool:
        """Whether this is the process that writes metrics and sample images."""
        return self.index == 0

    def say(self, text: str) -> None:
        """Prints a line that concerns the whole run. Only the first process prints it."""
        if self.first:
            print(text, flush=True)

    def write(self, path: epath.Path, text: str) -> None:
        """Writes a text file of the run directory, and a newline. Only the first process writes it."""
        if self.first:
            replace_text(path, text + "\n")

    def gather(self, name: str, value: str, timeout: int = 600) -> list[str]:
        """Gathers a string from every process; every process must call it.

        Args:
          name: identifies this exchange; must not be reused within a run.
          value: string of this process.
          timeout: seconds to wait for each of the other processes.

        Returns:
          The strings of all processes, by process index.

        Raises:
          RunStopped: if a process did not send its string within `timeout` seconds.
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
                f"a process did not send its '{name}' within {timeout} seconds ({first_line(error)})",
                EXIT_UNAVAILABLE,
            ) from error

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Checks that all processes have the same `facts`; every process must call it.

        Raises:
          RunStopped: if they differ. Every process raises it with the same message.
        """
        if jax.process_count() != self.count:
            raise RunStopped(
                f"{self.count} processes were started, but JAX found the devices of {jax.process_count()}: "
                "they would train separately. Check the topology variables of the accelerator.",
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
                "them with the same command, code, packages and data.",
                EXIT_USAGE,
                everywhere=True,
            )

    def close(self) -> None:
        """Disconnects from the other processes, after waiting for all of them to do the same."""
        if self.client is not None:
            jax.distributed.shutdown()
            self.client = None


def connect(
    coordinator: str | None, num_processes: int | None, process_id: int | None, config: WatchdogConfig
) -> Cluster:
    """Connects the processes of the run. Must be called before anything uses a device.

    Args:
      coordinator: HOST:PORT of process 0; None to take it from the environment.
      num_processes, process_id: number of processes and index of this one; None to take them from the
        environment. `num_processes=1` alone forces a single process.
      config: time-outs for connecting and for missing heartbeats.

    Returns:
      The cluster. It has a single process if neither the flags nor the environment indicate several.

    Raises:
      UserError: if the flags contradict each other, or `coordinator` has no host or port.
      RunStopped: if there are several processes and they cannot connect.
    """
    if num_processes == 1 and coordinator is None:
        return Cluster()
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or whole_number(port, 1, 65535) is None:
            raise UserError(
                f"--coordinator is {short(coordinator)}: give HOST:PORT of process 0, such as node0:12345."
            )
    if process_id is not None:
        set_message_prefix(f"[process {process_id}] ")
    cluster = Cluster(process_id or 0, num_processes or 2, coordinator=coordinator or "")
    _say_why_on_abort(cluster)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=config.connect_seconds,
            # Our own watchdog should be the first to notice a dead process, because its message says more.
            # JAX sends two heartbeats in this time, so it may notice a dead process after half of it.
            heartbeat_timeout_seconds=3 * config.dead_seconds,
        )
    except (ValueError, TypeError) as error:
        if (
            "coordinator_address should be defined" not in str(error)
            or num_processes
            or process_id is not None
        ):
            raise UserError(
                f"jax.distributed cannot start: {first_line(error)} Pass --coordinator, --num_processes and "
                "--process_id, or none of them."
            ) from error
        announced = _announced(os.environ)
        if announced:
            # Do not fall back to a single process: N separate runs would write to one run directory.
            raise RunStopped(
                f"{announced}, but JAX found no cluster to join: start every process with the launcher "
                "(srun, a JobSet, …), pass --coordinator, --num_processes and --process_id, or pass "
                "--num_processes=1 for a single process.",
                EXIT_UNAVAILABLE,
            ) from error
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        return Cluster()
    except Exception as error:
        raise RunStopped(f"jax.distributed did not start: {first_line(error)}", EXIT_UNAVAILABLE) from error
    # JAX has no public API for the key-value store yet; Orbax accesses it in the same way.
    runtime = jax._src.distributed.global_state
    cluster.index, cluster.count = runtime.process_id, runtime.num_processes
    cluster.client, cluster.coordinator = runtime.client, runtime.coordinator_address
    if cluster.count > 1:
        set_message_prefix(f"[process {cluster.index} of {cluster.count}] ")
    return cluster


def _announced(environment: Mapping[str, str]) -> str:
    """Describes the environment variable that indicates several processes; "" if there is none."""
    for name in _COUNTS:
        value = environment.get(name, "")
        if value.isdigit() and int(value) > 1:
            return f"{name} is {value}"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES lists several hosts"
    return next((f"{name} is set" for name in _MARKS if environment.get(name)), "")


# Keeps a reference to the signal handler, because ctypes does not.
_on_abort: Any = None


def _say_why_on_abort(cluster: Cluster) -> None:
    """Reports the reason and exits with a status when JAX's runtime aborts this process.

    If the coordinator disappears, or cannot be reached at the start, the runtime calls abort() from one of
    its own threads, which would only leave a core dump. The runtime accepts a Python callback for this case,
    but in jaxlib 0.10 calling it fails. A handler set with Python's `signal` would never run either, because
    abort() does not return to the interpreter. The handler is therefore installed with libc's signal().
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
    """Returns which part of the batch this process reads, and the number of parts.

    Processes whose devices hold the same rows, because they shard a model over `tensor`, read the same part.

    Raises:
      UserError: if the rows of two processes overlap only partially.
    """
    places = sharding.batch_sharding(mesh).devices_indices_map((batch_size,))
    rows: dict[int, set[int]] = {}
    for device, (place,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*place.indices(batch_size)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != batch_size or len({len(part) for part in parts}) > 1:
        raise UserError(
            f"mesh {dict(mesh.shape)} distributes a batch unevenly over {jax.process_count()} processes: "
            "mesh.tensor must divide the number of devices of a process, or be a multiple of it."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its type if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def place(tree: Any, shardings: Any) -> Any:
    """Shards arrays over the devices of all processes. Every process must pass identical arrays."""

    def one(value: np.ndarray, target: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, target, lambda index: value[index])

    return jax.tree.map(one, jax.device_get(tree), shardings)


def host_copy(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Gathers every array, in full, on the first device of this process; every process must call it."""
    gathered = jax.jit(_identity, out_shardings=sharding.replicated(mesh))(tree)
    return jax.tree.map(lambda array: array.addressable_data(0), gathered)


def _identity(tree: Any) -> Any:
    return tree
