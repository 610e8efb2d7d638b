"""Numbers by hand, and from scikit-learn and torchvision."""
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy, norm
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from errors import InputError
from loss import LOSSES, AgeDistributionLoss, CrossEntropyLoss, FocalLoss, SoftF1Loss, WithAgeLoss, class_weights, create_loss

torch.manual_seed(0)
LOGITS, LABELS = torch.randn(40, 18), torch.arange(40) % 18


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_18_classes_and_trains(name):
    logits = LOGITS.clone().requires_grad_()
    criterion = create_loss(name, None if name == "f1" else torch.rand(18) + 0.5)
    before = criterion(logits, LABELS)
    before.backward()
    assert before.ndim == 0 and torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0
    assert criterion(logits.detach() - 2 * logits.grad / logits.grad.norm(), LABELS) < before


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "f1"])
def test_class_weights_move_with_the_module(name):
    criterion = create_loss(name, torch.ones(18)).to("meta")
    assert [buffer.device.type for buffer in criterion.buffers()] == ["meta"]


def test_cross_entropy_by_hand():
    logits = torch.zeros(2, 18)
    logits[0, 3] = math.log(17)  # p = 1/2
    labels = torch.tensor([3, 0])
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
    assert create_loss("label_smoothing", smoothing=s)(logits, torch.tensor([3])).item() == pytest.approx(expected, abs=1e-6)


def test_focal_by_hand_and_against_torchvision():
    logits = torch.zeros(1, 18)
    logits[0, 3] = math.log(17)
    assert FocalLoss(gamma=2)(logits, torch.tensor([3])).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    # of two classes that count, the softmax is the sigmoid of the difference
    pair = torch.full((30, 18), -1e4)
    pair[:, :2] = torch.randn(30, 2)
    labels = torch.arange(30) % 2
    other = sigmoid_focal_loss(pair[:, 1] - pair[:, 0], labels.float(), alpha=-1, gamma=2, reduction="mean")
    assert FocalLoss(gamma=2)(pair, labels).item() == pytest.approx(other.item(), abs=1e-6)
    assert FocalLoss(gamma=0)(LOGITS, LABELS).item() == pytest.approx(CrossEntropyLoss()(LOGITS, LABELS).item(), abs=1e-6)


def test_focal_has_a_finite_gradient_where_it_is_sure():
    logits = torch.zeros(1, 18)
    logits[0, 3] = 200.0
    logits.requires_grad_()
    FocalLoss(gamma=0.5)(logits, torch.tensor([3])).backward()
    assert torch.isfinite(logits.grad).all()


def test_soft_f1_of_certain_predictions_is_macro_f1():
    rng = np.random.default_rng(0)
    labels, guesses = rng.permutation(np.arange(90) % 18), rng.integers(0, 18, 90)
    logits = torch.full((90, 18), -1e4)
    logits[torch.arange(90), torch.from_numpy(guesses)] = 1e4
    expected = 1 - f1_score(labels, guesses, average="macro")
    assert SoftF1Loss()(logits, torch.from_numpy(labels)).item() == pytest.approx(expected, abs=1e-6)


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


def test_age_distribution_loss_against_scipy():
    logits, years = torch.randn(3, 101), torch.tensor([0, 30, 85])
    expected = []
    for row, age in zip(logits.double().numpy(), years.tolist(), strict=True):
        density = norm.pdf(np.arange(101), age, 2.0)  # cut at 0 and 100, and scaled to sum to 1 again
        expected.append(entropy(density, softmax(row)))
    assert AgeDistributionLoss(101, sigma=2.0)(logits, years).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_age_loss_is_added_with_its_weight():
    outputs, years = torch.randn(5, 18 + 101), torch.tensor([20, 40, 61, 59, 33])
    classes, age = create_loss("cross_entropy"), AgeDistributionLoss(101)
    expected = classes(outputs[:, :18], LABELS[:5]) + 0.3 * age(outputs[:, 18:], years)
    assert torch.allclose(WithAgeLoss(classes, age, 0.3)(outputs, LABELS[:5], years), expected)
    assert torch.allclose(WithAgeLoss(classes, age, 0)(outputs[:, :18], LABELS[:5], years), classes(outputs[:, :18], LABELS[:5]))
