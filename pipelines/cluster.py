"""The Ray cluster that a command runs on: the one it is given, or one inside this process's machine."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import ray

from mdm_core.errors import ConfigError

ResultT = TypeVar("ResultT")

# A Ray Data pipeline holds one CPU for its actors and one for a task, so a machine with one core takes turns.
_MIN_LOCAL_CPUS = 2

_connected = False


def connect(min_cpus: int = 1, min_gpus: int = 0) -> None:
    """Joins the cluster at `RAY_ADDRESS`, or starts Ray on this machine; does nothing if already connected.

    Args:
        min_cpus: CPUs that the work needs at the same time. Ray waits for ever, and says nothing, where a
            pipeline needs more than the cluster has, so it is asked before anything starts.
        min_gpus: GPUs, likewise.

    Raises:
        ConfigError: The cluster can't be reached, or has fewer CPUs or GPUs.
    """
    # Read by Ray when it starts, and by the processes that it starts: a default here never overrides the operator's.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    global _connected
    if not ray.is_initialized():
        _start()
        _connected = True
    resources = ray.cluster_resources()
    for kind, wanted in (("CPU", min_cpus), ("GPU", min_gpus)):
        has = int(resources.get(kind, 0))
        if has < wanted:
            disconnect()
            raise ConfigError(
                f"this work needs {wanted} {kind}s at once, but the Ray cluster has {has}; "
                "ask for fewer workers, or set RAY_ADDRESS to a larger cluster"
            )


def check_room(cpus: int, gpus: int, *, what: str, count: int = 1) -> None:
    """Raises ConfigError if the machines of the cluster have no room for something: Ray would wait for ever.

    Args:
        cpus: Wanted together on one machine.
        gpus: With them.
        what: Keys of the configuration that ask for them.
        count: How many times.
    """
    needs = {kind: wanted for kind, wanted in (("CPU", cpus), ("GPU", gpus)) if wanted}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(has.get(kind, 0) // wanted for kind, wanted in needs.items())) for has in machines if needs)
    if needs and room < count:
        raise ConfigError(
            f"{what} ask {count} times for {cpus} CPUs and {gpus} GPUs together on one machine, and the machines of "
            f"the Ray cluster have room for {room}; ask for fewer, or set RAY_ADDRESS to another cluster"
        )


def disconnect() -> None:
    """Leaves the cluster that `connect` joined, or ends it if it was started; one joined before stays."""
    global _connected
    if _connected:
        ray.shutdown()
    _connected = False


@contextlib.contextmanager
def data_context() -> Iterator[None]:
    """Ray Data as every pipeline here uses it: blocks in order, and progress told once, by the pipeline."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    levels = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def call_interruptibly(work: Callable[[], ResultT]) -> ResultT:
    """Returns what `work` returns; it is called on another thread, so that Ctrl-C raises KeyboardInterrupt here.

    Called on the main thread, Ray Train takes SIGINT for itself, and ends the process without a word.
    """
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon, because after Ctrl-C nobody waits for it: the cluster's end, or this process's, ends the work.
    threading.Thread(target=run, name=getattr(work, "__qualname__", "work"), daemon=True).start()
    while not future.done():
        # Not in one go: a signal that another thread received is looked at between two waits.
        wait([future], timeout=0.5)
    return future.result()


def _start() -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        # Ray's C++ side writes notes about its own actors to this process's stderr, and calls them errors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Without "local", Ray would silently join any other cluster that runs on this host.
        ray.init(
            address="local",
            num_cpus=max(_MIN_LOCAL_CPUS, len(os.sched_getaffinity(0))),
            include_dashboard=False,
            logging_level=logging.WARNING,
            # What workers print stays in Ray's log files; their errors come back as exceptions.
            log_to_driver=False,
        )
        return
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); "
            "correct the address, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _knock(address: str) -> None:
    """Raises OSError where nothing listens at the address; Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
