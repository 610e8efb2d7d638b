"""The device: which one, its precision, its settings, and the number of loader processes."""
import ctypes
import os
import platform
import warnings

import torch
from joblib import cpu_count

from core import distributed
from core.errors import InputError


def choose_device(name):
    """Return the torch device for auto, cpu, cuda, cuda:N or mps.

    Raises:
        InputError: if the name is unknown or the device is not available.
    """
    # In order of preference.
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in available.items() if is_there)
    kind, _, number = name.partition(":")
    if kind not in available or not (number == "" or number.isdecimal()):
        raise InputError(f"--device {name}: unknown; expected auto, cuda, cuda:N, mps or cpu")
    too_high = kind == "cuda" and int(number or 0) >= torch.cuda.device_count()
    if not available[kind] or too_high:
        found = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise InputError(f"--device {name}: not available; this machine has {found}; pass "
                         f"--device auto")
    return torch.device(name)


def configure_backend(device, deterministic=False):
    """Choose the fastest settings, or on request those that give the same bits every time."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep freed memory for the next step. By default glibc returns large blocks to the
        # system, which clears every page again: that took a fifth of a training step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if device.type == "cuda":
        # --deterministic needs it, and cuBLAS reads it once, in the first run of a process.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic:
        torch.use_deterministic_algorithms(True)
    elif device.type == "cuda":
        # cudnn.benchmark stays off: it tries algorithms for every layer and shape, which took
        # longer than the first steps, and whether a long run regains that is not measured.
        with warnings.catch_warnings():  # torch 2.9 advises other calls, which 2.8 does not have
            warnings.simplefilter("ignore")
            torch.set_float32_matmul_precision("high")  # TF32


def to_device(tensor, device):
    """Copy a tensor to the device; to CUDA without waiting, since loaders pin its memory."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def autocast(device, amp=None):
    """Return the mixed-precision context; `amp` None means on CUDA only."""
    enabled = device.type == "cuda" if amp is None else amp
    return torch.autocast(device.type, dtype=half_precision(device), enabled=enabled)


def half_precision(device):
    """Return bfloat16, or float16 on a CUDA device without native bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def choose_workers(num_workers, device):
    """Return the number of loader processes; -1 chooses it.

    On a GPU it is the number of CPU cores per process minus one, at most 8. Only cores that this
    process may use count: affinity and a container's limit are respected. On the CPU it is 0:
    the model's threads use all cores, and loader processes would slow them down.
    """
    if num_workers >= 0 or device.type == "cpu":
        return max(num_workers, 0)
    return min(8, max(cpu_count() // distributed.local_world_size() - 1, 0))
