"""A training step: it does not wait for the device between two log lines.

That all batches of a run have one shape is in test_train.py.
"""
import contextlib

import pytest
import torch
from conftest import DEVICE, FAST
from torch.utils._python_dispatch import TorchDispatchMode

from train import create_trainer, parse_args, train_step

# What returns to Python only after the device has finished: numbers, and results whose shape
# depends on the data.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select",
           "_unique2", "unique_dim"}


class RefuseToWait(TorchDispatchMode):
    """Raise an error for each operation that makes the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def refuse_to_wait():
    """On CUDA by torch's own check, which also sees copies; elsewhere by `RefuseToWait`."""
    if DEVICE == "cpu":
        with RefuseToWait():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", [
    [],  # the default recipe
    ["--accumulation_steps", "2", "--criterion", "focal_f1", "--class_weights", "sqrt"],
    ["--ema_decay", "0", "--optimizer", "sgd", "--clip_grad", "0"],
])
def test_a_step_does_not_wait_for_the_device(flags):
    device = torch.device(DEVICE)
    args = parse_args([*FAST, *flags])[0]
    class_weight = None if args.class_weights == "none" else torch.ones(18)
    trainer = create_trainer(args, "none", class_weight, device)
    images = torch.randint(256, (16, *args.resize, 3), dtype=torch.uint8)
    targets = torch.eye(18)[torch.arange(16) % 18]
    if DEVICE == "cuda":  # as the loader does
        images, targets = images.pin_memory(), targets.pin_memory()
    batches = [(images, targets)] * args.accumulation_steps
    for step in range(1, 6):  # the first steps allocate memory and choose algorithms
        train_step(trainer, iter(batches), step, args.lr)
    with refuse_to_wait():
        losses = [train_step(trainer, iter(batches), step, args.lr) for step in range(6, 9)]
    assert torch.stack(losses).isfinite().all()
