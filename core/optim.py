"""The optimizer and its learning-rate schedule."""
import argparse
import math

import timm.optim


def optimizer_name(text):
    """An argparse type: the name of one of timm's own optimizers."""
    # Not those of other packages, nor one that needs second derivatives.
    names = timm.optim.list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"])
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"unknown optimizer {text}; expected adamw, sgd, or "
                                         f"another optimizer of timm")
    return text.lower()


def create_optimizer(model, name, lr, weight_decay):
    """Return timm's optimizer of a name, without weight decay on norms and biases."""
    # torch's fused optimizers update all weights in one pass.
    fused = {"fused": True} if name in ("adamw", "adam", "sgd") else {}
    return timm.optim.create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay,
                                          momentum=0.9, **fused)


def default_rate(rate, photos_per_step):
    """Return the default peak rate for a number of photos per step.

    It grows with the square root of that number, the scaling rule for Adam (Malladi et al. 2022,
    On the SDEs and Scaling Rules for Adaptive Gradient Algorithms). Three digits are kept.

    Args:
        rate: the rate for 16 photos per step.
        photos_per_step: batch size x accumulation steps.
    """
    return float(f"{rate * math.sqrt(photos_per_step / 16):.3g}")


def learning_rate(step, total_steps, peak, warmup):
    """Return the learning rate of a step: linear warm-up, then half a cosine to almost 0.

    The cosine is that of SGDR (Loshchilov & Hutter 2017). The rate depends on the step only, so
    resuming restores nothing.

    Args:
        step: 1 .. total_steps.
        total_steps: steps of the run.
        peak: the highest learning rate.
        warmup: fraction of the steps used for warm-up.
    """
    warmup_steps = warmup * total_steps
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
