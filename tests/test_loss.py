"""Numbers by hand, and from scikit-learn and torchvision."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from errors import InputError
from loss import LOSSES, CrossEntropyLoss, FocalLoss, LogitAdjustedLoss, SoftF1Loss, class_weights, create_loss

torch.manual_seed(0)
LOGITS, TARGETS = torch.randn(40, 18), torch.eye(18)[torch.arange(40) % 18]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_18_classes_and_trains(name):
    logits = LOGITS.clone().requires_grad_()
    criterion = create_loss(name, None if name == "f1" else torch.rand(18) + 0.5)
    before = criterion(logits, TARGETS)
    before.backward()
    assert before.ndim == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
    assert criterion(logits.detach() - 2 * logits.grad / logits.grad.norm(), TARGETS) < before


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "f1"])
def test_class_weights_move_with_the_module(name):
    criterion = create_loss(name, torch.ones(18)).to("meta")
    assert [buffer.device.type for buffer in criterion.buffers()] == ["meta"]


def test_cross_entropy_by_hand():
    logits = torch.zeros(2, 18)
    logits[0, 3] = math.log(17)  # p = 1/2
    labels = torch.eye(18)[[3, 0]]
    p1 = 1 / 18
    assert CrossEntropyLoss()(logits, labels).item() == pytest.approx((math.log(2) + math.log(18)) / 2, abs=1e-6)
    weight = torch.ones(18)
    weight[3] = 3.0
    assert CrossEntropyLoss(weight)(logits, labels).item() == pytest.approx((3 * math.log(2) - math.log(p1)) / 2, abs=1e-6)


def test_label_smoothing_by_hand():
    logits = torch.zeros(1, 18)
    logits[0, 3] = math.log(17)  # p = 1/2 there, 1/34 elsewhere
    s = 0.1
    expected = (1 - s + s / 18) * math.log(2) + s * 17 / 18 * math.log(34)
    assert create_loss("label_smoothing", smoothing=s)(logits, torch.eye(18)[[3]]).item() == pytest.approx(expected, abs=1e-6)


def test_focal_by_hand_and_against_torchvision():
    logits = torch.zeros(1, 18)
    logits[0, 3] = math.log(17)
    assert FocalLoss(gamma=2)(logits, torch.eye(18)[[3]]).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    # of two classes that count, the softmax is the sigmoid of the difference
    pair = torch.full((30, 18), -1e4)
    pair[:, :2] = torch.randn(30, 2)
    labels = torch.arange(30) % 2
    other = sigmoid_focal_loss(pair[:, 1] - pair[:, 0], labels.float(), alpha=-1, gamma=2, reduction="mean")
    assert FocalLoss(gamma=2)(pair, torch.eye(18)[labels]).item() == pytest.approx(other.item(), abs=1e-6)
    assert FocalLoss(gamma=0)(LOGITS, TARGETS).item() == pytest.approx(CrossEntropyLoss()(LOGITS, TARGETS).item(), abs=1e-6)


def test_focal_has_a_finite_gradient_where_it_is_sure():
    logits = torch.zeros(1, 18)
    logits[0, 3] = 200.0
    logits.requires_grad_()
    FocalLoss(gamma=0.5)(logits, torch.eye(18)[[3]]).backward()
    assert torch.isfinite(logits.grad).all()


def test_soft_f1_of_certain_predictions_is_macro_f1():
    rng = np.random.default_rng(0)
    labels, guesses = rng.permutation(np.arange(90) % 18), rng.integers(0, 18, 90)
    logits = torch.full((90, 18), -1e4)
    logits[torch.arange(90), torch.from_numpy(guesses)] = 1e4
    expected = 1 - f1_score(labels, guesses, average="macro")
    assert SoftF1Loss()(logits, torch.eye(18)[torch.from_numpy(labels)]).item() == pytest.approx(expected, abs=1e-6)


def test_class_weights_against_scikit_learn_and_by_hand():
    labels = np.repeat(np.arange(18), np.arange(1, 19))
    balanced = class_weights(labels, "balanced").numpy()
    assert balanced == pytest.approx(compute_class_weight("balanced", classes=np.arange(18), y=labels), rel=1e-5)
    for scheme, ratio in [("sqrt", (16 / 1) ** -0.5), ("effective", (1 - 0.999) / (1 - 0.999 ** 16))]:
        weights = class_weights(labels, scheme)
        assert (weights[15] / weights[0]).item() == pytest.approx(ratio, rel=1e-4)
        assert weights[torch.from_numpy(labels)].mean().item() == pytest.approx(1, abs=1e-5)
    assert class_weights(labels, "none") is None
    assert class_weights(np.array([0, 0, 1]), "balanced").tolist() == [0.75, 1.5] + [0] * 16


def test_f1_loss_refuses_class_weights():
    with pytest.raises(InputError, match="--criterion f1 takes no --class_weights"):
        create_loss("f1", torch.ones(18))


def test_a_target_between_two_classes_by_hand():
    logits = torch.zeros(1, 18)
    logits[0, 3] = math.log(17)  # p = 1/2 there, 1/34 elsewhere
    target = torch.zeros(1, 18)
    target[0, 3], target[0, 4] = 0.75, 0.25
    weight = torch.ones(18)
    weight[4] = 3.0
    assert CrossEntropyLoss(weight)(logits, target).item() == pytest.approx(
        (0.75 + 3 * 0.25) * (0.75 * math.log(2) + 0.25 * math.log(34)), abs=1e-6)
    assert FocalLoss(weight)(logits, target).item() == pytest.approx(
        (0.75 + 3 * 0.25) * (0.75 * 0.25 * math.log(2) + 0.25 * (33 / 34) ** 2 * math.log(34)), abs=1e-6)


def test_logit_adjustment_by_hand():
    # groups of 8, 4, 2, 1, 1 photos and one of none, which counts as one photo; how masks are worn makes no difference
    labels = np.repeat([0, 6, 12, 1, 13, 2, 3, 4], [4, 3, 1, 2, 2, 2, 1, 1])
    prior = torch.tensor([8, 4, 2, 1, 1, 1]).repeat(3) / 17
    expected = nn.functional.cross_entropy(LOGITS + 0.5 * prior.log(), TARGETS)
    assert LogitAdjustedLoss(CrossEntropyLoss(), labels, 0.5)(LOGITS, TARGETS).item() == pytest.approx(expected.item(), abs=1e-6)
    assert LogitAdjustedLoss(CrossEntropyLoss(), labels, 0)(LOGITS, TARGETS) == CrossEntropyLoss()(LOGITS, TARGETS)
