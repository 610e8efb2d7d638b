"""The objects of a training run: model, loss, optimizer, averages, and its losses."""
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from core import distributed
from core.errors import InputError, as_one_line


class LossHistory:
    """The losses since the last evaluation.

    They stay on the device until they are needed, so that a step does not wait for the device.
    """

    def __init__(self):
        self.values, self.pending = [], []

    def append(self, loss):
        self.pending.append(loss)

    def fetch(self, step, lr):
        """Copy the losses up to `step` from the device; InputError if one is not finite."""
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


@dataclass
class Trainer:
    """The objects that a training step uses."""
    model: nn.Module
    parallel_model: nn.Module  # the same model, in DistributedDataParallel if there are processes
    normalize: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # disabled except for float16
    ema: ModelEmaV3 | None  # moving average of the weights
    device: torch.device
    amp: bool | None
    clip_grad: float
    seed: int
    losses: LossHistory = field(default_factory=LossHistory)

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
            if self.scaler.is_enabled() and state["scaler"]:  # empty from a run without float16
                self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            self.losses.values = state["losses"].tolist()
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: the last checkpoint does not fit --model as it is now "
                             f"({as_one_line(error)}); pass another --output_dir") from None


def check_finite(model, step, lr):
    """Check the weights, whose last update no loss has seen yet; InputError if not finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise not_finite(f"{name} after step {step}", lr)


def not_finite(what, lr=None):
    """Return the InputError for a number that is NaN or infinite."""
    rate = "" if lr is None else f" (learning rate about {lr:.2g})"
    return InputError(f"{what} is not finite{rate}; nothing was saved from it; lower --lr or "
                      f"--clip_grad, or pass --no-amp, and start again with --overwrite or "
                      f"another --output_dir")
