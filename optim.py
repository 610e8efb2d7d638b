"""The optimizer, its learning rate over the steps, and a check for weights that are not finite."""
import math

import timm.optim

from errors import InputError

NOT_FINITE = ("nothing was saved of it; lower --lr, set --clip_grad, or pass --no-amp, and begin again with --overwrite or another "
              "--output_dir")


def check_optimizer(name):
    """InputError for a name that timm does not know."""
    if name.lower() not in timm.optim.list_optimizers():
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


def check_weights(model, inference_model, step, rate):
    """InputError if a weight is not finite: the step's own update, which no loss has seen yet, may have spoilt it."""
    for weights in (model, inference_model):
        for name, value in weights.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{name} is not finite after step {step} (learning rate {rate:.2g}); {NOT_FINITE}")
