"""The training that is disturbed, the real one on Ray, and the one that it is compared with."""

from pathlib import Path

import torch

from pipelines import cluster
from pipelines.benchmark.config import ResumeBenchmarkConfig
from pipelines.benchmark.ingest import ENCODER
from pipelines.data.table.sample_table import SampleTable
from pipelines.train.config import TrainConfig
from pipelines.train.model_config import NetworkConfig
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.trace import Trace

KILLED, UNDISTURBED = "killed", "undisturbed"


class Trainings:
    """Both runs, in a process of their own as the command would be; each has a folder, and its traces there."""

    def __init__(self, config: ResumeBenchmarkConfig, folder: str) -> None:
        self._config, self._folder = config, Path(folder)

    def __call__(self, request: str) -> None:
        """Trains to the end: by Ray the run of `KILLED`, and, if there are workers to bring together, `UNDISTURBED`."""
        # Ray takes a second to import, which only this process needs.
        from pipelines.train.pipeline import train
        from pipelines.train.worker import train_stages

        config, traces = train_config(self._config, self._folder, request), trace_folder(self._folder, request)
        traces.mkdir(parents=True)
        try:
            if request == KILLED or self._config.workers > 1:
                train(config, trace=str(traces))
            else:
                torch.set_num_threads(config.scaling.cpus_per_worker)
                version = SampleTable.open(config.data.table).version
                train_stages(RunContext(config, version, request), place=Place(), hooks=Trace(str(traces), rank=0))
        finally:
            cluster.disconnect()


def trace_folder(folder: Path, name: str) -> Path:
    """Where the workers of a run write what they do."""
    return folder / name / "trace"


def train_config(config: ResumeBenchmarkConfig, folder: Path, name: str) -> TrainConfig:
    """The configuration of a run: one stage, one epoch of the table in the folder."""
    matryoshka = config.matryoshka()
    networks = [{key: getattr(one, key) for key in NetworkConfig.model_fields} for one in matryoshka.networks]
    return TrainConfig.model_validate(
        {
            "name": name,
            "data": {"table": str(folder / "table"), "flip": True, "crop": "random", "shuffle_row_groups": 4},
            "text": {"encoder": ENCODER, "max_tokens": config.text_tokens},
            "model": {"networks": networks, "text_dim": matryoshka.text_dim},
            "stages": [
                {
                    "resolution": matryoshka.resolutions[0],
                    "images": config.steps * config.batch,
                    "global_batch_size": config.batch,
                    "lr": 1e-4,
                }
            ],
            "scaling": {"workers": config.workers},
            "checkpoint": {
                "uri": str(folder / name / "run"),
                "every_images": config.checkpoint_every_steps * config.batch,
            },
            "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        }
    )
