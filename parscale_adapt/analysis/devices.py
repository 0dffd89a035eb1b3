"""Peak arithmetic, memory bandwidth and memory of accelerators, from their makers' public data sheets (dense rates)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: how commands call it.
        half_tflops: peak dense 16-bit matrix arithmetic with 32-bit accumulation, in 10**12 operations per second.
        float32_tflops: peak 32-bit arithmetic outside the matrix units, in 10**12 operations per second.
        bandwidth: memory bandwidth, in 10**9 bytes per second.
        memory: memory, in 10**9 bytes.
    """

    name: str
    half_tflops: float
    float32_tflops: float
    bandwidth: float
    memory: float


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 data sheet (SXM): BF16 312 TFLOPS, FP32 19.5, 1,555 and 2,039 GB/s.
        Device("a100-40gb", 312, 19.5, 1555, 40),
        Device("a100-80gb", 312, 19.5, 2039, 80),
        # NVIDIA H100 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half of it dense; FP32 67; 3.35 TB/s.
        Device("h100", 989.5, 67, 3350, 80),
        # NVIDIA H200 data sheet (SXM): arithmetic of the H100, 141 GB at 4.8 TB/s.
        Device("h200", 989.5, 67, 4800, 141),
        # NVIDIA HGX B200 specification, one GPU of eight: 4.5 PFLOPS with sparsity; FP32 75; 180 GB at 7.7 TB/s.
        Device("b200", 2250, 75, 7700, 180),
        # NVIDIA L40S data sheet: BF16 362.05 TFLOPS dense, FP32 91.6, 864 GB/s.
        Device("l40s", 362.05, 91.6, 864, 48),
        # NVIDIA L4 data sheet: BF16 242 TFLOPS with sparsity, FP32 30.3, 300 GB/s.
        Device("l4", 121, 30.3, 300, 24),
        # NVIDIA Ada architecture white paper, RTX 4090: 165.2 TFLOPS dense, FP32 82.6, 1,008 GB/s.
        Device("rtx4090", 165.2, 82.6, 1008, 24),
        # NVIDIA GA102 architecture white paper, RTX 3090: 71 TFLOPS dense, FP32 35.6, 936 GB/s.
        Device("rtx3090", 71, 35.6, 936, 24),
        # AMD Instinct MI300X data sheet: BF16 1,307.4 TFLOPS dense, FP32 163.4, 5.3 TB/s.
        Device("mi300x", 1307.4, 163.4, 5300, 192),
    )
}


def find_device(name: str) -> Device:
    """The device of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in DEVICES:
        raise ValueError(f"no device is called `{name}`: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
