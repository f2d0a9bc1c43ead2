"""The configuration of making pictures."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mdm_core.guidance import Guidance
from mdm_core.samplers import Sampling, Solver, Spacing
from mdm_core.thresholding import Threshold, ThresholdKind
from pipelines.run_config import Config

Scale = Annotated[float, Field(ge=0)]


class ThresholdConfig(Config):
    """What keeps the estimates of the clean pictures in range."""

    kind: ThresholdKind = "clip"
    """clip cuts values off; dynamic divides by the size that the fraction ratio of a picture's values stays below."""
    ratio: float = 0.995
    """That fraction, of dynamic."""
    max_value: float = 100.0
    """The most that dynamic divides by."""


class SampleTextConfig(Config):
    """How captions are encoded for a checkpoint that is one file; a run's folder says it itself."""

    encoder: str = ""
    """minilm, open_clip:MODEL/WEIGHTS or t5:NAME_OR_FOLDER; if empty, what a .safetensors file of a run says, and
    t5:google/flan-t5-xl for a published .pth file."""
    max_tokens: int | None = Field(default=None, ge=1, le=512)
    """Tokens of a caption that are kept; if empty, what the file says, or 128."""


class SampleConfig(Config):
    """Make pictures from captions."""

    checkpoint: str = Field(min_length=1)
    """A checkpoint's folder, or a run's, of which the newest is taken; or one file, a published .pth or a .safetensors
    of this project: local or s3://…."""
    captions: tuple[str, ...] = ()
    """What the pictures show."""
    captions_file: str = ""
    """A text file with a caption a line, made after those of `captions`: local or s3://…."""
    pictures_per_caption: int = Field(default=1, ge=1, le=64)
    """Pictures of each caption, each from other noise."""
    out: str = Field(default="out/sample", min_length=1)
    """Folder for the grids, one a resolution: local or s3://…."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged weights, or those of the last step; a checkpoint that is one file has only its own."""
    seed: int = Field(default=0, ge=0)
    """What the noise is drawn from: the same seed makes the same pictures."""
    negative_caption: str = ""
    """What guidance goes away from; if empty, from no caption (of a published file, from the empty caption)."""
    guidance_scale: Scale | tuple[Scale, ...] = 3.0
    """How much the captions count; 1 is no guidance. One number, or a list with one a resolution, finest first."""
    guidance_rescale: float = 0.0
    """How much of the contrast that guidance adds is taken back, in [0, 1]; 0.7 is usual."""
    guidance_interval: tuple[float, float] | None = None
    """First and last noise level with guidance, as parts of all: [0.2, 0.8], say; every level if empty."""
    num_inference_steps: int = Field(default=32, ge=1)
    """Steps a picture: a network call each, two with heun."""
    solver: Solver = "dpmpp_2m"
    """dpmpp_2m and heun are of second order; ddpm adds noise at each step, ddim as much of it as eta says."""
    eta: float = 0.0
    """Noise of each step of ddim, in [0, 1]."""
    spacing: Spacing = "trailing"
    """Which noise levels are visited: trailing begins at the noisiest, reference lower, as the published code does."""
    threshold: ThresholdConfig = ThresholdConfig()
    upscale_from: str = ""
    """A picture to make finer: it is given one of the smaller resolutions and stays, the finer ones are made."""
    inpaint: str = ""
    """A picture to make partly anew, where `mask` says."""
    mask: str = ""
    """A picture of the size of `inpaint`: white is made anew, black stays."""
    start_from: str = ""
    """A picture to change: noised up to `strength`, and denoised again."""
    strength: float = Field(default=0.6, gt=0, le=1)
    """How much of `start_from` is changed: 1 keeps nothing of it."""
    text: SampleTextConfig = SampleTextConfig()
    batch_size: int = Field(default=32, ge=1)
    """Pictures made at once."""
    device: str = "auto"
    """A torch device; auto is the GPU where there is one."""

    def sampling(self) -> Sampling:
        """How pictures are made from noise.

        Raises:
            ValueError: Fields are out of range or contradict each other.
        """
        return Sampling(
            num_inference_steps=self.num_inference_steps,
            solver=self.solver,
            eta=self.eta,
            spacing=self.spacing,
            guidance=Guidance(
                scale=self.guidance_scale,
                rescale=self.guidance_rescale,
                interval=self.guidance_interval or (0.0, 1.0),
            ),
            threshold=Threshold(**self.threshold.model_dump()),
        )

    @model_validator(mode="after")
    def _check_captions(self) -> Self:
        if not self.captions and not self.captions_file:
            raise ValueError("no captions: give captions, or a captions_file with one a line")
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        self.sampling()
        return self

    @model_validator(mode="after")
    def _check_pictures(self) -> Self:
        given = [name for name in ("upscale_from", "inpaint", "start_from") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} can't be combined; give one of them")
        # A printed configuration has every field, so one at its default says nothing.
        if self.strength != type(self).model_fields["strength"].default and not self.start_from:
            raise ValueError("strength is of start_from, which is missing; give the picture to start from")
        if bool(self.inpaint) != bool(self.mask):
            missing = "mask" if self.inpaint else "inpaint"
            raise ValueError(f"inpaint and mask belong together, and {missing} is missing; give both")
        return self
