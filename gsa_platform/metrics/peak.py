"""Peak matrix-multiply rates, and model FLOPs utilisation (MFU), the share of them in use."""

import re
import time

import torch

# Dense bf16 FLOP/s with fp32 accumulation from the vendors' data sheets. Sheets that print the
# figure with 2:4 sparsity are halved here.
DENSE_BF16_FLOPS: dict[str, float] = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
    "MI300X": 1307e12,
}


def model_flops_utilisation(
    tokens_per_s: float, flops_per_token: float, peak_flops: float | None, devices: int = 1
) -> float | None:
    """MFU in [0, 1]: useful FLOP/s over peak FLOP/s of all devices; None if the peak is unknown.

    flops_per_token: training FLOPs (forward and backward) without recomputation.
    """
    if peak_flops is None:
        return None
    return tokens_per_s * flops_per_token / (peak_flops * devices)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its `torch.cuda.get_device_name`; None if unknown.

    Whole words are matched, longest entry first ("H100 PCIe" before "H100"; "A10" is not "A100").
    Laptop parts and MIG slices carry the name of a faster device and count as unknown.
    """
    if re.search(r"\b(laptop|mobile|max-q|mig)\b", device_name, re.IGNORECASE):
        return None
    for key in sorted(DENSE_BF16_FLOPS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(key)}\b", device_name, re.IGNORECASE):
            return DENSE_BF16_FLOPS[key]
    return None


def measured_matmul_flops(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    seconds: float = 0.2,
) -> float:
    """Best FLOP/s of a square matrix product on `device`, a stand-in peak for CPUs.

    The best of the repetitions within `seconds` (three at least) counts: other work on the
    machine only makes a repetition slower.
    """
    device = torch.device(device)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    end = time.perf_counter() + seconds
    runs = 0
    while runs < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        if runs > 0:  # the first product pays for start-up
            best = min(best, elapsed)
        runs += 1
    return 2 * size**3 / best
