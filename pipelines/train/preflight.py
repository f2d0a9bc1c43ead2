"""What is looked at before a run starts, or would start: whether its checkpoint and its table suit it.

Nothing here needs a cluster, so that a dry run refuses what a real one would.
"""

from pydantic import ValidationError

from mdm_core.errors import ConfigError
from pipelines import storage
from pipelines.data.table.sample_table import SampleTable
from pipelines.embed.live import Embeddings, open_embeddings
from pipelines.train.checkpoint import Checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.ingest.selection import Selection, select_rows


def with_absolute_places(config: TrainConfig) -> TrainConfig:
    """The same configuration with local paths that mean the same in the folders where workers run."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"table": storage.absolute(config.data.table)}),
            "checkpoint": config.checkpoint.model_copy(update={"uri": storage.absolute(config.checkpoint.uri)}),
            "stages": tuple(
                stage.model_copy(update={"init_from": stage.init_from and storage.absolute(stage.init_from)})
                for stage in config.stages
            ),
        }
    )


def check_same_run(config: TrainConfig, start: Checkpoint) -> None:
    """Raises a ConfigError if `config` can't go on from the checkpoint: it is of a run with other values."""
    try:
        was, now = TrainConfig.model_validate(start.manifest.config).identity(), config.identity()
    except ValidationError as error:
        raise ConfigError(
            f"{start.uri} was made by mdm {start.manifest.code_version} with a configuration that this version can't "
            "read; use that version, or give the run another checkpoint.uri"
        ) from error
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{config.checkpoint.uri} holds a run with another {', '.join(changed)}; a run is continued as it began: "
            "put the old values back, or give the new run another checkpoint.uri"
        )
    _check_snapshots(config, start)


def open_table(config: TrainConfig, start: Checkpoint | None) -> tuple[SampleTable, Embeddings, Selection]:
    """The table of a run, at the version of its checkpoint if it has one, its embeddings, and the rows to train on.

    Raises:
        ConfigError: There is no such table or version, no row of it is chosen, or its embeddings don't suit the run.
        WorkError: The table can't be read.
    """
    version = None if config.data.version == "latest" else config.data.version
    table = SampleTable.open(config.data.table, start.manifest.table_version if start is not None else version)
    selection = select_rows(table, config.data.where)
    if start is not None and start.manifest.selection not in ("", selection.digest):
        raise ConfigError(
            f"data.where={config.data.where!r} does not choose the rows of {table.uri} at version {table.version} that "
            f"{start.uri} was trained on: files of the table have changed; restore them, or give the run another "
            "checkpoint.uri"
        )
    text = config.text
    store = open_embeddings(table, text.encoder, max_tokens=text.max_tokens, precomputed=text.precomputed)
    config.model.matryoshka(store.width)
    return table, store, selection


def _check_snapshots(config: TrainConfig, start: Checkpoint) -> None:
    """Raises ConfigError if a stage that is under way can't keep snapshots of averages: they count every step."""
    under_way = not start.manifest.stage_done
    if config.checkpoint.ema_snapshots_every_images and under_way and not start.has("averages"):
        raise ConfigError(
            f"checkpoint.ema_snapshots_every_images={config.checkpoint.ema_snapshots_every_images}, but stage "
            f"{start.manifest.stage} of {config.checkpoint.uri} began without averages for them; leave it out until "
            "the stage is done, or give the run another checkpoint.uri"
        )
