"""Poses of what is alive: dog, cat, bird, flower."""

from __future__ import annotations

import numpy as np

from pipeline.sources.scenes.shapes import ACCENT, BODY, DARK, LIGHT, Pose, oval, poly, rect


def dog() -> tuple[Pose, ...]:
    standing = (
        poly(BODY, (-0.62, -0.05), (-0.98, -0.62), (-0.84, -0.66), (-0.48, -0.2)),
        rect(BODY, -0.66, 0.2, -0.42, 0.95),
        rect(BODY, -0.36, 0.2, -0.14, 0.95),
        rect(BODY, 0.2, 0.2, 0.42, 0.95),
        rect(BODY, 0.48, 0.15, 0.7, 0.95),
        oval(BODY, 0.0, 0.14, 0.72, 0.4),
        oval(ACCENT, 0.05, 0.38, 0.48, 0.17),
        oval(BODY, 0.6, -0.38, 0.36, 0.36),
        oval(ACCENT, 0.84, -0.24, 0.2, 0.16),
        oval(DARK, 0.98, -0.3, 0.07, 0.07, points=8),
        oval(DARK, 0.66, -0.46, 0.06, 0.07, points=8),
        oval(ACCENT, 0.36, -0.32, 0.15, 0.34),
    )
    sitting = (
        poly(BODY, (-0.5, 0.9), (-0.98, 0.62), (-0.9, 0.45), (-0.4, 0.62)),
        poly(BODY, (-0.62, 0.95), (-0.55, 0.2), (-0.12, -0.3), (0.4, -0.1), (0.42, 0.95)),
        oval(BODY, -0.3, 0.68, 0.42, 0.3),
        poly(ACCENT, (0.1, -0.1), (0.42, -0.1), (0.42, 0.6), (0.2, 0.5)),
        rect(BODY, 0.2, 0.4, 0.42, 0.95),
        oval(ACCENT, 0.32, 0.92, 0.22, 0.08),
        oval(BODY, 0.16, -0.48, 0.42, 0.4),
        oval(ACCENT, 0.46, -0.34, 0.24, 0.19),
        oval(DARK, 0.64, -0.42, 0.08, 0.07, points=8),
        oval(DARK, 0.24, -0.58, 0.06, 0.07, points=8),
        oval(ACCENT, -0.16, -0.42, 0.17, 0.4),
    )
    return standing, sitting


def cat() -> tuple[Pose, ...]:
    head = (
        poly(BODY, (-0.42, -0.45), (-0.44, -0.98), (-0.02, -0.66)),
        poly(BODY, (0.42, -0.45), (0.44, -0.98), (0.02, -0.66)),
        poly(ACCENT, (-0.33, -0.6), (-0.36, -0.84), (-0.17, -0.68)),
        poly(ACCENT, (0.33, -0.6), (0.36, -0.84), (0.17, -0.68)),
        oval(BODY, 0.0, -0.38, 0.45, 0.36),
        oval(LIGHT, -0.19, -0.42, 0.11, 0.1, points=10),
        oval(LIGHT, 0.19, -0.42, 0.11, 0.1, points=10),
        oval(DARK, -0.18, -0.42, 0.045, 0.09, points=8),
        oval(DARK, 0.18, -0.42, 0.045, 0.09, points=8),
        oval(ACCENT, 0.0, -0.2, 0.19, 0.11, points=10),
    )
    sitting = (
        poly(BODY, (0.4, 0.9), (0.98, 0.72), (0.9, 0.05), (0.72, 0.05), (0.74, 0.56), (0.4, 0.66)),
        poly(BODY, (-0.56, 0.95), (-0.5, 0.3), (-0.24, -0.18), (0.24, -0.18), (0.5, 0.3), (0.56, 0.95)),
        oval(ACCENT, 0.0, 0.24, 0.24, 0.36),
        oval(ACCENT, -0.24, 0.9, 0.17, 0.08, points=10),
        oval(ACCENT, 0.24, 0.9, 0.17, 0.08, points=10),
        *head,
    )
    shift = np.array([0.5, 0.22], np.float32)
    walking = (
        poly(BODY, (-0.6, 0.1), (-0.98, -0.5), (-0.86, -0.78), (-0.72, -0.74), (-0.8, -0.46), (-0.44, -0.02)),
        rect(BODY, -0.66, 0.3, -0.48, 0.95),
        rect(BODY, -0.4, 0.3, -0.24, 0.95),
        rect(BODY, 0.14, 0.3, 0.3, 0.95),
        rect(BODY, 0.38, 0.3, 0.54, 0.95),
        oval(BODY, -0.08, 0.24, 0.66, 0.34),
        oval(ACCENT, -0.05, 0.46, 0.4, 0.12),
        *((role, points * np.float32(0.85) + shift) for role, points in head),
    )
    return sitting, walking


def bird() -> tuple[Pose, ...]:
    perched = (
        poly(BODY, (-0.45, 0.1), (-1.0, 0.42), (-0.95, 0.66), (-0.3, 0.42)),
        rect(DARK, -0.08, 0.5, 0.0, 0.95),
        rect(DARK, 0.16, 0.5, 0.24, 0.95),
        oval(BODY, 0.02, 0.14, 0.6, 0.46),
        oval(ACCENT, 0.22, 0.3, 0.36, 0.28),
        oval(BODY, 0.46, -0.36, 0.36, 0.34),
        poly(ACCENT, (0.76, -0.48), (1.0, -0.3), (0.74, -0.22)),
        oval(LIGHT, 0.55, -0.42, 0.1, 0.1, points=10),
        oval(DARK, 0.57, -0.42, 0.05, 0.06, points=8),
        poly(BODY, (0.2, -0.12), (-0.2, 0.42), (-0.72, 0.36), (-0.36, -0.1)),
    )
    flying = (
        poly(BODY, (-0.2, 0.05), (-0.5, -0.95), (0.02, -0.72), (0.3, 0.0)),
        poly(BODY, (-0.4, 0.1), (-1.0, -0.05), (-0.98, 0.3), (-0.5, 0.32)),
        oval(BODY, 0.0, 0.16, 0.6, 0.28),
        oval(ACCENT, 0.08, 0.3, 0.42, 0.14),
        oval(BODY, 0.58, -0.04, 0.28, 0.25),
        poly(ACCENT, (0.8, -0.12), (1.0, 0.02), (0.8, 0.1)),
        oval(LIGHT, 0.64, -0.1, 0.08, 0.08, points=10),
        oval(DARK, 0.66, -0.1, 0.04, 0.05, points=8),
        poly(BODY, (-0.28, 0.12), (-0.42, 0.95), (-0.08, 0.86), (0.28, 0.16)),
    )
    return perched, flying


def flower() -> tuple[Pose, ...]:
    daisy = (
        poly(DARK, (-0.05, 0.1), (0.05, 0.1), (0.08, 0.98), (-0.04, 0.98)),
        poly(DARK, (0.04, 0.8), (0.5, 0.5), (0.62, 0.6), (0.3, 0.86)),
        *(
            oval(BODY, 0.44 * np.cos(a), -0.36 + 0.44 * np.sin(a), 0.29, 0.29, points=12)
            for a in np.deg2rad(np.arange(0, 360, 60))
        ),
        oval(ACCENT, 0.0, -0.36, 0.3, 0.3, points=14),
    )
    tulip = (
        poly(DARK, (-0.06, 0.1), (0.06, 0.1), (0.06, 0.98), (-0.06, 0.98)),
        poly(DARK, (0.0, 0.94), (-0.5, 0.3), (-0.36, 0.26), (0.04, 0.7)),
        poly(DARK, (0.0, 0.94), (0.52, 0.36), (0.4, 0.3), (0.0, 0.72)),
        poly(
            BODY,
            (-0.62, -0.86),
            (-0.28, -0.5),
            (0.0, -0.95),
            (0.28, -0.5),
            (0.62, -0.86),
            (0.58, -0.1),
            (0.26, 0.24),
            (-0.26, 0.24),
            (-0.58, -0.1),
        ),
        poly(ACCENT, (0.0, -0.62), (0.24, -0.2), (0.0, 0.16), (-0.24, -0.2)),
    )
    return daisy, tulip
