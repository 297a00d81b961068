"""A figure's colours for a light and a dark page, with enough contrast on both.

Source of contrast and its limits: WCAG 2.2, relative luminance and success criteria 1.4.3 and 1.4.11.
"""

from __future__ import annotations

import colorsys

LIGHT, DARK = "#ffffff", "#161b22"  # behind figures; report.css has the same
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0
DECORATION = 1.5  # what stands out less on white is meant to be faint, such as a grid
MOST = 13.0  # no more on dark: pure white glares


def contrast(a: str, b: str) -> float:
    """From 1 (the same) to 21 (black and white). Colours are "#rrggbb"."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def on_light(color: str, is_text: bool) -> str:
    """The colour, darker if it would be hard to see on white."""
    least = TEXT_CONTRAST if is_text else MARK_CONTRAST
    return color if contrast(color, LIGHT) < DECORATION else _shade(color, LIGHT, least, -1)


def on_dark(color: str, is_text: bool) -> str:
    """The colour, so light that it stands out from dark as much as it did from white."""
    least = TEXT_CONTRAST if is_text else MARK_CONTRAST
    wanted = contrast(color, LIGHT)
    if wanted < DECORATION:
        return _shade(DARK, DARK, wanted, 1)
    return _shade(color, DARK, min(max(wanted, least), MOST), 1)


def _shade(color: str, background: str, least: float, direction: int) -> str:
    """The colour with its lightness moved up (1) or down (-1) until it has the contrast."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*_channels(color))
    while contrast(color, background) < least and 0 < lightness + direction * 0.01 < 1:
        lightness += direction * 0.01
        red, green, blue = (round(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, saturation))
        color = f"#{red:02x}{green:02x}{blue:02x}"
    return color


def _channels(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _luminance(color: str) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
