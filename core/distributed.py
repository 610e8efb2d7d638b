"""Helpers for torchrun. In a single process nothing is communicated.

    torchrun --nproc_per_node=8 train.py --batch_size 128 ...
    torchrun --nproc_per_node=8 inference.py --model_dir=./results
"""
import contextlib
import itertools
import os
import shlex
import signal
import threading
import time

import torch
import torch.distributed as dist

from core.cli import STOP_SIGNALS, script
from core.errors import InputError, as_one_line


def init_distributed(device):
    """Initialize torch.distributed if torchrun started this process; return its device.

    Raises:
        InputError: for an environment that is not torchrun's, a --device with a number, more
            processes than GPUs, or processes that do not find each other.
    """
    if _torchrun_processes() > 1 and not dist.is_initialized():
        # With torchrun the local rank chooses the GPU.
        if device.index is not None:
            raise InputError(f"--device {device}: torchrun gives each process its own GPU; pass "
                             f"--device cuda")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index >= torch.cuda.device_count():
                raise InputError(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}: this "
                                 f"machine has {torch.cuda.device_count()} GPUs; start at most "
                                 f"one process per GPU")
        try:
            # NCCL for GPUs, Gloo for CPUs: the fastest backend of each.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (dist.DistError, OSError) as error:
            raise InputError(f"the processes cannot connect ({as_one_line(error)}); check that "
                             f"MASTER_ADDR and MASTER_PORT are free and can be reached") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _torchrun_processes():
    """Return the number of processes that torchrun started; 1 without it."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return 1
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    limits = {"RANK": os.environ["WORLD_SIZE"], "MASTER_PORT": "65536"}
    wrong = [name for name in names if not os.environ.get(name, "").isdecimal()]
    # A rank that is too high would wait for the others for half an hour.
    wrong += [name for name, limit in limits.items()
              if not wrong and int(os.environ[name]) >= int(limit)]
    if wrong or not os.environ.get("MASTER_ADDR"):
        name = wrong[0] if wrong else "MASTER_ADDR"
        raise InputError(f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} and {name} "
                         f"is {os.environ.get(name) or 'not set'}; start several processes with "
                         f"torchrun, or a single one with WORLD_SIZE=1")
    return int(os.environ["WORLD_SIZE"])


def check_restarts(resume):
    """Check torchrun's --max-restarts: the restarted command must continue the run.

    Raises:
        InputError: without --resume.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not resume:
        raise InputError("torchrun --max-restarts starts the same command again: add --resume (it "
                         "starts a new run if there is none), or pass --max-restarts=0")


def check_shares(batch_size, criterion):
    """Check that several processes can take equal shares of a batch; InputError if not."""
    processes = world_size()
    if batch_size % processes:
        raise InputError(f"--batch_size {batch_size}: {processes} processes cannot take equal "
                         f"shares of it; pass a multiple of {processes}")
    for loss in criterion.modules() if processes > 1 else []:
        if not getattr(loss, "is_mean_over_photos", True):
            raise InputError(f"--criterion: {type(loss).__name__} of a batch is not the mean of "
                             f"its shares, so several processes cannot compute it; pass another "
                             f"--criterion, or use one process")


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Return the number of this process. Process 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size():
    """Return the number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def launch(name):
    """Return the start of the command line of these processes: "python train.py", or torchrun."""
    if world_size() == 1:
        return script(name)
    # Rebuild torchrun's own command from its environment variables.
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    nnodes = f"--nnodes={nodes} " if nodes > 1 else ""
    processes = f"{nnodes}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return f"torchrun {processes} {shlex.quote(shlex.split(script(name))[-1])}"


@contextlib.contextmanager
def main_process_first():
    """Let process 0 run the block before the others do."""
    if dist.is_initialized() and rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not rank():
        dist.barrier()


def all_gather_object(value):
    """Return the list of the picklable values of all processes."""
    values = [value]
    if dist.is_initialized():
        values *= world_size()
        # It pickles the values: any type and size, but too slow for every step.
        dist.all_gather_object(values, value)
    return values


def run_on_main_process(function, *args):
    """Call a function in process 0 alone; return its picklable result in all processes."""
    return all_gather_object(function(*args) if rank() == 0 else None)[0]


def all_reduce_mean(tensor):
    """Replace a tensor by its mean over the processes; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def broadcast_model(model):
    """Copy process 0's weights and buffers to all. Batch-norm statistics differ until then."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def gather_in_order(items):
    """Return the items of all processes in their original order.

    Process r has items r, r + world_size, r + 2 * world_size, ...
    """
    # One item of each process in turn; the last processes may have one less.
    rows = itertools.zip_longest(*all_gather_object(items))
    return [item for row in rows for item in row if item is not None]


def wrap_ddp(model):
    """Wrap a model so that backward averages the gradients over the processes."""
    if not dist.is_initialized():
        return model
    return torch.nn.parallel.DistributedDataParallel(model)


def no_sync(model, active):
    """Return a context that skips the averaging of gradients while `active`."""
    return model.no_sync() if dist.is_initialized() and active else contextlib.nullcontext()


class StopSignals:
    """Remembers Ctrl-C, SIGTERM and SIGHUP, so that training can stop after a whole step.

    A second signal stops the process at once. Signals within one second count as one: a terminal
    or scheduler signals all processes, and torchrun then signals its own. Signals that are ignored
    (by nohup) stay so. `core.cli.restores_process` restores the handlers.
    """

    def __init__(self):
        self.received, self.time = 0, 0.0
        self.stderr = os.dup(2)  # core.images redirects 2 while it decodes a photo
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self.previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS
                             if signal.getsignal(number) not in (signal.SIG_IGN, None)}

    def _handle(self, number, frame):
        if self.received:
            if time.monotonic() > self.time + 1:
                signal.signal(number, self.previous[number])
                os.kill(os.getpid(), number)
            return
        self.received, self.time = number, time.monotonic()
        with contextlib.suppress(OSError):  # the terminal is closed
            # print is not safe in a signal handler
            os.write(self.stderr, b"\nstopping soon with a checkpoint; a second signal stops at "
                                  b"once\n")

    def poll(self, step, interval):
        """Return 0, or the signal that any process has received.

        Several processes ask each other only every `interval` steps.
        """
        if world_size() == 1:
            return self.received
        # All processes must stop after the same step.
        return max(all_gather_object(self.received)) if step % interval == 0 else 0
