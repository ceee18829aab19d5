"""Operations on the pixels of a batch, on its device, each image with parameters of its own.

What torchvision's v2 functional kernels compute, on a CPU to the last bit, for a whole batch at once. Those take one
parameter a call, so that a batch takes a call an image (a hue costs 40 launches), and some copy it to the device from
memory that is not pinned, for which the host must wait. Autocontrast and equalize have no parameter and are theirs.

Nothing here reads a value back from the device. An image's result does not depend on the others in its batch.
Parameters are (n, NUM_PARAMETERS) float32; images are (n, 3, H, W) uint8, and so are the results.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from ast_dist.data.pixel_draws import Kernel

# Values that a CPU works on at a time, half a megabyte as float32: one image of 224 pixels, 42 of 32.
_CACHED_VALUES = 1 << 17


def transform(images: Tensor, kernels: np.ndarray, order: Tensor, parameters: Tensor) -> None:
    """Change images in place, each by the kernel named for it.

    kernels: (n,) on the host. order: (n,) int64 rows sorted by kernel, and parameters in that order: on the device.
    """
    first = 0
    # A GPU takes all images of a kernel at once. A CPU takes as many as stay in its cache from one pass to the next:
    # 64 at once were measured at 1.2 to 4 times the cost of one (224 pixels).
    at_once = len(images) if images.device.type != "cpu" else max(1, _CACHED_VALUES // images[0].numel())
    for kernel, count in enumerate(np.bincount(kernels, minlength=len(Kernel)).tolist()):
        last = first + count
        if kernel != Kernel.NONE:
            for start in range(first, last, at_once):
                part = slice(start, min(start + at_once, last))
                images.index_copy_(0, order[part], _KERNELS[Kernel(kernel)](images[order[part]], parameters[part]))
        first = last


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set a box of each image to 0, which is the mean where images are normalised.

    images: (n, 3, H, W) floating, written and returned. boxes: (n, 4) int64 rows of top, left, height, width.
    """
    top, left, height, width = boxes.view(-1, 4, 1).unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    is_in_rows, is_in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    return images.masked_fill_((is_in_rows[:, :, None] & is_in_columns[:, None, :]).unsqueeze(1), 0.0)


def affine(images: Tensor, parameters: Tensor) -> Tensor:
    """Move pixels by a 2 × 3 matrix from result to source, about the centre, in units of half a side. Outside is 0."""
    height, width = images.shape[-2:]
    x = torch.linspace((1.0 - width) * 0.5, (width - 1.0) * 0.5, width, device=images.device)
    y = torch.linspace((1.0 - height) * 0.5, (height - 1.0) * 0.5, height, device=images.device)[:, None]
    (ax, bx, cx), (ay, by, cy) = (row.unbind(1) for row in parameters.view(-1, 2, 3, 1, 1).unbind(1))
    # Term by term, where torchvision has a matrix product, whose sums depend on how many images share it.
    grid = torch.stack([torch.addcmul(ax * x, bx, y) + cx, torch.addcmul(ay * x, by, y) + cy], dim=-1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.round_().to(torch.uint8)


def brightness(images: Tensor, parameters: Tensor) -> Tensor:
    """Multiply by a factor."""
    return _to_uint8(images * _per_image(parameters))


def contrast(images: Tensor, parameters: Tensor) -> Tensor:
    """Move away from the mean grey of the image by a factor (below 1: towards it)."""
    gray = transforms.rgb_to_grayscale(images)
    # The mean of integers, summed as integers: the same bits in any order.
    mean = gray.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64).float() / gray[0].numel()
    return _blend(images, mean, parameters)


def saturation(images: Tensor, parameters: Tensor) -> Tensor:
    """Move away from the grey image by a factor (below 1: towards it)."""
    return _blend(images, transforms.rgb_to_grayscale(images).float(), parameters)


def sharpness(images: Tensor, parameters: Tensor) -> Tensor:
    """Move away from a smoothed image by a factor (below 1: towards it). The outermost pixels stay."""
    if min(images.shape[-2:]) <= 2:
        return images
    sharp = images.float()
    inner = sharp[..., 1:-1, 1:-1]
    # Weights of 1 around 5, over 13. Sums of integers are exact, and none of them lies half-way between two results.
    sums = F.avg_pool2d(sharp, 3, stride=1, divisor_override=1).add_(inner, alpha=4.0)
    smooth = sums.mul_(1.0 / 13.0).round_()
    inner.copy_(torch.addcmul(inner, _per_image(parameters, 1), smooth.sub_(inner)))
    return _to_uint8(sharp)


def hue(images: Tensor, parameters: Tensor) -> Tensor:
    """Turn the hue by -0.5 … 0.5 of the circle; saturation and value (of HSV) stay."""
    rgb = transforms.to_dtype(images, torch.float32, scale=True)
    red, green, _ = rgb.unbind(1)
    low, value = torch.aminmax(rgb, dim=1)
    is_gray, spread, one = value == low, value - low, torch.ones_like(value)
    strength = spread / torch.where(is_gray, one, value)
    below = (value[:, None] - rgb) / torch.where(is_gray, one, spread)[:, None]
    below_red, below_green, below_blue = below.unbind(1)
    of_others = torch.where(value == green, below_red + 2.0 - below_blue, below_green + 4.0 - below_red)
    angle = torch.where(value == red, below_blue - below_green, of_others).mul_(1.0 / 6.0).add_(1.0)
    # x - floor(x) is the remainder to the last bit, and several times as fast.
    angle = angle - angle.floor() + parameters[:, 0, None, None]
    angle = (angle - angle.floor()) * 6.0
    sector = angle.floor()
    gone, rest = strength * (angle - sector), 1.0 - strength
    lowest = (rest * value).clamp_(0.0, 1.0)
    falling = ((1.0 - gone) * value).clamp_(0.0, 1.0)
    rising = ((gone + rest) * value).clamp_(0.0, 1.0)
    is_in = [sector == float(number) for number in range(6)]
    is_in[0] |= sector == 6.0  # an angle rounded up to a whole turn
    channels = []
    for lag in (0, 2, 4):  # red is highest in sectors 5 and 0, green two later, blue four
        falls, low_1, low_2, rises = (is_in[(number + lag) % 6] for number in range(1, 5))
        level = torch.where(falls, falling, torch.where(rises, rising, value))
        channels.append(torch.where(low_1 | low_2, lowest, level))
    return transforms.to_dtype(torch.stack(channels, dim=1), torch.uint8, scale=True)


def posterize(images: Tensor, parameters: Tensor) -> Tensor:
    """Keep the bits of a mask."""
    return images & _per_image(parameters).to(torch.uint8)


def solarize(images: Tensor, parameters: Tensor) -> Tensor:
    """Invert values from a threshold on."""
    return torch.where(images >= _per_image(parameters), images.bitwise_not(), images)


def autocontrast(images: Tensor, parameters: Tensor) -> Tensor:
    """Stretch each channel to 0 … 255."""
    return transforms.autocontrast(images)


def equalize(images: Tensor, parameters: Tensor) -> Tensor:
    """Make each channel's histogram flat."""
    return transforms.equalize(images)


def _blend(images: Tensor, others: Tensor, parameters: Tensor) -> Tensor:
    """images · factor + others · (1 - factor). The latter is a parameter, too: it was rounded once, from float64."""
    return _to_uint8(torch.addcmul(images * _per_image(parameters), others, _per_image(parameters, 1)))


def _per_image(parameters: Tensor, number: int = 0) -> Tensor:
    return parameters[:, number, None, None, None]


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0.0, 255.0).to(torch.uint8)


_KERNELS: dict[Kernel, Callable[[Tensor, Tensor], Tensor]] = {
    Kernel.AFFINE: affine,
    Kernel.BRIGHTNESS: brightness,
    Kernel.CONTRAST: contrast,
    Kernel.SATURATION: saturation,
    Kernel.HUE: hue,
    Kernel.SHARPNESS: sharpness,
    Kernel.POSTERIZE: posterize,
    Kernel.SOLARIZE: solarize,
    Kernel.AUTOCONTRAST: autocontrast,
    Kernel.EQUALIZE: equalize,
}
