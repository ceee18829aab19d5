"""Global top-1, top-5 and loss on the validation split."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ast_dist.data.loader import Loader
from ast_dist.distributed import World
from ast_dist.model import Normalize


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    world: World,
    normalize: Normalize,
    global_batch_size: int,
    autocast: torch.autocast,
    each_batch: Callable[[], None] = lambda: None,
    micro_batch_size: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Evaluate on every sample of the split, each on one rank.

    model: the bare module, not the DDP wrapper. each_batch: called before every batch, as often on every rank; what it
    raises ends the evaluation. micro_batch_size: samples forwarded at once, 0 for all. All ranks must call.
    Returns the scores and the damaged samples, the same on every rank: val/acc1 and val/acc5 (percent), val/loss (mean
    cross-entropy, nats) and val/samples_damaged; acc5 is counted among min(5, classes). Damaged samples are left out
    of the first three, and named in the list.
    """
    world.broadcast_buffers(model)
    was_training = model.training
    model.eval()
    correct = torch.zeros(3, dtype=torch.int64, device=world.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    damaged: list[str] = []
    try:
        for host_batch in loader.val_batches(global_batch_size):
            each_batch()
            damaged += host_batch.damaged
            batch = host_batch.to(world.device)
            images = normalize(batch.images)
            with autocast:
                logits = torch.cat([model(part) for part in images.split(micro_batch_size or len(images))])
            logits = logits.float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
            active = batch.is_active
            correct += torch.stack([(top[:, 0] & active).sum(), (top.any(dim=1) & active).sum(), active.sum()])
            loss_sum += torch.where(active, losses, 0.0).sum(dtype=torch.float64)
    finally:
        model.train(was_training)
    top1, top5, count = world.sum(correct).tolist()
    mean_loss = world.sum(loss_sum).item() / max(count, 1)
    all_damaged = sorted(text for texts in world.gather(damaged) for text in texts)
    scores = {
        "val/acc1": 100.0 * top1 / max(count, 1),
        "val/acc5": 100.0 * top5 / max(count, 1),
        "val/loss": mean_loss,
        "val/samples_damaged": len(all_damaged),
    }
    return scores, all_damaged
