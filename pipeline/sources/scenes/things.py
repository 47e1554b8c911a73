"""Poses of what is made: car, bus, boat, house, ball, kite, cup, umbrella."""

from pipeline.sources.scenes.shapes import ACCENT, BODY, DARK, LIGHT, Pose, oval, poly, rect


def _wheels(*centres: float, radius: float = 0.22, y: float = 0.56) -> Pose:
    rims = [oval(DARK, x, y, radius, radius) for x in centres]
    return (*rims, *(oval(LIGHT, x, y, radius * 0.42, radius * 0.42, points=10) for x in centres))


def car() -> tuple[Pose, ...]:
    saloon = (
        poly(
            BODY,
            (-0.98, 0.5),
            (-0.96, 0.08),
            (-0.6, -0.02),
            (-0.36, -0.48),
            (0.34, -0.48),
            (0.6, 0.0),
            (0.96, 0.1),
            (0.98, 0.5),
        ),
        poly(ACCENT, (-0.44, 0.0), (-0.28, -0.36), (-0.04, -0.36), (-0.04, 0.0)),
        poly(ACCENT, (0.06, 0.0), (0.06, -0.36), (0.28, -0.36), (0.46, 0.0)),
        oval(LIGHT, 0.9, 0.22, 0.08, 0.07, points=8),
        *_wheels(-0.54, 0.54),
    )
    hatchback = (
        poly(BODY, (-0.9, 0.5), (-0.9, -0.2), (-0.7, -0.6), (0.2, -0.6), (0.52, -0.06), (0.9, 0.04), (0.94, 0.5)),
        poly(ACCENT, (-0.72, -0.06), (-0.6, -0.46), (-0.32, -0.46), (-0.32, -0.06)),
        poly(ACCENT, (-0.2, -0.06), (-0.2, -0.46), (0.14, -0.46), (0.38, -0.06)),
        oval(LIGHT, 0.86, 0.2, 0.07, 0.08, points=8),
        *_wheels(-0.5, 0.5, radius=0.24),
    )
    return saloon, hatchback


def bus() -> tuple[Pose, ...]:
    single = (
        poly(BODY, (-0.96, 0.52), (-0.98, -0.52), (-0.9, -0.6), (0.82, -0.6), (0.94, -0.44), (0.98, 0.52)),
        *(rect(ACCENT, x, -0.42, x + 0.3, -0.02) for x in (-0.86, -0.48, -0.1, 0.28)),
        poly(ACCENT, (0.68, -0.42), (0.86, -0.42), (0.92, 0.04), (0.68, 0.04)),
        rect(ACCENT, -0.96, 0.18, 0.66, 0.26),
        *_wheels(-0.55, 0.55, radius=0.2),
    )
    double = (
        poly(BODY, (-0.76, 0.62), (-0.78, -0.9), (-0.7, -0.97), (0.66, -0.97), (0.76, -0.88), (0.8, 0.62)),
        *(rect(ACCENT, x, -0.8, x + 0.3, -0.46) for x in (-0.68, -0.3, 0.08)),
        *(rect(ACCENT, x, -0.18, x + 0.3, 0.2) for x in (-0.68, -0.3, 0.08)),
        rect(ACCENT, 0.48, -0.8, 0.7, -0.46),
        rect(ACCENT, 0.48, -0.18, 0.74, 0.24),
        *_wheels(-0.42, 0.46, radius=0.2, y=0.68),
    )
    return single, double


def boat() -> tuple[Pose, ...]:
    yacht = (
        rect(DARK, -0.06, -0.98, 0.02, 0.4),
        poly(ACCENT, (0.06, -0.92), (0.78, 0.26), (0.06, 0.26)),
        poly(ACCENT, (-0.1, -0.7), (-0.1, 0.26), (-0.66, 0.26)),
        poly(BODY, (-0.96, 0.38), (0.98, 0.38), (0.62, 0.9), (-0.66, 0.9)),
        poly(ACCENT, (-0.92, 0.46), (0.93, 0.46), (0.87, 0.56), (-0.84, 0.56)),
    )
    trawler = (
        rect(DARK, -0.5, -0.9, -0.42, 0.2),
        rect(ACCENT, -0.3, -0.4, 0.36, 0.24),
        rect(BODY, -0.38, -0.52, 0.44, -0.36),
        rect(DARK, -0.18, -0.22, 0.0, 0.0),
        rect(DARK, 0.1, -0.22, 0.28, 0.0),
        poly(BODY, (-0.98, 0.1), (-0.7, 0.22), (0.66, 0.22), (1.0, -0.06), (0.68, 0.84), (-0.76, 0.84)),
        poly(ACCENT, (-0.93, 0.34), (0.9, 0.3), (0.86, 0.42), (-0.9, 0.46)),
    )
    return yacht, trawler


def house() -> tuple[Pose, ...]:
    cottage = (
        rect(ACCENT, 0.36, -0.86, 0.58, -0.3),
        rect(BODY, -0.76, -0.16, 0.76, 0.94),
        poly(ACCENT, (-0.98, -0.12), (0.0, -0.98), (0.98, -0.12)),
        rect(ACCENT, -0.16, 0.36, 0.2, 0.94),
        rect(LIGHT, -0.58, 0.12, -0.3, 0.44),
        rect(LIGHT, 0.34, 0.12, 0.62, 0.44),
    )
    long = (
        rect(ACCENT, -0.62, -0.78, -0.42, -0.3),
        rect(BODY, -0.94, -0.02, 0.94, 0.82),
        poly(ACCENT, (-0.99, 0.02), (-0.72, -0.58), (0.72, -0.58), (0.99, 0.02)),
        rect(ACCENT, 0.46, 0.3, 0.74, 0.82),
        rect(LIGHT, -0.76, 0.24, -0.46, 0.52),
        rect(LIGHT, -0.2, 0.24, 0.12, 0.52),
    )
    return cottage, long


def ball() -> tuple[Pose, ...]:
    beach = (
        oval(BODY, 0.0, 0.0, 0.96, 0.96, points=28),
        *(
            poly(ACCENT, (0.0, 0.0), *oval(0, 0.0, 0.0, 0.96, 0.96, start=a, stop=a + 60, points=7)[1].tolist())
            for a in (20, 140, 260)
        ),
        oval(LIGHT, 0.0, 0.0, 0.16, 0.16, points=10),
    )
    banded = (
        oval(BODY, 0.0, 0.0, 0.96, 0.96, points=28),
        poly(
            ACCENT,
            *oval(0, 0.0, 0.0, 0.96, 0.96, start=-22, stop=22, points=7)[1].tolist(),
            *oval(0, 0.0, 0.0, 0.96, 0.96, start=158, stop=202, points=7)[1].tolist(),
        ),
        oval(LIGHT, -0.3, -0.58, 0.2, 0.13, points=10),
    )
    return beach, banded


def kite() -> tuple[Pose, ...]:
    tail = (
        poly(DARK, (-0.03, 0.4), (0.03, 0.4), (0.2, 0.72), (0.04, 0.98), (-0.02, 0.96), (0.13, 0.72)),
        poly(ACCENT, (0.02, 0.62), (0.36, 0.58), (0.3, 0.8), (0.04, 0.74)),
        poly(ACCENT, (-0.16, 0.84), (0.18, 0.82), (0.14, 0.99), (-0.14, 0.99)),
    )
    diamond = (
        *tail,
        poly(BODY, (0.0, -0.99), (0.86, -0.26), (0.0, 0.62), (-0.86, -0.26)),
        poly(ACCENT, (0.0, -0.99), (0.86, -0.26), (0.0, -0.26)),
        poly(ACCENT, (0.0, 0.62), (-0.86, -0.26), (0.0, -0.26)),
    )
    delta = (
        *tail,
        poly(BODY, (0.0, -0.86), (0.98, 0.3), (0.0, 0.46), (-0.98, 0.3)),
        poly(ACCENT, (0.0, -0.86), (0.5, 0.38), (0.0, 0.46), (-0.5, 0.38)),
        poly(BODY, (0.0, -0.5), (0.18, 0.42), (-0.18, 0.42)),
    )
    return diamond, delta


def cup() -> tuple[Pose, ...]:
    mug = (
        oval(BODY, 0.58, 0.02, 0.4, 0.44),
        oval(LIGHT, 0.58, 0.02, 0.22, 0.26),
        poly(BODY, (-0.8, -0.66), (0.6, -0.66), (0.54, 0.86), (-0.72, 0.86)),
        oval(ACCENT, -0.1, -0.66, 0.7, 0.2),
        oval(DARK, -0.1, -0.64, 0.54, 0.12),
        poly(ACCENT, (-0.77, -0.02), (0.57, -0.02), (0.56, 0.34), (-0.75, 0.34)),
    )
    teacup = (
        oval(ACCENT, 0.0, 0.78, 0.96, 0.18),
        oval(BODY, 0.72, 0.08, 0.26, 0.28),
        oval(LIGHT, 0.72, 0.08, 0.13, 0.15),
        oval(BODY, -0.06, -0.36, 0.78, 1.1, start=0, stop=180),
        oval(ACCENT, -0.06, -0.36, 0.78, 0.2),
        oval(DARK, -0.06, -0.34, 0.62, 0.13),
    )
    return mug, teacup


def umbrella() -> tuple[Pose, ...]:
    handle = (
        rect(DARK, -0.05, -0.2, 0.05, 0.8),
        poly(DARK, (0.05, 0.74), (0.05, 0.96), (-0.3, 0.96), (-0.3, 0.72), (-0.2, 0.72), (-0.2, 0.86), (-0.05, 0.86)),
    )
    dome = (
        *handle,
        oval(BODY, 0.0, 0.08, 0.98, 1.0, start=180, stop=360, points=20),
        poly(ACCENT, (0.0, -0.92), (0.34, 0.08), (-0.34, 0.08)),
        poly(ACCENT, (0.0, -0.92), (0.98, 0.08), (0.7, 0.08)),
        poly(ACCENT, (0.0, -0.92), (-0.98, 0.08), (-0.7, 0.08)),
    )
    parasol = (
        *handle,
        poly(
            BODY,
            (0.0, -0.95),
            (0.55, -0.5),
            (0.98, 0.14),
            (0.64, 0.0),
            (0.32, 0.16),
            (0.0, 0.0),
            (-0.32, 0.16),
            (-0.64, 0.0),
            (-0.98, 0.14),
            (-0.55, -0.5),
        ),
        poly(ACCENT, (0.0, -0.95), (0.32, 0.16), (0.0, 0.0), (-0.32, 0.16)),
    )
    return dome, parasol
