"""What a GPU can do at most: peak rates from NVIDIA's data sheets, the yardstick of `perf/mfu`.

Model FLOPs utilization is defined in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the FLOPs that the
model needs, per second, as a share of the peak. We count what was really computed (torch.utils.flop_counter: matrix
products and convolutions, a multiplication and an addition each); what was skipped does not count, and the passes
that score samples do.
"""

import torch

from ast_dist.distributed import World

# TFLOP/s by the device's name as torch.cuda.get_device_name gives it: (FP32, TF32, BF16, FP16). Dense: data sheets
# since Ampere print twice that, with sparsity. Tensor cores with FP32 sums, as cuBLAS and cuDNN use them. None: the
# tensor cores do not know the format. Other boards of a name (A10G, H100 on GH200, MIG slices) have other rates, so
# names must be equal, not similar.
_Rates = tuple[float, float | None, float | None, float]
# images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
_V100_SXM2: _Rates = (15.7, None, None, 125.0)
_V100_PCIE: _Rates = (14.0, None, None, 112.0)
# nvidia.com, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf: the same for SXM and PCIe, 40 and 80 GB
_A100: _Rates = (19.5, 156.0, 312.0, 312.0)
# resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet, and the H100 white paper for dense figures
_H100_SXM: _Rates = (66.9, 494.7, 989.4, 989.4)
# nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446: compute as in H100
_H200_SXM = _H100_SXM
_HOPPER_NVL: _Rates = (60.0, 417.5, 835.5, 835.5)
_TFLOPS: dict[str, _Rates] = {
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": (16.4, None, None, 130.0),
    # nvidia.com, t4-tensor-core-datasheet-951643.pdf
    "Tesla T4": (8.1, None, None, 65.0),
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    # nvidia.com, a10-datasheet.pdf
    "A10": (31.2, 62.5, 125.0, 125.0),
    # nvidia.com, l4-datasheet.pdf: 120 and 242 with sparsity
    "L4": (30.3, 60.0, 121.0, 121.0),
    # nvidia.com, l40s-datasheet.pdf
    "L40S": (91.6, 183.0, 362.0, 362.0),
    # nvidia.com, nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf, appendix A; FP16 with FP16 sums would be 330.3
    "GeForce RTX 4090": (82.6, 82.6, 165.2, 165.2),
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": (51.2, 378.0, 756.0, 756.0),
    "H100 NVL": _HOPPER_NVL,
    "H200": _H200_SXM,
    "H200 NVL": _HOPPER_NVL,
}


def peak_flops_per_s(name: str, precision: str) -> float | None:
    """Peak rate of a device in a run's precision, FLOP/s; None where it is not known.

    name: as torch.cuda.get_device_name gives it. precision: of loop.precision, fp32, bf16 or fp16. In fp32, torch
    lets cuDNN compute convolutions in TF32 where the GPU has it.
    """
    rates = _TFLOPS.get(name.removeprefix("NVIDIA "))
    if rates is None:
        return None
    fp32, tf32, bf16, fp16 = rates
    tflops = {"fp32": tf32 or fp32, "bf16": bf16, "fp16": fp16}[precision]
    return None if tflops is None else 1e12 * tflops


def peak_of_world(world: World, precision: str) -> float | None:
    """The sum over all ranks, FLOP/s; None where one computes on a CPU or an unknown GPU. All ranks must call."""
    is_gpu = world.device.type == "cuda"
    own = peak_flops_per_s(torch.cuda.get_device_name(world.device), precision) if is_gpu else None
    peaks = world.gather(own)
    return None if None in peaks else float(sum(peaks))
