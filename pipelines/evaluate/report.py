"""What an evaluation found, and how it is known whether it still holds."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.evaluate.config import EvaluateConfig
from pipelines.train.checkpoint import MANIFEST, Checkpoint

_FILE = "evaluation.json"
_LAYOUT = 2  # raised when a metric is computed otherwise, so that old numbers are not taken for new ones
# Where results go and how the work is cut up, which change no number; and what the inputs below hold already.
_NO_INPUTS = {"out", "checkpoint", "table", "version", "where", "tracking", "workers", "batch_size", "gpus_per_worker"}


@dataclass(frozen=True)
class EvaluateReport:
    """Numbers and pictures of one checkpoint."""

    fingerprint: str
    metrics: dict[str, float]
    """fd_<feature network>, fd_floor, fd_untrained, fd_relative, kid, kid_floor, kid_untrained."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals: of fd for the draw of the samples, of kid over its subsets."""
    checkpoint: str
    images_seen: int
    table: str
    table_version: int
    where: str | None
    """Which of its rows count; all if empty."""
    num_samples: int
    num_reference: int
    grids: dict[str, str]
    """Where the grid of each resolution is."""
    mlflow_run_id: str
    seconds: float
    reused: bool = False
    """Whether nothing had changed, so that nothing was done."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it, the metrics at its top."""
        values = asdict(self)
        return values.pop("metrics") | values


def fingerprint(config: EvaluateConfig, checkpoint: Checkpoint, table: SampleTable, where: str | None) -> str:
    """Returns a text that is the same as long as the numbers would be; `where` says which rows of the table count."""
    manifest = storage.read_bytes(storage.join(checkpoint.uri, MANIFEST))
    inputs = {
        "layout": _LAYOUT,
        # It holds the checksums of the weights.
        "checkpoint": hashlib.sha256(manifest).hexdigest(),
        "table": [table.uri, table.version],
        "where": where,
        "config": config.model_dump(mode="json", exclude=_NO_INPUTS),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def read_report(out: str, wanted: str) -> EvaluateReport | None:
    """Returns the report in the folder `out` if its fingerprint is `wanted` and its grids are there."""
    uri = storage.join(out, _FILE)
    if not storage.exists(uri):
        return None
    try:
        values = json.loads(storage.read_bytes(uri))
        values["intervals"] = {name: (low, high) for name, (low, high) in values["intervals"].items()}
        report = EvaluateReport(**values | {"reused": True})
    except (ValueError, TypeError, KeyError, AttributeError):
        # Written by another version: no use, and no harm.
        return None
    if report.fingerprint != wanted or not all(storage.exists(grid) for grid in report.grids.values()):
        return None
    return report


def delete_report(out: str) -> None:
    """Deletes the report in the folder `out`, if there is one."""
    storage.delete(storage.join(out, _FILE))


def write_report(out: str, report: EvaluateReport) -> None:
    """Writes the report into the folder `out`; it comes last, after the grids that it names."""
    storage.write_bytes_atomic(storage.join(out, _FILE), json.dumps(asdict(report), indent=1).encode())
