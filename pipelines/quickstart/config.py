"""The configuration of the quickstart, and the configurations of the commands that it runs."""

from typing import Any, Self

from pydantic import Field, model_validator

from pipelines import storage
from pipelines.data import config as data
from pipelines.embed.config import EmbedConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.quickstart.corpus import Corpus
from pipelines.run_config import Config
from pipelines.tracking import TrackingConfig
from pipelines.train import config as training
from pipelines.train.model_config import ModelConfig, NetworkConfig

PREVIEW_CAPTIONS = (
    "grinning face",
    "red heart",
    "Japan",
    "sun",
    "fish",
    "house",
    "red apple",
    "blue square",
    "France",
    "tree",
    "cat face",
    "umbrella",
)

SAMPLING: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 10}
"""With the second-order sampler, 32 steps end no nearer to the real pictures than 8."""


class QuickstartConfig(Config):
    """The whole pipeline on real captioned pictures, on this machine."""

    out: str = Field(default="out/quickstart", min_length=1)
    """Folder for everything that the quickstart makes."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port on which the pictures are served; 0 picks a free one, and later runs keep it."""
    seed: int = Field(default=0, ge=0)
    """What the list's trouble, the order of training and the noise are drawn from."""
    pictures: int | None = Field(default=None, ge=64)
    """Take only so many of the pictures; all 1,905 if empty."""
    images_16px: int = Field(default=28_800, ge=1)
    """Images to train on at 16 px."""
    images_32px: int = Field(default=19_200, ge=1)
    """Images to train on at 32 px."""
    num_samples: int = Field(default=256, ge=2)
    """Pictures to make and score in the evaluation."""
    workers: int = Field(default=1, ge=1)
    """Training processes."""
    cpus_per_worker: int = Field(default=2, ge=1)
    """CPUs of each training process."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.pictures is not None and self.num_samples + 2 > self.pictures:
            raise ValueError(
                f"num_samples={self.num_samples} leaves no real pictures to compare with of pictures={self.pictures}; "
                f"use num_samples={self.pictures // 2}"
            )
        return self

    def place(self, *parts: str) -> str:
        """Absolute path of something under `out`."""
        return storage.join(storage.absolute(self.out), *parts)

    @property
    def tracking(self) -> TrackingConfig:
        """MLflow in a file under `out`."""
        return TrackingConfig(uri=f"sqlite:///{self.place('mlflow.db')}", experiment="quickstart")

    def refresh(self, corpus: Corpus) -> data.RefreshConfig:
        """Fetches the corpus: small pictures, and a deadline that doesn't wait long for those that drip."""
        return data.RefreshConfig(
            source=data.SourceConfig(uri=str(corpus.links_path), format="tsv", name="openmoji"),
            table=data.TableConfig(uri=self.place("table")),
            fetch=data.FetchConfig(allow_networks=("127.0.0.0/8",), concurrency=64, per_host=64, deadline_s=5.0),
            image=data.ImageConfig(size_px=32, resize="center_crop", format="png"),
            filters=data.FiltersConfig(
                min_side_px=32, caption_words=(1, 64), caption_chars=(1, 500), exact_duplicates=False
            ),
            # What drips today will drip tomorrow: a later run has nothing to wait for.
            run=data.RunConfig(shard_rows=500, commit_every_s=5.0, retry_failed="none"),
            tracking=self.tracking,
        )

    def embed(self) -> EmbedConfig:
        """Embeds every caption of the table."""
        return EmbedConfig(table=self.place("table"), encoder="minilm", max_tokens=32)

    def train(self) -> training.TrainConfig:
        """Two stages, 16 then 32 px."""
        return training.TrainConfig(
            name="quickstart",
            seed=self.seed,
            data=training.DataConfig(table=self.place("table")),
            text=training.TextConfig(encoder="minilm", max_tokens=32, drop_prob=0.1),
            model=ModelConfig(networks=(_shell(), _innermost())),
            stages=(_stage(16, self.images_16px), _stage(32, self.images_32px)),
            scaling=training.ScalingConfig(workers=self.workers, cpus_per_worker=self.cpus_per_worker),
            checkpoint=training.CheckpointConfig(uri=self.place("training"), every_images=6_400),
            preview=training.PreviewConfig(captions=PREVIEW_CAPTIONS, **SAMPLING),
            tracking=self.tracking,
            log_every_steps=10,
        )

    def evaluate(self) -> EvaluateConfig:
        """Scores the trained network against the table's pictures."""
        return EvaluateConfig(
            checkpoint=self.place("training"),
            out=self.place(),
            num_samples=self.num_samples,
            seed=self.seed,
            tracking=self.tracking,
            **SAMPLING,
        )


def _innermost() -> NetworkConfig:
    return NetworkConfig(
        resolution=16,
        channels=(64, 128),
        num_resnets=(1, 1),
        num_attention_layers=(0, 1),
        time_dim=256,
        text_proj_dim=128,
        num_heads=4,
        num_groups=16,
    )


def _shell() -> NetworkConfig:
    return NetworkConfig(
        resolution=32,
        channels=(32, 64),
        num_resnets=(1, 1),
        num_attention_layers=(0, 0),
        time_dim=256,
        mid_blocks=False,
        attention_ffn=False,
        num_heads=4,
        num_groups=16,
    )


def _stage(resolution: int, images: int) -> training.StageConfig:
    return training.StageConfig(
        resolution=resolution,
        images=images,
        global_batch_size=16,
        lr=1e-3,
        warmup_images=1_600,
        loss_weighting="v",
        decay="linear",
        ema=0.1,
    )
