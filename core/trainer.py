"""The objects of a training run: model, loss, optimizer, averages, and its losses."""
import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from core import distributed
from core.checkpoint import input_statistics
from core.device import half_precision
from core.errors import InputError, as_one_line, is_out_of_memory
from core.prediction import Normalize


class LossHistory:
    """The losses since the last evaluation.

    They stay on the device until they are needed, so that a step does not wait for the device.
    """

    def __init__(self):
        self.values, self.pending = [], []

    def append(self, loss):
        self.pending.append(loss)

    def fetch(self, step, lr):
        """Copy the losses up to `step` from the device, averaged over the processes.

        All processes must call it. Raises InputError if a loss is not finite.
        """
        if not self.pending:
            return
        new = distributed.all_reduce_mean(torch.stack(self.pending)).tolist()
        self.pending.clear()
        self.values += new
        for i, value in enumerate(new):
            if not math.isfinite(value):
                raise not_finite(f"the loss or the gradient of step {step - len(new) + 1 + i}", lr)

    def mean_of_last(self, count, step, lr):
        self.fetch(step, lr)
        return float(np.mean(self.values[-count:]))

    def reset(self):
        """Forget all losses; return their mean."""
        mean = float(np.mean(self.values))
        self.values = []
        return mean


class ModelEma(ModelEmaV3):
    """timm's moving average of the weights, whose decay rises during the first steps.

    timm's `update` lists the tensors of all modules in each step; this one lists them once and
    gives the same result.

    Args:
        model: the model, on its device.
        decay: the largest decay, in (0, 1).
    """

    def __init__(self, model, decay):
        super().__init__(model, decay=decay, use_warmup=True)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(),
                         strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # counters

    @torch.no_grad()
    def update(self, step):
        """Move the average towards the model's weights after step `step`, from 1."""
        averages, values = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, values, 1 - self.get_decay(step))
        if self.copied:
            torch._foreach_copy_(*zip(*self.copied, strict=True))


@dataclass
class Trainer:
    """The objects that a training step uses."""
    model: nn.Module  # in training mode, on the device
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: bool | None
    clip_grad: float
    ema_decay: float
    seed: int

    def __post_init__(self):
        # Once: listing them walks through all modules, 0.6 ms for EfficientNet-B4.
        self.parameters = list(self.model.parameters())
        # The same model, in DistributedDataParallel if there are several processes.
        self.parallel_model = distributed.wrap_ddp(self.model)
        self.normalize = Normalize(*input_statistics(self.model)).to(self.device)
        # bfloat16 has the range of float32 and needs no loss scaling; float16 does.
        use_float16 = self.amp is not False and half_precision(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=use_float16)
        self.ema = ModelEma(self.model, self.ema_decay) if self.ema_decay else None
        self.losses = LossHistory()

    @property
    def inference_model(self):
        """The model that is evaluated and saved."""
        return self.ema.module if self.ema else self.model

    def state_dict(self):
        """Return what only resuming needs, for training_state.pt."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "losses": torch.tensor(self.losses.values)}

    def load_state_dict(self, state):
        """Restore a state; InputError if it does not fit."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            # A run may be resumed on a device with another precision.
            if self.scaler.is_enabled() and state["scaler"]:  # empty from a run without float16
                self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.losses.values = state["losses"].tolist()
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: the last checkpoint does not fit --model as it is now "
                             f"({as_one_line(error)}); pass another --output_dir") from None


@contextlib.contextmanager
def explain_out_of_memory(batch_size, accumulation_steps):
    """Turn an out-of-memory error into an InputError with flags that need less memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Half the batch must still be shared equally, with two photos or more for batch norm.
        half, processes = batch_size // 2, distributed.world_size()
        remedy = (f"--batch_size {half} --accumulation_steps {2 * accumulation_steps}, which needs "
                  f"about half of the memory")
        if half < 2 * processes or half % processes or batch_size % 2:
            remedy = "a smaller --resize"
        raise InputError(f"out of memory with --batch_size {batch_size}: pass {remedy}, or another "
                         f"--model") from None


def check_finite(model, step, lr):
    """Raise InputError if a weight is not finite: no loss has covered the last update yet."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise not_finite(f"{name} after step {step}", lr)


def not_finite(what, lr=None):
    """Return the InputError for a number that is NaN or infinite."""
    rate = "" if lr is None else f" (learning rate about {lr:.2g})"
    return InputError(f"{what} is not finite{rate}; nothing was saved from it; lower --lr or "
                      f"--clip_grad, or pass --no-amp, and train again in another --output_dir; "
                      f"earlier checkpoints can still predict")
