"""Losses over the 18 classes, training targets and class weights.

Every loss takes logits (B, 18) and targets (B, 18), whose rows are distributions over the classes
(one-hot rows are plain labels), and returns the mean over the batch.

Class weights have a mean of 1 over the training photos: without a weighted sampler they do not
change the scale of the loss. The weight of a photo is the mean of the class weights over its
target.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InputError
from core.labels import GENDERS, MASKS, NUM_CLASSES


def soft_targets(photos, age_sigma=0.0, old_age=60):
    """Return the training targets of photos: (N, 18) float32, rows that sum to 1.

    The age is a normal distribution around the labelled age, and each age band gets the
    probability of its range: people of 58 and 62 look alike, and labels have errors. This is
    label distribution learning (Geng 2016) with the density of DLDL (Gao et al. 2017), summed over
    the bands. Scores never use it.

    Args:
        photos: the table of `read_train`.
        age_sigma: standard deviation of the density in years; 0 gives one-hot rows.
        old_age: age from which a person counts as old in training.
    """
    years = torch.tensor(photos.years.to_numpy())[:, None]
    edges = torch.tensor([29.5, old_age - 0.5])  # between two whole years
    if age_sigma:
        below = torch.special.ndtr((edges - years) / age_sigma)  # (N, 2)
    else:
        below = (years < edges).float()
    zeros, ones = torch.zeros(len(years), 1), torch.ones(len(years), 1)
    ages = torch.diff(below, dim=1, prepend=zeros, append=ones)  # (N, 3)
    masks = F.one_hot(torch.tensor(photos["mask"].to_numpy()), len(MASKS)).float()
    genders = F.one_hot(torch.tensor(photos.gender.to_numpy()), len(GENDERS)).float()
    return torch.einsum("nm,ng,na->nmga", masks, genders, ages).reshape(-1, NUM_CLASSES)


class CrossEntropyLoss(nn.Module):
    """Cross entropy with label smoothing s (Szegedy et al. 2016, section 7).

    The target is (1 - s) x target + s / 18.

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
        return ((targets @ self.weight) * losses).mean()


class FocalLoss(nn.Module):
    """Focal loss -(1 - p)^gamma log p, averaged over the target (Lin et al. 2017, equation 5).

    Args:
        weight: (18,) class weights (alpha in the paper), or None for all 1.
        gamma: focusing parameter, >= 0; 0 is cross entropy.
    """

    def __init__(self, weight=None, gamma=2.0):
        super().__init__()
        self.register_buffer("weight", _weight(weight))
        self.gamma = gamma

    def forward(self, logits, targets):
        log_p = F.log_softmax(logits, dim=1)
        # expm1 keeps 1 - p exact and its gradient finite if p is close to 1.
        one_minus_p = (-torch.expm1(log_p)).clamp_min(1e-8)
        losses = -(targets * one_minus_p ** self.gamma * log_p).sum(1)
        return ((targets @ self.weight) * losses).mean()


class SoftF1Loss(nn.Module):
    """1 - macro F1 with probabilities in place of counts (sigmoidF1, Benedict et al. 2021).

    The mean is over the classes with more than half a photo in the batch. It is not a mean over
    photos: with --accumulation_steps each batch is scored by itself, and several processes cannot
    share a batch.
    """
    is_mean_over_photos = False

    def forward(self, logits, targets):
        p = logits.softmax(dim=1)
        f1 = 2 * (p * targets).sum(0) / (p.sum(0) + targets.sum(0)).clamp_min(1e-12)
        present = (targets.sum(0) > 0.5).to(p.dtype)
        return 1 - (f1 * present).sum() / present.sum().clamp_min(1)


class SumLoss(nn.Module):
    """The sum of several losses."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = nn.ModuleList(losses)

    def forward(self, logits, targets):
        return sum(loss(logits, targets) for loss in self.losses)


# Name -> function of (class weights or None, label smoothing, focal gamma). To add a loss, write a
# module from logits and targets to the mean over the batch, and add it here. If it is not a mean
# over photos, set `is_mean_over_photos = False`.
LOSSES = {
    "cross_entropy": lambda weight, *_: CrossEntropyLoss(weight),
    "label_smoothing": lambda weight, smoothing, _: CrossEntropyLoss(weight, smoothing),
    "focal": lambda weight, _, gamma: FocalLoss(weight, gamma),
    "f1": lambda *_: SoftF1Loss(),
    "ce_f1": lambda weight, *_: SumLoss(CrossEntropyLoss(weight), SoftF1Loss()),
    "focal_f1": lambda weight, _, gamma: SumLoss(FocalLoss(weight, gamma), SoftF1Loss()),
}
CLASS_WEIGHTS = ("none", "balanced", "sqrt", "effective")


def create_loss(name, weight=None, smoothing=0.05, gamma=2.0):
    """Return the loss of a name in LOSSES, with class weights (18,) or None.

    Raises:
        InputError: for class weights with "f1", which already weighs all classes equally.
    """
    if name == "f1" and weight is not None:
        raise InputError("--criterion f1 takes no --class_weights: macro F1 weighs all classes "
                         "equally; pass --class_weights none")
    return LOSSES[name](weight, smoothing, gamma)


def class_weights(labels, scheme, beta=0.999):
    """Return weights (18,) with a mean of 1 over the training photos; None for "none".

    A class without a photo gets 0: nothing is learned from its part of a soft target.

    Args:
        labels: integer array (N,) of 0..17.
        scheme: for a class of n photos "balanced" is proportional to 1 / n, "sqrt" to
            1 / sqrt(n), "effective" to (1 - beta) / (1 - beta^n), the inverse of the effective
            number of samples (Cui et al. 2019, equation 2).
    """
    if scheme == "none":
        return None
    counts = np.bincount(labels, minlength=NUM_CLASSES).astype(float)
    n = np.maximum(counts, 1)
    raw = {"balanced": 1 / n, "sqrt": n ** -0.5,
           "effective": (1 - beta) / (1 - beta ** n)}[scheme] * (counts > 0)
    return torch.tensor(raw * counts.sum() / (raw * counts).sum(), dtype=torch.float32)


def _weight(weight):
    return torch.ones(NUM_CLASSES) if weight is None else weight.float()
