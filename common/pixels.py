"""The loader's functions of pixels. Imported inside functions, because torchvision's import takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import ceil, floor

import torch
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional


def decode(content: bytes, mode: str) -> Tensor:
    """The pixels (3,H,W) of a PNG or JPEG, "RGB" or "UNCHANGED". A fifth (PNG) to a third (JPEG) faster than Pillow.
    Raises RuntimeError for a damaged file, also for a damaged JPEG that Pillow would fill with grey."""
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=mode)


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Colour jitter of a float image (3,H,W) in [0,1]; the same draws and result as torchvision's ColorJitter.

    In random order: brightness, contrast and saturation are multiplied by factors in 1 +- strength; the hue is turned by up to
    0.4 strength of a full turn. strength: in [0, 1]."""
    order, changes = torch.randperm(4, generator=generator), strength * (2 * torch.rand(4, generator=generator) - 1)
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for k in order.tolist():
        change = changes[k].item()
        image = kinds[k](image, 1 + change) if k < 3 else in_strips(lambda x, turn=0.4 * change: turn_hue(x, turn), image)
    return image


def turn_hue(image: Tensor, turn: float) -> Tensor:
    """Add `turn` (in full turns) to the HSV hue of a float image (3,H,W) in [0,1]. As torchvision's adjust_hue, in a third of
    its time."""
    (r, g, b), high = image, image.amax(dim=0)
    chroma = high - image.amin(dim=0)                            # V - min = V S
    hue = torch.where(high == r, g - b, torch.where(high == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = hue / (6 * chroma).clamp(min=1e-9) + turn
    distance = torch.stack([hue, hue - 1 / 3, hue - 2 / 3])      # from red, green, blue
    distance = (distance - distance.round()).abs()               # at most half a turn
    return high - chroma * (6 * distance - 1).clamp(0, 1)


def in_strips(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply a pixelwise function (C,H,W) -> (C,H,W), on a CPU to 32 rows at a time. Twice as fast: intermediate results stay
    in the cache and need no new memory pages."""
    return torch.cat([function(strip) for strip in image.split(32 if image.is_cpu else len(image[0]), dim=1)], dim=1)


def change_window(function: Callable[[Tensor], Tensor], image: Tensor, size: Sequence[int], y: slice, x: slice) -> Tensor:
    """An image uint8 (3,H,W) with the pixels changed that the window [y, x] of the image resized to `size` needs; the others
    are as they were. function: pixelwise, float32 (3,h,w) in [0,1] -> the same."""
    rows, columns = (_origin(*side) for side in zip((y, x), size[::-1], image.shape[1:], strict=True))
    image = image.clone()
    image[:, rows, columns] = in_strips(lambda strip: (255 * function(strip / 255)).round().byte(), image[:, rows, columns])
    return image


def _origin(window: slice, new: int, old: int) -> slice:
    """The pixels of a side of `old` pixels that a window of its antialiased resize to `new` pixels depends on."""
    step = old / new
    reach = max(1.0, step) + 1                                   # of the filter, from a pixel's centre; 1 for rounding
    return slice(max(0, floor(window.start * step - reach)), ceil(window.stop * step + reach))


def sample(image: Tensor, limit: int = 2**18) -> Tensor:
    """At most `limit` pixels of an image (3,H,W), on a regular grid: (3,h,w)."""
    stride = 1
    while -(-image.shape[1] // stride) * -(-image.shape[2] // stride) > limit:
        stride += 1
    return image[:, ::stride, ::stride].contiguous()


def histograms(image: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Returns, per channel of an image (C,H,W): equally spaced values from its minimum to its maximum (C, steps), and the
    number of pixels nearest to each (C, steps) float."""
    low, high = (end(image.flatten(1), dim=1, keepdim=True) for end in (torch.amin, torch.amax))
    shares, half = (image.flatten(1) - low) / (high - low).clamp(min=1e-6), 0.5 / (steps - 1)
    return torch.lerp(low, high, torch.linspace(0, 1, steps)), torch.stack([x.histc(steps, -half, 1 + half) for x in shares])


def look_up(values: Tensor, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """f(x), for x of any shape, from f's values (n,) at equal steps from low to high: the value at the nearest step."""
    index = ((x - low) * ((len(values) - 1) / max(high - low, 1e-6))).clamp(0, len(values) - 1).round().int()
    return values.index_select(0, index.flatten()).view_as(x)


def by_table(curve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """curve(x) at the nearest of 2**16 steps of [0, 1], in a third of the time. curve: a module-level function: its table
    is cached. x: float32, on the CPU. For Lab's curves, L is exact to 0.02, a and b to 0.1."""
    return look_up(_table(curve), x)


@cache
def _table(curve: Callable[[Tensor], Tensor]) -> Tensor:
    return curve(torch.linspace(0, 1, 2**16))
