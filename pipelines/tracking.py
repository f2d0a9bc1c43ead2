"""Runs, metrics and pictures in MLflow: the only file that imports it."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from mdm_core.errors import ConfigError, WorkError
from pipelines.run_config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

_KEY_TAG = "mdm.key"
_MAX_PARAMS_A_CALL = 100


class TrackingConfig(Config):
    """Where experiments are kept."""

    uri: str = Field(default="sqlite:///mlflow.db", min_length=1)
    """MLflow's tracking URI: sqlite:///FILE, or the address of a server."""
    experiment: str = Field(default="mdm", min_length=1)
    """Name of the experiment."""

    @field_validator("uri")
    @classmethod
    def _check_secrets(cls, value: str) -> str:
        if urlsplit(value).password:
            # It would be printed, and kept in every checkpoint.
            raise ValueError(
                "there is a password in it, which does not belong into a configuration; set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for PostgreSQL"
            )
        return value


class Run:
    """One open MLflow run."""

    def __init__(self, client: Any, run_id: str, tracking: TrackingConfig) -> None:
        self._client, self._tracking = client, tracking
        self.id = run_id

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Logs a (nested) mapping as parameters with dotted names; values that stand already are left."""
        from mlflow.entities import Param

        with _translated(self._tracking):
            known = self._client.get_run(self.id).data.params
        params = [Param(k, str(v)) for k, v in _flatten(values).items() if k not in known]
        for first in range(0, len(params), _MAX_PARAMS_A_CALL):
            with _translated(self._tracking):
                self._client.log_batch(self.id, params=params[first : first + _MAX_PARAMS_A_CALL])

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs numbers at a step; the steps of training are images seen."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with _translated(self._tracking):
            self._client.log_batch(self.id, metrics=[Metric(k, float(v), now_ms, step) for k, v in values.items()])

    def log_image(self, image: "np.ndarray[Any, Any] | Image.Image", key: str, step: int = 0) -> None:
        """Logs a picture; those of one key form a series with a step slider."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        with _translated(self._tracking):
            self._client.log_image(self.id, picture, key=key, step=step)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Logs a drawing as an artifact; `name` ends in .png."""
        with _translated(self._tracking):
            self._client.log_figure(self.id, figure, name)

    def log_file(self, path: str, folder: str = "") -> None:
        """Logs a local file as an artifact."""
        with _translated(self._tracking):
            self._client.log_artifact(self.id, path, folder or None)

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """Logs a mapping as an artifact; `name` ends in .yaml or .json."""
        with _translated(self._tracking):
            self._client.log_dict(self.id, dict(values), name)


class SystemMetrics:
    """What a machine's processors, memory, disks, network and GPUs do, under the names that MLflow gives them.

    Args:
        node: Name of the machine, part of each metric's name.
    """

    def __init__(self, node: str) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._prefix = f"system/{node}/"
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        # Without NVIDIA's library, or without a GPU.
        with contextlib.suppress(ImportError, RuntimeError):
            self._monitors.append(GPUMonitor())

    def take(self) -> dict[str, float]:
        """Returns what stands now; of disk and network, what they have done since the object was made."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"{self._prefix}{name}": float(value) for name, value in found.items()}


@contextlib.contextmanager
def open_run(
    tracking: TrackingConfig,
    *,
    name: str,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    key: str | None = None,
    tags: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """Opens a run, and closes it as finished, failed or (Ctrl-C) killed.

    Args:
        tracking: Where to.
        name: What the list of runs shows.
        run_id: Continues this run.
        parent_run_id: Shows the run under this one.
        key: What the run is about, in this experiment: a run with the same key is continued rather than begun anew.
        tags: Further tags.

    Raises:
        ConfigError: The tracking store can't be reached, or has no such run.
    """
    client, experiment_id = _connect(tracking)
    run_id = run_id or (_find(client, experiment_id, key) if key else None)
    own_tags = {k: str(v) for k, v in (tags or {}).items()} | ({_KEY_TAG: key} if key else {})
    if run_id is None:
        if parent_run_id is not None:
            own_tags["mlflow.parentRunId"] = parent_run_id
        with _translated(tracking):
            run_id = client.create_run(experiment_id, run_name=name, tags=own_tags).info.run_id
    else:
        _resume(client, run_id, tracking)
        with _translated(tracking):
            for tag, value in own_tags.items():
                client.set_tag(run_id, tag, value)
    try:
        yield Run(client, run_id, tracking)
    except BaseException as error:
        # What went wrong is told, not that MLflow could not be told of it, as on a full disk.
        with contextlib.suppress(WorkError), _translated(tracking):
            client.set_terminated(run_id, status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    with _translated(tracking):
        client.set_terminated(run_id, status="FINISHED")


@contextlib.contextmanager
def _translated(tracking: TrackingConfig) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WorkError(f"could not write to {tracking.uri}: {reason}; mend it and run again") from error


def metric_history(tracking: TrackingConfig, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every (step, value) of a metric, in the order of steps; a step logged twice counts once, as logged last."""
    client, _ = _connect(tracking)
    history = sorted(client.get_metric_history(run_id, key), key=lambda metric: (metric.step, metric.timestamp))
    return list({metric.step: float(metric.value) for metric in history}.items())


def run_page(tracking: TrackingConfig, run_id: str) -> str:
    """Path of the run's charts in MLflow's pages, after the server's address."""
    _, experiment_id = _connect(tracking)
    return f"/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"


def child_runs(tracking: TrackingConfig, parent_run_id: str) -> dict[str, str]:
    """Ids of the runs shown under a run, by name."""
    client, experiment_id = _connect(tracking)
    found = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent_run_id}'", max_results=1000)
    return {run.info.run_name: run.info.run_id for run in reversed(found)}


def _connect(tracking: TrackingConfig) -> tuple[Any, str]:
    import logging

    # Creating a database prints two hundred lines of schema migrations otherwise.
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=tracking.uri)
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is not None:
            return client, str(experiment.experiment_id)
        # Without the tag MLflow's list of experiments opens on prompts and traces, where losses belong.
        made = client.create_experiment(
            tracking.experiment,
            artifact_location=_artifacts(tracking.uri),
            tags={"mlflow.experimentKind": "custom_model_development"},
        )
        return client, str(made)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"tracking.uri={tracking.uri} can't be used: {reason}; give sqlite:///FILE in a folder that exists, "
            "or the address of a running MLflow server"
        ) from error


def _artifacts(uri: str) -> str | None:
    """Pictures and files go beside a database file; a server knows where its own are."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlflow-artifacts")


def _find(client: Any, experiment_id: str, key: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def _resume(client: Any, run_id: str, tracking: TrackingConfig) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        raise ConfigError(f"{tracking.uri} has no run {run_id}: {error.message}; begin a new run") from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{name}.{index}.")
        else:
            flat[name] = value
    return flat
