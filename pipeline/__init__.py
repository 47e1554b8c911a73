"""Tessera: text-supervised open-vocabulary semantic segmentation from cached tensors."""

import ctypes
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


def _settle() -> None:
    """Two settings of this process that decide no number, for torch on a CPU; figures of two cores.

    OpenMP's threads, torch's among them, spin while they wait for one another and so keep loader threads off the cores:
    the small CLIP trained at 71 images/s spinning, at 161 sleeping. And glibc returns every large freed tensor to the
    system, which must clear its pages again for the next one: of the small DINO's forward pass a third. Here freed
    memory stays with the process. Other C libraries keep what they do.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is first imported
    if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


_settle()
