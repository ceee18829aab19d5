"""How much a sample still teaches the model."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def significance(logits: Tensor, labels: Tensor, loss_weight: float = 0.7, entropy_weight: float = 0.3) -> Tensor:
    """Score samples by their loss and the model's uncertainty.

    significance = loss_weight · cross-entropy + entropy_weight · entropy of the prediction, both in nats; the mix of
    the Sundew method's first implementation (adaptive-sparse-training 1.0.1).

    logits: (N, classes), any floating dtype. labels: (N,) int64, hard classes: smoothed or mixed labels would score
    the augmentation, not the sample. Returns (N,) float32, in float32 arithmetic whatever autocast does: in half
    precision log(0 + 1e-8) is NaN.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    loss = F.nll_loss(log_probabilities, labels, reduction="none")
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1)
    return loss_weight * loss + entropy_weight * entropy
