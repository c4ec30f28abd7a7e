"""The loss of a large vocabulary in pieces is cross entropy, and so is its gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.vocabulary_loss import PIECE, vocabulary_loss


@pytest.mark.parametrize("rows", [1, PIECE, 2 * PIECE + 7])
def test_equals_cross_entropy(rows: int) -> None:
    features, teacher = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 24)
    projection, counted = torch.randn(90, 24), torch.rand(rows) < 0.7
    counted[0] = True
    wanted = cross_entropy((features @ projection.T)[counted], (teacher @ projection.T).softmax(-1)[counted])
    (gradient,) = torch.autograd.grad(3 * wanted, features)
    loss = vocabulary_loss(features, teacher, projection, counted)
    assert torch.allclose(loss, wanted, atol=1e-4)
    assert torch.allclose(torch.autograd.grad(3 * loss, features)[0], gradient, atol=1e-6)


def test_bfloat16_products_are_close() -> None:
    features, teacher = torch.randn(40, 24, requires_grad=True), torch.randn(40, 24)
    projection, counted = torch.randn(90, 24), torch.ones(40, dtype=torch.bool)
    exact = vocabulary_loss(features, teacher, projection, counted)
    near = vocabulary_loss(features, teacher, projection.bfloat16(), counted, torch.bfloat16)
    assert torch.allclose(near, exact, rtol=2e-2)
    assert near.dtype == torch.float32


def test_without_targets_nothing_is_learned() -> None:
    features = torch.randn(3, 4, requires_grad=True)
    loss = vocabulary_loss(features, features.detach(), torch.randn(5, 4), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros(3, 4))  # type: ignore[arg-type]
