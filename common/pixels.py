"""Work on pixels in the loader. Imported where it is used, because torchvision's import takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional


def decode(content: bytes, mode: str) -> Tensor:
    """The pixels (3,H,W) of a PNG or JPEG, "RGB" or "UNCHANGED": a fifth (PNG) to a third (JPEG) faster than Pillow, and
    JPEGs that Pillow fills up with grey are refused. Raises RuntimeError for a damaged file."""
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=mode)


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Colour jitter of a float image (3,H,W) in [0,1]; draws and does what torchvision's ColorJitter does.

    Brightness, contrast and saturation are multiplied by factors within 1 +- strength, the hue is turned by up to 0.4 strength
    of a full turn, in random order. strength: in [0, 1]."""
    order, changes = torch.randperm(4, generator=generator), strength * (2 * torch.rand(4, generator=generator) - 1)
    kinds = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for k in order.tolist():
        change = changes[k].item()
        image = kinds[k](image, 1 + change) if k < 3 else in_strips(lambda x, turn=0.4 * change: turn_hue(x, turn), image)
    return image


def turn_hue(image: Tensor, turn: float) -> Tensor:
    """torchvision's adjust_hue in a third of its time: a float image (3,H,W) in [0,1] with `turn` (of a full turn) added to
    the hue of HSV."""
    (r, g, b), high = image, image.amax(dim=0)
    chroma = high - image.amin(dim=0)                            # V - min = V S
    hue = torch.where(high == r, g - b, torch.where(high == g, b - r + 2 * chroma, r - g + 4 * chroma))
    hue = hue / (6 * chroma).clamp(min=1e-9) + turn
    away = torch.stack([hue, hue - 1 / 3, hue - 2 / 3])          # from red, green, blue
    away = (away - away.round()).abs()                           # at most half a turn
    return high - chroma * (6 * away - 1).clamp(0, 1)


def in_strips(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """A function of single pixels (C,H,W) -> (C,H,W), on a CPU by 32 rows at a time: twice as fast, because what is between
    stays in its cache and needs no new pages of memory."""
    return torch.cat([function(strip) for strip in image.split(32 if image.is_cpu else len(image[0]), dim=1)], dim=1)


def sample(image: Tensor, most: int = 2**18) -> Tensor:
    """At most `most` pixels of an image (3,H,W), on a regular grid: (3,h,w)."""
    every = 1
    while -(-image.shape[1] // every) * -(-image.shape[2] // every) > most:
        every += 1
    return image[:, ::every, ::every].contiguous()


def histograms(image: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """For each channel of an image (C,H,W) equal steps between its extremes (C, steps), and how many pixels are nearest to
    each (C, steps) float."""
    low, high = (end(image.flatten(1), dim=1, keepdim=True) for end in (torch.amin, torch.amax))
    shares, half = (image.flatten(1) - low) / (high - low).clamp(min=1e-6), 0.5 / (steps - 1)
    return torch.lerp(low, high, torch.linspace(0, 1, steps)), torch.stack([x.histc(steps, -half, 1 + half) for x in shares])


def look_up(values: Tensor, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """A function of x, of any shape, by its values (n,) at equal steps from low to high: that of the nearest step."""
    index = ((x - low) * ((len(values) - 1) / max(high - low, 1e-6))).clamp(0, len(values) - 1).round().int()
    return values.index_select(0, index.flatten()).view_as(x)


def by_table(curve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """curve(x), a function of a module, at the nearest of 2**16 steps of [0, 1] in a third of its time. x: float32, on the
    CPU. Of Lab's curves it costs 0.02 of L and 0.1 of a and b."""
    return look_up(_table(curve), x)


@cache
def _table(curve: Callable[[Tensor], Tensor]) -> Tensor:
    return curve(torch.linspace(0, 1, 2**16))
