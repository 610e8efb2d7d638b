"""Several processes, one a GPU, by torchrun: who this one is, and what all of them agree on. In one process these are no-ops.

    torchrun --nproc_per_node=8 train.py --batch_size 128 ...
    torchrun --nproc_per_node=8 inference.py --model_dir=./results
"""
import contextlib
import itertools
import os
import platform
import signal
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from errors import InputError


def join(device):
    """Join torchrun's processes, if it started this one; returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.index is not None:
            raise InputError(f"--device {device}: torchrun gives each process a GPU of its own; pass --device cuda")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index >= torch.cuda.device_count():
                raise InputError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: more processes than the "
                                 f"{torch.cuda.device_count()} GPUs of this machine; start as many")
        store, number, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_name_of_start(store, number, count), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=count)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _name_of_start(store, number, count):
    """A name that all processes of this start agree on, made up by process 0.

    torchrun's store still holds what processes wrote before a restart, and its count of restarts differs between machines. Every
    process says hello by a new name of its own, and process 0 answers whatever hello it finds until all have heard it.
    """
    name = uuid.uuid4().hex
    if number:
        store.set(f"hello-{number}", name)
        name_of_start = store.get(f"answer-{name}").decode()  # waits for it
        store.set(f"heard-{name_of_start}-{number}", "")
        return name_of_start
    missing = list(range(1, count))
    while missing:
        for other in missing:
            if store.check([f"hello-{other}"]):
                store.set(f"answer-{store.get(f'hello-{other}').decode()}", name)
        time.sleep(0.01)
        missing = [other for other in missing if not store.check([f"heard-{name}-{other}"])]
    return name


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Number of this process; 0 writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_id():
    """Which start of torchrun this process belongs to, the same after its restarts; empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = Path(f"/proc/{os.getppid()}/stat")
    # The 22nd field tells when it began: in a new container torchrun has the number that it had in the last.
    began = parent.read_text().rpartition(")")[2].split()[19] if parent.is_file() else ""
    return " ".join([os.environ["TORCHELASTIC_RUN_ID"], platform.node(), str(os.getppid()), began])


def command_prefix():
    """How these processes were started, for a command to show."""
    if world_size() == 1:
        return "python"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return f"torchrun {f'--nnodes={nodes} ' if nodes > 1 else ''}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"


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


def from_main(value):
    """Process 0's picklable value, in every process."""
    return gather(value)[0]


def copy_main(model):
    """Give a model the weights and buffers that it has in process 0; batch statistics differ between the processes until then."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def mean(tensor):
    """The mean over the processes, in the tensor's own place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


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
    """Notes Ctrl-C and SIGTERM in `signal`, so that the run can end at a whole step; a second one ends it at once.

    What follows within a second is the same one: a terminal or a scheduler tells all processes, and torchrun tells its own.
    """

    def __init__(self):
        self.signal, self.time = 0, 0.0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        if self.signal:
            if time.monotonic() > self.time + 1:
                signal.signal(number, self.before[number])
                os.kill(os.getpid(), number)
            return
        self.signal, self.time = number, time.monotonic()
        os.write(2, b"\nstopping at the end of a step; once more stops at once\n")  # print is not safe in here

    def agreed(self, step, interval):
        """The signal to stop for at this step, or 0. Several processes ask each other, and only every `interval` steps."""
        if world_size() == 1:
            return self.signal
        return max(gather(self.signal)) if step % interval == 0 else 0
