"""The device that computes: which one, in which precision, with how many loader processes, and how it is made fast."""
import ctypes
import os
import platform

import torch

from errors import InputError


def choose_device(name):
    """The torch device of auto, cpu, cuda, cuda:N or mps; InputError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, number = name.partition(":")
    if kind not in available or not (number == "" or number.isdecimal()):
        raise InputError(f"--device {name}: unknown; expected auto, cuda, cuda:N, mps or cpu")
    if not available[kind] or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise InputError(f"--device {name}: not there; this machine has {there}; pass --device auto")
    return torch.device(name)


def tune(device, deterministic=False):
    """Let CUDA try its convolutions for the fastest and round float32 to TF32, or let every operation repeat itself exactly.

    On the CPU, let the C library (glibc) keep what is freed for the next step: pages that go back to the system are cleared by it,
    one by one, when they are wanted again, which takes a fifth of a training step.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def autocast(device, amp=None):
    """Mixed precision context in `half_precision`; a no-op when off (None: on CUDA only)."""
    return torch.autocast(device.type, dtype=half_precision(device), enabled=device.type == "cuda" if amp is None else amp)


def half_precision(device):
    """bfloat16, or float16 on a CUDA device that has it not, or only emulates it."""
    lacks = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacks else torch.bfloat16


def choose_workers(num_workers, device):
    """Loader processes: as asked, or for -1 one less than the cores this process may use, at most 8; on the CPU none.

    There the model's own threads use all cores, and workers only fight with them.
    """
    if num_workers >= 0 or device.type == "cpu":
        return max(num_workers, 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 0))
