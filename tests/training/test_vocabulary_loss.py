"""The loss of a large vocabulary in pieces is cross entropy, and so is its gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.vocabulary_loss import PIECE, vocabulary_loss


@pytest.mark.parametrize("rows", [1, PIECE, 2 * PIECE + 7])
def test_equals_cross_entropy(rows: int) -> None:
    features = torch.randn(rows, 24, requires_grad=True)
    projection, targets = torch.randn(90, 24), torch.randint(-2, 90, (rows,))
    targets[0] = 5
    wanted = cross_entropy(features @ projection.T, targets.clamp(min=-1), ignore_index=-1)
    (gradient,) = torch.autograd.grad(3 * wanted, features)
    loss = vocabulary_loss(features, projection, targets)
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(3 * loss, features)[0], gradient, atol=1e-6)


def test_bfloat16_products_are_close() -> None:
    features, projection = torch.randn(40, 24, requires_grad=True), torch.randn(90, 24)
    targets = torch.randint(0, 90, (40,))
    exact = vocabulary_loss(features, projection, targets)
    near = vocabulary_loss(features, projection.bfloat16(), targets, torch.bfloat16)
    assert torch.allclose(near, exact, rtol=2e-2)
    assert near.dtype == torch.float32


def test_without_targets_nothing_is_learned() -> None:
    features = torch.randn(3, 4, requires_grad=True)
    loss = vocabulary_loss(features, torch.randn(5, 4), torch.tensor([-1, -2, -1]))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros(3, 4))  # type: ignore[arg-type]
