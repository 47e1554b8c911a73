"""Polygon parts, of which the objects of a scene are made.

A pose is a list of parts `(role, polygon)` drawn in order, in a unit box: [-1, 1] on both axes, x to the right, y DOWN.
Roles index an object's colours: BODY and ACCENT are its two colours, DARK and LIGHT small details.
"""

from collections.abc import Sequence

import numpy as np

BODY, ACCENT, DARK, LIGHT = 1, 2, 3, 4
Part = tuple[int, np.ndarray]
Pose = tuple[Part, ...]


def poly(role: int, *points: Sequence[float]) -> Part:
    return role, np.array(points, np.float32)


def rect(role: int, left: float, top: float, right: float, bottom: float) -> Part:
    return poly(role, (left, top), (right, top), (right, bottom), (left, bottom))


def oval(
    role: int, x: float, y: float, rx: float, ry: float, *, start: float = 0, stop: float = 360, points: int = 18
) -> Part:
    """An ellipse, or the chord-closed piece of it between two angles in degrees (clockwise from the right)."""
    angles = np.deg2rad(np.linspace(start, stop, points, endpoint=stop - start < 360))
    return role, np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1).astype(np.float32)
