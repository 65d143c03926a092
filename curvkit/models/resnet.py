"""The residual network for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.errors import InvalidArgument
from curvkit.models.checks import check_count


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters.

        y = relu(BN(conv(relu(BN(conv(x))))) + s(x))

    s is the identity; where the block halves the image and widens the channels, s takes every second pixel
    and pads the new channels with zeros (half of them before the old ones, half after).

    Args:
        inputs: Channels of x.
        outputs: Channels of y, >= inputs.
        stride: 1, or 2 to halve height and width (rounded up).

    Shapes: [N, inputs, H, W] -> [N, outputs, ceil(H / stride), ceil(W / stride)].

    Example:
        >>> ResidualBlock(16, 32, stride=2)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = ((outputs - inputs) // 2, outputs - inputs - (outputs - inputs) // 2)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return s(x): the identity, or every second pixel with zeros for the new channels.

        Args:
            x: [N, inputs, H, W].

        Returns:
            [N, outputs, ceil(H / stride), ceil(W / stride)].

        Example:
            >>> ResidualBlock(2, 4, stride=2).shortcut(torch.ones(1, 2, 4, 4))[0, :, 0, 0]
            tensor([0., 1., 1., 0.])
        """
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.padding)) if any(self.padding) else x

    def forward(self, x: Tensor) -> Tensor:
        """Return y; see the class."""
        a = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(a)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al.: a stem, three stages of m blocks, a mean over pixels, a linear head.

        depth = 6 m + 2;   channels w, 2w, 4w;   image H x W, H/2 x W/2, H/4 x W/4

    Shortcuts are the paper's option A (identity, zero padding), not 1x1 projections with a norm: it is what
    the paper uses on CIFAR, and every parameter belongs to one of the counted layers. Other implementations
    project; their ResNet-20 has 272,474 parameters, this one 269,722. Nothing is computed in place, so that
    the network can be differentiated twice.

    Args:
        depth: 6m + 2 with m >= 1: 8, 14, 20, 32, 44, 56, 110, ...
        width: w, channels of the first stage; 16 in the paper.
        num_classes: Length of the output.
        in_channels: Channels of the image.

    Shapes: images [N, in_channels, H, W] -> logits [N, num_classes]. H and W are 32 in the paper and free
    here.

    Raises:
        InvalidArgument: If a size is not an integer >= 1, or depth is not 6m + 2.

    Parameters, with c input channels and C classes; 269,722 for ResNet-20 with w = 16, c = 3, C = 10:

        9 c w + 2 w  +  m (18 w^2 + 4 w)  +  18 w^2 + (2 m - 1) 36 w^2 + 8 m w
            +  72 w^2 + (2 m - 1) 144 w^2 + 16 m w  +  (4 w + 1) C

    Convolutions start from N(0, 2 / fan_in), the head as `nn.Linear` does; both draw from the global random
    state.
    Cost: about 41 million multiply-adds per 32 x 32 image for ResNet-20; a training forward pass updates
    BatchNorm's running statistics.
    Source: He, Zhang, Ren & Sun (2015), "Deep Residual Learning for Image Recognition", section 4.2.

    Example:
        >>> ResNet(depth=8, width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        check_count("ResNet", "depth", depth, "the number of layers with weights, 6m + 2", 20)
        check_count("ResNet", "width", width, "the number of channels of the first stage", 16)
        check_count("ResNet", "num_classes", num_classes, "the number of outputs", 10)
        check_count("ResNet", "in_channels", in_channels, "the number of channels of an image", 3)
        m, remainder = divmod(depth - 2, 6)
        if m < 1 or remainder:
            below = max(8, 6 * m + 2)
            raise InvalidArgument(
                f"ResNet: depth={depth} must be 6m + 2 with m >= 1: three stages of m blocks of two layers, "
                f"a stem and a head. Pass for example {below} or {below + 6}."
            )
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, m, stride=1)
        self.layer2 = _stage(width, 2 * width, m, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, m, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits.

        Args:
            images: [N, in_channels, H, W].

        Returns:
            Logits, [N, num_classes].

        Raises:
            InvalidArgument: If the images have another shape.

        Example:
            >>> ResNet(depth=8, width=2, in_channels=1)(torch.zeros(2, 1, 9, 9)).shape
            torch.Size([2, 10])
        """
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise InvalidArgument(
                f"ResNet: images of shape {tuple(images.shape)} must be [N, {self.in_channels}, H, W]. "
                "Permute or stack the images, or give in_channels the number that they have."
            )
        x = F.relu(self.bn1(self.conv1(images)))  # [N, w, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 4w, H/4, W/4]
        return self.linear(torch.mean(x, dim=(2, 3)))  # [N, 4w] -> [N, C]


def _stage(inputs: int, outputs: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(num_blocks - 1)))
