"""The optimizer, and its learning rate over the steps."""
import math

import timm.optim

from errors import InputError


def check_optimizer(name):
    """InputError for a name that is none of timm's own optimizers."""
    # not those of other packages, nor one that wants second derivatives
    if name.lower() not in timm.optim.list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"]):
        raise InputError(f"--optimizer {name}: unknown; such as adamw, sgd, adam, lamb, nadamw")


def create_optimizer(model, name, lr, weight_decay):
    """timm's optimizer of that name (adamw, sgd, adam, ...), without weight decay on norms and biases."""
    # one pass over the weights instead of a dozen, where torch has it
    fused = {"fused": True} if name.lower() in ("adamw", "adam", "sgd") else {}
    return timm.optim.create_optimizer_v2(model, opt=name.lower(), lr=lr, weight_decay=weight_decay, momentum=0.9, **fused)


def learning_rate(step, total_steps, peak, warmup):
    """Linear warm-up over the share `warmup` of the steps, then a half cosine to 0 (Loshchilov & Hutter 2017, SGDR).

    A function of the step alone (1 .. total_steps), so that there is nothing to restore when resuming.
    """
    warmup_steps = warmup * total_steps
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps + 1)))
