"""Joining a cluster: one that is there, one that is too small, one that is not there."""

import signal
import socket
import threading

import pytest

from mdm_core.errors import ConfigError
from pipelines import cluster


def test_a_cluster_that_is_joined_already_is_used_and_left_alone(ray_cluster):
    import ray

    node = ray.get_runtime_context().get_node_id()
    cluster.connect(min_cpus=4)
    cluster.disconnect()
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_node_id() == node


def test_a_cluster_with_too_few_cpus_is_refused_before_work_waits_for_ever(ray_cluster):
    with pytest.raises(ConfigError) as caught:
        cluster.connect(min_cpus=5)
    assert str(caught.value) == (
        "this work needs 5 CPUs at once, but the Ray cluster has 4; "
        "ask for fewer workers, or set RAY_ADDRESS to a larger cluster"
    )


def test_workers_must_fit_the_machines_and_not_only_all_of_them_together(monkeypatch):
    machines = [({"CPU": 6.0, "GPU": 1.0}, True), ({"CPU": 3.0, "GPU": 2.0}, True), ({"CPU": 64.0, "GPU": 8.0}, False)]
    monkeypatch.setattr("ray.nodes", lambda: [{"Resources": has, "Alive": alive} for has, alive in machines])
    # By hand: how many times they fit, of the machines that are alive.
    for cpus, gpus, room in ((4, 0, 1), (3, 0, 3), (2, 0, 4), (1, 1, 3), (2, 1, 2), (0, 1, 3), (4, 2, 0), (7, 0, 0)):
        if room:
            cluster.check_room(cpus, gpus, what="workers", count=room)
        with pytest.raises(ConfigError) as caught:
            cluster.check_room(cpus, gpus, what="workers", count=room + 1)
        assert str(caught.value) == (
            f"workers ask {room + 1} times for {cpus} CPUs and {gpus} GPUs together on one machine, and the machines "
            f"of the Ray cluster have room for {room}; ask for fewer, or set RAY_ADDRESS to another cluster"
        )
    cluster.check_room(0, 0, what="nothing")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch, scheme):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with pytest.raises(ConfigError, match=f"^no Ray cluster answers at RAY_ADDRESS={address} .*unset RAY_ADDRESS"):
            cluster.connect()


def test_work_on_another_thread_hands_back_its_result_and_its_error():
    assert cluster.call_interruptibly(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        cluster.call_interruptibly(lambda: 1 // 0)


def test_ctrl_c_does_not_wait_for_the_work():
    never = threading.Event()
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        cluster.call_interruptibly(never.wait)
    never.set()
