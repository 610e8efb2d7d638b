"""The optimizer, its learning rate over the steps, sharpness-aware gradients, and a check for weights that are not finite."""
import math

import timm.optim
import torch
from torch.nn.modules.batchnorm import _BatchNorm

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


def sharpness_aware(gradient, model, rho):
    """Sharpness-aware minimization (Foret et al. 2021): the gradient of the loss at the highest place nearby, so that the weights
    go where the loss is low all around.

    Args:
        gradient: a function that adds a loss's gradient to that of the model's weights, and returns the loss.
        model: whose gradients are empty when the result is called. Its batch statistics move only once.
        rho: how far, as the norm of the step uphill along the gradient; 0 returns `gradient` as it is.

    Returns:
        A function like `gradient`, with two passes in place of one. The weights are afterwards what they were, to the bit.
    """
    def aware(*args):
        loss = gradient(*args)
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        gradients, before = [weight.grad for weight in weights], [weight.detach().clone() for weight in weights]
        norms = {layer: layer.momentum for layer in model.modules() if isinstance(layer, _BatchNorm)}
        with torch.no_grad():
            length = rho / (torch.nn.utils.get_total_norm(gradients) + 1e-12)
            torch._foreach_add_(weights, torch._foreach_mul(gradients, length))
        for layer in norms:
            layer.momentum = 0.0
        model.zero_grad(set_to_none=True)
        gradient(*args)
        for layer, momentum in norms.items():
            layer.momentum = momentum
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        return loss
    return aware if rho else gradient


def check_weights(model, inference_model, step, rate):
    """InputError if a weight is not finite: the step's own update, which no loss has seen yet, may have spoilt it."""
    for weights in (model, inference_model):
        for name, value in weights.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{name} is not finite after step {step} (learning rate {rate:.2g}); {NOT_FINITE}")
