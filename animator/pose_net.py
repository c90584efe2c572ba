"""PoseNet: the drawn pose image to features at latent size, added once after `conv_in`.

Shapes: B·T images, H W pixels, C channels of the UNet's first block.
"""

import math

import torch
from torch import Tensor, nn


class PoseNet(nn.Module):
    """Convolutions with three strides of 2 and a zero-initialised projection (v1's PoseNet).

    Args:
        out_channels: channels of the UNet's first block.
        channels: input channels, then those of the three strided stages and the last
            convolution; published: (3, 16, 32, 64, 128).
    """

    def __init__(self, out_channels: int, channels: tuple[int, ...] = (3, 16, 32, 64, 128)):
        super().__init__()
        c0, c1, c2, c3, c4 = channels
        plan = [(c0, c0, 3), (c0, c1, 4), (c1, c1, 3), (c1, c2, 4), (c2, c2, 3), (c2, c3, 4)]
        plan += [(c3, c3, 3), (c3, c4, 3)]
        layers: list[nn.Module] = []
        for c_in, c_out, kernel in plan:
            stride = 2 if kernel == 4 else 1
            layers += [nn.Conv2d(c_in, c_out, kernel, stride, padding=1), nn.SiLU()]
        self.conv_layers = nn.Sequential(*layers)
        self.final_proj = nn.Conv2d(c4, out_channels, 1)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.conv_layers:
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.kernel_size[0] ** 2 * layer.in_channels
                nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_in))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.final_proj.weight)
        if self.final_proj.bias is not None:
            nn.init.zeros_(self.final_proj.bias)

    def forward(self, pose_images: Tensor) -> Tensor:
        """`(B·T, 3, H, W)` in [-1, 1] to features `(B·T, C, H/8, W/8)`."""
        return self.final_proj(self.conv_layers(pose_images)) * self.scale
