"""The losses against numbers by hand, scikit-learn and torchvision."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from core.errors import InputError
from loss import LOSSES, CrossEntropyLoss, FocalLoss, SoftF1Loss, class_weights, create_loss

torch.manual_seed(0)
LOGITS, TARGETS = torch.randn(40, 18), torch.eye(18)[torch.arange(40) % 18]


def one_sure_class():
    """Logits of one photo: class 3 has probability 1/2, each other class 1/34."""
    logits = torch.zeros(1, 18)
    logits[0, 3] = math.log(17)
    return logits


def approx(value):
    return pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_gradient_lowers_every_loss(name):
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
    # The second photo has equal logits: probability 1/18.
    logits = torch.cat([one_sure_class(), torch.zeros(1, 18)])
    labels = torch.eye(18)[[3, 0]]
    expected = (math.log(2) + math.log(18)) / 2
    assert CrossEntropyLoss()(logits, labels).item() == approx(expected)
    weight = torch.ones(18)
    weight[3] = 3.0
    expected = (3 * math.log(2) + math.log(18)) / 2
    assert CrossEntropyLoss(weight)(logits, labels).item() == approx(expected)


def test_label_smoothing_by_hand():
    s = 0.1
    expected = (1 - s + s / 18) * math.log(2) + s * 17 / 18 * math.log(34)
    criterion = create_loss("label_smoothing", smoothing=s)
    assert criterion(one_sure_class(), torch.eye(18)[[3]]).item() == approx(expected)


def test_focal_by_hand_and_against_torchvision():
    loss = FocalLoss(gamma=2)(one_sure_class(), torch.eye(18)[[3]])
    assert loss.item() == approx(0.25 * math.log(2))
    # With two classes, the softmax is the sigmoid of the difference.
    pair = torch.full((30, 18), -1e4)
    pair[:, :2] = torch.randn(30, 2)
    labels = torch.arange(30) % 2
    expected = sigmoid_focal_loss(pair[:, 1] - pair[:, 0], labels.float(), alpha=-1, gamma=2,
                                  reduction="mean")
    assert FocalLoss(gamma=2)(pair, torch.eye(18)[labels]).item() == approx(expected.item())
    expected = CrossEntropyLoss()(LOGITS, TARGETS)
    assert FocalLoss(gamma=0)(LOGITS, TARGETS).item() == approx(expected.item())


def test_focal_has_a_finite_gradient_at_a_probability_of_one():
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
    targets = torch.eye(18)[torch.from_numpy(labels)]
    assert SoftF1Loss()(logits, targets).item() == approx(expected)


def test_class_weights_against_scikit_learn_and_by_hand():
    labels = np.repeat(np.arange(18), np.arange(1, 19))
    balanced = class_weights(labels, "balanced").numpy()
    expected = compute_class_weight("balanced", classes=np.arange(18), y=labels)
    assert balanced == pytest.approx(expected, rel=1e-5)
    # The weight of a class of 16 photos, divided by that of a class of 1 photo.
    for scheme, ratio in [("sqrt", 16 ** -0.5), ("effective", (1 - 0.999) / (1 - 0.999 ** 16))]:
        weights = class_weights(labels, scheme)
        assert (weights[15] / weights[0]).item() == pytest.approx(ratio, rel=1e-4)
        assert weights[torch.from_numpy(labels)].mean().item() == pytest.approx(1, abs=1e-5)
    assert class_weights(labels, "none") is None
    assert class_weights(np.array([0, 0, 1]), "balanced").tolist() == [0.75, 1.5] + [0] * 16


def test_f1_loss_refuses_class_weights():
    with pytest.raises(InputError, match="--criterion f1 takes no --class_weights"):
        create_loss("f1", torch.ones(18))


def test_a_target_between_two_classes_by_hand():
    logits, target = one_sure_class(), torch.zeros(1, 18)
    target[0, 3], target[0, 4] = 0.75, 0.25
    weight = torch.ones(18)
    weight[4] = 3.0
    photo_weight = 0.75 + 3 * 0.25
    assert CrossEntropyLoss(weight)(logits, target).item() == approx(
        photo_weight * (0.75 * math.log(2) + 0.25 * math.log(34)))
    assert FocalLoss(weight)(logits, target).item() == approx(
        photo_weight * (0.75 * 0.25 * math.log(2) + 0.25 * (33 / 34) ** 2 * math.log(34)))
