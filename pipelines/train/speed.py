"""How fast a worker is, and what it takes of its machine."""

import torch

from mdm_core.config import MatryoshkaConfig
from pipelines.benchmark.flops import training_flops
from pipelines.benchmark.measuring import peak_memory_bytes
from pipelines.benchmark.peaks import device_name, known_peak
from pipelines.train.place import Place


class Speed:
    """Puts images a second in relation to what the devices could do.

    Args:
        networks: What is trained.
        place: This worker; the others have the same kind of device.
        bfloat16: Whether that is what the networks compute in.
        text_tokens: Tokens of a caption, at most.
        mix: See `training_flops`.
    """

    def __init__(
        self,
        networks: MatryoshkaConfig,
        place: Place,
        *,
        bfloat16: bool,
        text_tokens: int,
        mix: tuple[float, ...] | None,
    ) -> None:
        self._place = place
        is_cuda = place.device.type == "cuda"
        tf32 = is_cuda and torch.backends.cudnn.allow_tf32
        dtype = "bfloat16" if bfloat16 else "float32"
        self._peak = known_peak(device_name(place.device), dtype, tf32=tf32) if is_cuda else None
        self._flops = training_flops(networks, text_tokens=text_tokens, mix=mix) if self._peak else 0.0

    def metrics(self, images_per_s: float) -> dict[str, float]:
        """images_per_s of all workers, peak_memory_gb of this one, and peak_share, of FLOP/s, where it is known."""
        shown = {"images_per_s": images_per_s, "peak_memory_gb": peak_memory_bytes(self._place.device) / 1e9}
        if self._peak:
            shown["peak_share"] = images_per_s * self._flops / (self._peak * self._place.workers)
        return shown
