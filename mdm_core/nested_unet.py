"""Shells around a UNet: one network that denoises several resolutions at once (arXiv 2310.15111, section 3.2).

Legend: B batch, C channels, r side of a resolution in pixels.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.layers import zeroed
from mdm_core.unet import Conditioning, UNet


class NestedUNet(UNet):
    """A shell at one resolution around a network for the smaller ones.

    The shell's lowest feature map is added to the inner network's first, and the inner network's last comes back
    before the shell's way up; both through a convolution that is zero at the start, so that at the start the inner
    network computes exactly what it computes alone.
    """

    def __init__(self, config: UNetConfig, inner: UNet) -> None:
        super().__init__(config)
        self.inner_unet = inner
        inner_width = inner.config.channels[0]
        self.in_adapter = zeroed(nn.Conv2d(config.channels[-1], inner_width, 3, padding=1))
        self.out_adapter = zeroed(nn.Conv2d(inner_width, config.channels[-1], 3, padding=1))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the pictures in pixels, finest first."""
        return (self.config.resolution, *self.inner_unet.resolutions)

    def run(
        self, x_t: list[Tensor], conditions: list[Conditioning], from_shell: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """See `UNet.run`; the first prediction is the shell's, the others are the inner network's."""
        h = self.conv_in(self._scaled_in(x_t[0]))
        if from_shell is not None:
            h = h + from_shell
        h, skips = self.down(h, conditions[0])
        inner_outputs, from_inner = self.inner_unet.run(x_t[1:], conditions[1:], self.in_adapter(h))
        h = self.mid(h + self.out_adapter(from_inner), conditions[0])
        h = self.up(h, skips, conditions[0])
        return [self.read_out(h), *inner_outputs], h

    def conditions(
        self, timestep: Tensor, text_emb: Tensor | None, text_mask: Tensor | None, scale: Tensor | None
    ) -> list[Conditioning]:
        """See `UNet.conditions`; a shell has its own time embedding and the innermost network's text."""
        inner = self.inner_unet.conditions(timestep, text_emb, text_mask, scale)
        pooled = inner[-1].pooled_text
        time_emb = self.embed_time(timestep, scale)
        if pooled is not None:
            time_emb = time_emb + pooled
        text = inner[-1].text if self.text_width is not None else None
        return [Conditioning(F.silu(time_emb), text, inner[-1].text_mask, pooled), *inner]


def build_network(config: MatryoshkaConfig) -> UNet:
    """The network that `config` describes, freshly initialised: a UNet, or shells nested around one."""
    network = UNet(config.networks[-1])
    for shell in reversed(config.networks[:-1]):
        network = NestedUNet(shell, network)
    return network
