"""Colours of the page: viridis in steps of a hundredth for cells, Okabe and Ito's for curves, as in the pictures."""

from __future__ import annotations

from dcl_lightning.metrics.drawing import OKABE_ITO

__all__ = ["SHADES", "STEPS", "css", "ink_on", "shade"]

SHADES = 100  # cells have the classes c0 to c100
STEPS = 20  # curves without a colour of their own have the classes g0 to g20
# matplotlib's viridis at twentieths, so that the page needs no matplotlib.
_VIRIDIS = (
    "440154", "471365", "482475", "463480", "414487", "3b528b", "355f8d", "2f6c8e", "2a788e", "25848e",
    "21918c", "1e9c89", "22a884", "2fb47c", "44bf70", "5ec962", "7ad151", "9bd93c", "bddf26", "dfe318",
    "fde725",
)  # fmt: skip
# Of viridis, what is told apart from a white and from a black page.
_ON_WHITE, _ON_BLACK = (0.0, 0.85), (0.3, 1.0)
# On a black page, in place of the colours that are too dark for it.
_LIGHTER = {"#0072B2": "#3C9BE0", "#000000": "#FFFFFF"}


def shade(fraction: float) -> str:
    """Return the colour of viridis at a fraction, as ``#rrggbb``.

    >>> shade(0.5)
    '#21918c'

    Args:
        fraction: from 0 to 1; others are as the nearest of these.
    """
    place = min(max(fraction, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(place), len(_VIRIDIS) - 2)
    pairs = zip(_channels(_VIRIDIS[low]), _channels(_VIRIDIS[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (place - low) * (b - a)):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Return black or white, whichever has the higher contrast with a colour (WCAG 2.1, relative luminance).

    Args:
        colour: ``#rrggbb``.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(_part, _channels(colour[1:]))]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (light + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def css() -> str:
    """Return the classes of cells and of curves, and the map as a bar, for a light page and for a dark one."""
    cells = [(n, shade(n / SHADES)) for n in range(SHADES + 1)]
    lines = [f".c{n}{{background:{colour};color:{ink_on(colour)}}}" for n, colour in cells]
    lines += [".map{background:linear-gradient(90deg," + ",".join(f"#{colour}" for colour in _VIRIDIS) + ")}"]
    lines += _curves(_ON_WHITE, {})
    return "\n".join([*lines, "@media (prefers-color-scheme:dark){", *_curves(_ON_BLACK, _LIGHTER), "}"])


def _curves(part: tuple[float, float], instead: dict[str, str]) -> list[str]:
    low, high = part
    shades = [shade(low + n / STEPS * (high - low)) for n in range(STEPS + 1)]
    lines = [f".k{n}{{--s:{instead.get(colour, colour)}}}" for n, colour in enumerate(OKABE_ITO)]
    lines += [f".g{n}{{--s:{colour}}}" for n, colour in enumerate(shades)]
    return [*lines, ".steps{background:linear-gradient(90deg," + ",".join(shades) + ")}"]


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (0, 2, 4)]


def _part(channel: int) -> float:
    return channel / 255
