"""What a device can do at most, measured: the rate of a large matrix product."""

import time

import torch

SIDES = {"cpu": 2048, "cuda": 8192}
ROUNDS = 5


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random numbers: the best of some rounds."""
    side = SIDES[torch.device(device).type]
    square = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(ROUNDS):
        wait_for(device)
        started = time.perf_counter()
        torch.mm(square, square)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """For the head of a table."""
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else torch.cuda.get_device_name()
