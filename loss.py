"""Losses over the 18 classes, and class weights.

Every loss takes logits (B, 18) and targets (B, 18), distributions over the classes (one-hot rows are plain labels), and
returns a scalar. Class weights are scaled to a mean of 1 over the training photos as they are in the table (a sampler
that draws rare ones more often raises the mean), a photo's weight is the mean of the classes' over its target, and a
weighted loss is the mean of weight x loss over the batch, so that weighting moves neither the scale of the loss nor the
best learning rate, and the batches of a step add up to it (except soft F1).
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from errors import InputError
from layout import AGES, GENDERS, MASKS, NUM_CLASSES

NUM_GROUPS = len(GENDERS) * len(AGES)


def soft_targets(photos, age_sigma=0.0, old_age=60):
    """What to learn of every photo: (N, 18) float32, a distribution over the classes that sums to 1.

    The years of a person are taken as a normal density around the age given, of which each band gets its share: people of
    58 and 62 look alike, and the years in a table carry errors of their own. It is label-distribution learning (Geng
    2016) with the density of DLDL (Gao et al. 2017), summed over the bands that count. Scores never see it.

    Args:
        photos: the table of `read_train`.
        age_sigma: standard deviation of the density in years; 0 gives one-hot rows.
        old_age: years from which a person counts as old in training.
    """
    years, edges = torch.tensor(photos.years.to_numpy())[:, None], torch.tensor([29.5, old_age - 0.5])
    below = torch.special.ndtr((edges - years) / age_sigma) if age_sigma else (years < edges).float()  # (N, 2)
    ages = torch.diff(below, dim=1, prepend=torch.zeros(len(years), 1), append=torch.ones(len(years), 1))  # (N, 3)
    masks = F.one_hot(torch.tensor(photos["mask"].to_numpy()), len(MASKS)).float()
    genders = F.one_hot(torch.tensor(photos.gender.to_numpy()), len(GENDERS)).float()
    return torch.einsum("nm,ng,na->nmga", masks, genders, ages).reshape(-1, NUM_CLASSES)


class CrossEntropyLoss(nn.Module):
    """Cross entropy with optional class weights and label smoothing (Szegedy et al. 2016, section 7).

    With smoothing s it learns (1 - s) x target plus s / 18 on every class.

    Args:
        weight: (18,) class weights, or None for all 1.
        smoothing: s, in [0, 1).
    """

    def __init__(self, weight=None, smoothing=0.0):
        super().__init__()
        self.register_buffer("weight", _weight(weight))
        self.smoothing = smoothing

    def forward(self, logits, targets):
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        return (targets @ self.weight * losses).mean()


class FocalLoss(nn.Module):
    """Focal loss, -(1 - p)^gamma log p for each class's probability p, in the shares of the target (Lin et al. 2017, eq. 5).

    Args:
        weight: (18,) class weights (the paper's alpha), or None for all 1.
        gamma: focusing parameter, >= 0; 0 is cross entropy.
    """

    def __init__(self, weight=None, gamma=2.0):
        super().__init__()
        self.register_buffer("weight", _weight(weight))
        self.gamma = gamma

    def forward(self, logits, targets):
        log_p = F.log_softmax(logits, dim=1)
        # expm1 keeps 1 - p exact, and its gradient finite, where p is close to 1.
        losses = -(targets * (-torch.expm1(log_p)).clamp_min(1e-8) ** self.gamma * log_p).sum(1)
        return (targets @ self.weight * losses).mean()


class SoftF1Loss(nn.Module):
    """1 - macro F1 with probabilities in place of counts (the soft F1 of sigmoidF1, Benedict et al. 2021, over softmax).

    The mean is over the classes with at least half a photo in the batch: the F1 of an absent class has no gradient worth following.
    It does not add up over parts of a batch: with --accumulation_steps each part is scored by itself.
    """
    adds_up = False

    def forward(self, logits, targets):
        p = logits.softmax(dim=1)
        f1 = 2 * (p * targets).sum(0) / (p.sum(0) + targets.sum(0))
        present = (targets.sum(0) > 0.5).to(p.dtype)
        return 1 - (f1 * present).sum() / present.sum()


class SumLoss(nn.Module):
    """The plain sum of several losses, as the strongest solutions of this task add soft F1 to cross entropy or focal."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, logits, targets):
        return sum(loss(logits, targets) for loss in self.losses)


class LogitAdjustedLoss(nn.Module):
    """A loss of logits + tau x log prior, so that the logits by themselves favour rare people (Menon et al. 2021, eq. 10).

    The prior of a class is the share of its gender x age group: how masks are worn is easy to see, and needs no help.

    Args:
        loss: of logits (B, 18) and targets (B, 18).
        labels: integer array (N,) of 0..17 of the training photos.
        tau: 0 is the loss as it is, 1 aims at the mean of the classes' accuracies; macro F1 lies between.
    """

    def __init__(self, loss, labels, tau):
        super().__init__()
        self.loss = loss
        groups = np.maximum(np.bincount(labels % NUM_GROUPS, minlength=NUM_GROUPS), 1)
        adjustment = tau * np.log(groups / groups.sum())[np.arange(NUM_CLASSES) % NUM_GROUPS]
        self.register_buffer("adjustment", torch.tensor(adjustment, dtype=torch.float32))

    def forward(self, logits, targets):
        return self.loss(logits + self.adjustment, targets)


# To add one: a module from logits (B, 18) and targets (B, 18), whose rows are distributions, to a scalar, the mean over the
# batch (else with `adds_up = False`, so that several processes refuse it), and an entry here:
# name -> function of (class weights or None, label smoothing, focal gamma). --logit_adjustment shifts the logits it gets.
LOSSES = {
    "cross_entropy": lambda weight, smoothing, gamma: CrossEntropyLoss(weight),
    "label_smoothing": lambda weight, smoothing, gamma: CrossEntropyLoss(weight, smoothing),
    "focal": lambda weight, smoothing, gamma: FocalLoss(weight, gamma),
    "f1": lambda weight, smoothing, gamma: SoftF1Loss(),
    "ce_f1": lambda weight, smoothing, gamma: SumLoss(CrossEntropyLoss(weight), SoftF1Loss()),
    "focal_f1": lambda weight, smoothing, gamma: SumLoss(FocalLoss(weight, gamma), SoftF1Loss()),
}
CLASS_WEIGHTS = ("none", "balanced", "sqrt", "effective")


def create_loss(name, weight=None, smoothing=0.05, gamma=2.0):
    """The loss of a name in LOSSES, with class weights (18,) or None.

    Raises:
        InputError: for class weights with "f1", which weighs all classes alike by its definition.
    """
    if name == "f1" and weight is not None:
        raise InputError("--criterion f1 takes no --class_weights: macro F1 weighs all classes alike; pass --class_weights none")
    return LOSSES[name](weight, smoothing, gamma)


def class_weights(labels, scheme, beta=0.999):
    """Weights (18,) from the labels of the training photos, with a mean of 1 over those photos; None for "none".

    A class without a photo gets 0, so that nothing is learned from its share of a soft target.

    Args:
        labels: integer array (N,) of 0..17.
        scheme: "balanced" is proportional to 1 / n, "sqrt" to 1 / sqrt(n), "effective" to (1 - beta) / (1 - beta^n), the
            inverse effective number of samples (class-balanced loss, Cui et al. 2019, equation 2).
    """
    if scheme == "none":
        return None
    counts = np.bincount(labels, minlength=NUM_CLASSES).astype(float)
    n = np.maximum(counts, 1)
    raw = {"balanced": 1 / n, "sqrt": n ** -0.5, "effective": (1 - beta) / (1 - beta ** n)}[scheme] * (counts > 0)
    return torch.tensor(raw * counts.sum() / (raw * counts).sum(), dtype=torch.float32)


def _weight(weight):
    return torch.ones(NUM_CLASSES) if weight is None else weight.float()
