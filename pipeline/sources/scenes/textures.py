"""Tileable brightness textures, drawn once and cropped for every scene.

A tile is float32 [TILE, TILE] of factors around 1; multiplying a colour by it gives the surface. Tiles are periodic,
and twice their side is stored, so that any crop up to TILE px is one slice.
"""

from functools import cache

import cv2
import numpy as np
from jaxtyping import Float

TILE = 256


def _smooth_noise(sigma: float, seed: int, stretch: float = 1.0) -> np.ndarray:
    """Periodic noise of mean 0 and deviation 1; `stretch` > 1 makes it longer along x."""
    noise = np.random.default_rng(seed).standard_normal((TILE, TILE)).astype(np.float32)
    noise = cv2.GaussianBlur(np.tile(noise, (3, 3)), (0, 0), sigmaX=sigma * stretch, sigmaY=sigma)
    noise = noise[TILE : 2 * TILE, TILE : 2 * TILE]
    return (noise - noise.mean()) / noise.std()


def _grid() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    return rows, columns


def _spots() -> np.ndarray:
    return np.where(_smooth_noise(4.0, 1) > 0.9, 0.6, 1.02)


def _stripes() -> np.ndarray:
    rows, columns = _grid()
    wave = np.sin(2 * np.pi * (columns + 3 * np.sin(2 * np.pi * rows / 32)) / 8)
    return np.where(wave > 0.35, 1.7, 0.95)


def _scales() -> np.ndarray:
    rows, columns = _grid()
    shift = (rows // 6 % 2) * 4
    return 0.82 + 0.3 * np.abs(np.sin(np.pi * (columns + shift) / 8)) * (rows % 6) / 5


def _bands() -> np.ndarray:
    rows, _ = _grid()
    return np.where(rows % 16 < 3, 0.78, 1.02)


def _planks() -> np.ndarray:
    rows, columns = _grid()
    seam = (rows % 8 < 1) | ((columns + rows // 8 % 2 * 16) % 32 < 1)
    return np.where(seam, 0.7, 1.08)


def _bricks() -> np.ndarray:
    rows, columns = _grid()
    seam = (rows % 8 < 2) | ((columns + rows // 8 % 2 * 8) % 16 < 2)
    return np.where(seam, 0.76, 1.02)


def _checks() -> np.ndarray:
    rows, columns = _grid()
    return np.where((rows // 8 + columns // 8) % 2 < 1, 0.84, 1.06)


def _dots() -> np.ndarray:
    rows, columns = _grid()
    away = ((rows + 0.5) % 16 - 8) ** 2 + ((columns + rows // 16 % 2 * 8 + 0.5) % 16 - 8) ** 2
    return np.where(away < 12, 1.4, 0.97)


def _blades() -> np.ndarray:
    return 1 + 0.1 * np.rot90(_smooth_noise(0.8, 2, stretch=4)) + 0.05 * _smooth_noise(12, 3)


def _waves() -> np.ndarray:
    rows, columns = _grid()
    crest = np.sin(2 * np.pi * (rows + 4 * np.sin(2 * np.pi * columns / 64)) / 16)
    return 1 + 0.08 * crest + 0.09 * np.maximum(crest, 0.7) * (_smooth_noise(2, 4, stretch=3) > 0.7)


_TILES = {
    "plain": lambda: np.ones((TILE, TILE)),
    "gloss": lambda: 1 + 0.06 * _smooth_noise(10, 5),
    "petals": lambda: 1 + 0.08 * np.rot90(_smooth_noise(1.5, 6, stretch=3)),
    "clouds": lambda: 1 + 0.05 * _smooth_noise(12, 7, stretch=2) + 0.02 * _smooth_noise(3, 8),
    "grains": lambda: 1 + 0.06 * _smooth_noise(0.7, 9) + 0.04 * _smooth_noise(8, 10),
    "spots": _spots,
    "stripes": _stripes,
    "scales": _scales,
    "bands": _bands,
    "planks": _planks,
    "bricks": _bricks,
    "checks": _checks,
    "dots": _dots,
    "blades": _blades,
    "waves": _waves,
}


@cache
def tile(name: str) -> Float[np.ndarray, "twice_tile twice_tile"]:
    """The texture of that name, repeated once along each axis."""
    return np.tile(np.asarray(_TILES[name](), np.float32), (2, 2))


@cache
def grain() -> Float[np.ndarray, "twice_tile twice_tile 3"]:
    """Sensor noise of deviation 1, correlated a little between the colours."""
    noise = np.random.default_rng(11).standard_normal((TILE, TILE, 4)).astype(np.float32)
    return np.tile(0.8 * noise[:, :, :3] + 0.6 * noise[:, :, 3:], (2, 2, 1))


def crop(texture: np.ndarray, height: int, width: int, corner: tuple[int, int]) -> np.ndarray:
    """A view of `height` x `width` px; `corner` (row, column) lies in [0, TILE)."""
    return texture[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
