"""Several processes, one a GPU, by torchrun: who this one is, and what all of them agree on. In one process these are no-ops.

    torchrun --nproc_per_node=8 train.py --batch_size 128 ...
    torchrun --nproc_per_node=8 inference.py --model_dir=./results
"""
import contextlib
import itertools
import os
import signal

import torch
import torch.distributed as dist

from errors import InputError


def join(device):
    """Join torchrun's processes, if it started this one; returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # A restarted worker must not find the addresses of those before it in torchrun's store.
        store, number, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=count)
    return device


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process; 0 writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_restart():
    """Whether torchrun --max-restarts has begun this process anew, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def main_first():
    """Process 0 does what is inside before the others do."""
    if dist.is_initialized() and rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not rank():
        dist.barrier()


def gather(value):
    """The picklable values of all processes, in every process."""
    values = [value]
    if dist.is_initialized():
        values *= world_size()
        dist.all_gather_object(values, value)
    return values


def own_batches(count, batch_size):
    """Index lists of this process's batches of 0 .. count - 1: every `world_size`-th of those that one process would have."""
    return [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)][rank()::world_size()]


def in_order(batches):
    """The batches of all processes, in the order of one process, from each one's `own_batches`."""
    return [batch for row in itertools.zip_longest(*gather(batches)) for batch in row if batch is not None]


def mean(tensor):
    """The mean over the processes, in the tensor's own place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def maximum(number):
    """The largest int of any process."""
    return max(gather(number))


def without_sync(model, is_last):
    """Gradients are exchanged only with the last batch of a step."""
    return model.no_sync() if dist.is_initialized() and not is_last else contextlib.nullcontext()


def wrap(model):
    """The model whose backward pass takes the mean of all processes' gradients."""
    return torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model


def check_processes(criterion, sampler):
    """InputError for what several processes cannot share: a loss that is not the mean of its parts, or a batch too small."""
    for part in criterion.modules() if world_size() > 1 else []:
        if not getattr(part, "adds_up", True):
            raise InputError(f"--criterion: {type(part).__name__} over a batch is not the mean over its parts, so that processes "
                             f"cannot share it; pass another --criterion, or one process")
    if min(sampler.sizes()) < world_size():
        raise InputError(f"--batch_size: a batch of {min(sampler.sizes())} photos cannot be shared by {world_size()} "
                         f"processes; --batch_size counts all of them together, raise it")


class Stopper:
    """Notes Ctrl-C and SIGTERM in `signal`, so that the run can end at a whole step; the second one ends it at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        self.signal = number
        for each, handler in self.before.items():
            signal.signal(each, handler)
        os.write(2, b"\nstopping at the end of a step; once more stops at once\n")  # print is not safe in here

    def agreed(self, step, interval):
        """The signal to stop for at this step, or 0. Several processes ask each other, and only every `interval` steps."""
        if world_size() == 1:
            return self.signal
        return maximum(self.signal) if step % interval == 0 else 0
