"""The configuration of an embedding run."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.run_config import Config


class EmbedConfig(Config):
    """Compute the text embeddings of a table's captions, those that are not there yet."""

    table: str = Field(min_length=1)
    """The sample table: a local folder or s3://…; the embeddings go beside its shards."""
    version: int | Literal["latest"] = "latest"
    """Version of the table."""
    encoder: str = "minilm"
    """Text encoder: minilm, open_clip:MODEL/WEIGHTS or t5:NAME_OR_FOLDER."""
    max_tokens: int = Field(default=32, ge=2, le=512)
    """Tokens kept of a caption, the special ones included; training has to ask for the same."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes, each with the encoder in memory; auto: one a GPU if gpus_per_worker is 1, else one a CPU."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of each process: 0 encodes on the CPU."""
