"""torchvision's reference way to train and to go on: `torchrun … -m benchmarks.faults_torchvision …`.

Checkpointing as in pytorch/vision, references/classification/train.py: once an epoch, rank 0 writes model_N.pth and
checkpoint.pth with torch.save, over the file that stands there; --resume reads checkpoint.pth and begins at the next
epoch. The rest (model, images, pixels) is what the other tools train; evaluation is left out, and random generators
are seeded, which the reference does not do.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ast_dist import startup
from benchmarks.faults_peers import argv, augmented, parse_peer, peer_images, peer_model, peer_optimizer
from benchmarks.faults_record import Record


def main() -> None:
    """Train to the end, from the newest checkpoint where there is one."""
    startup.note("imported_s")
    arguments = parse_peer(argv())
    dist.init_process_group("gloo")
    startup.note("joined_s")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    record = Record(arguments.run_dir) if rank == 0 else None
    dist.barrier()
    dataset = peer_images(arguments.images)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=arguments.batch_size // world_size, sampler=sampler)
    model = peer_model(arguments)
    torch.manual_seed(arguments.seed + 1 + rank)
    optimizer = peer_optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    parallel = DistributedDataParallel(model)
    startup.note("built_s")
    first_epoch = 0
    resume = arguments.run_dir / "checkpoint.pth"
    if resume.exists():
        checkpoint = torch.load(resume, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["lr_scheduler"])
        first_epoch = checkpoint["epoch"] + 1
    step = first_epoch * len(loader)
    if record:
        record.started(step)
    for epoch in range(first_epoch, arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                logits = parallel(augmented(images))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if record:
                record.step_done(step)
        schedule.step()
        if record:
            began = time.perf_counter()
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": schedule.state_dict(),
                "epoch": epoch,
            }
            save_epoch(checkpoint, arguments.run_dir, epoch)
            record.saved(time.perf_counter() - began)
    if record:
        record.ended(step, model.state_dict())
    dist.destroy_process_group()


def save_epoch(checkpoint: object, folder: Path, epoch: int) -> None:
    """Write both files that the reference writes."""
    torch.save(checkpoint, folder / f"model_{epoch}.pth")
    torch.save(checkpoint, folder / "checkpoint.pth")


if __name__ == "__main__":
    main()
