"""What the peers' programs share: the model, the images and the pixels' augmentation that ast_dist.train has, too."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ast_dist.arguments import parse_arguments
from ast_dist.config import ModelConfig
from ast_dist.data.index import Index
from ast_dist.model import build_model
from benchmarks.faults_runs import Tool, Training, torchrun

_PAD_PX = 4


@dataclass(frozen=True)
class PeerArguments:
    """Train as a peer does."""

    images: Path
    run_dir: Path
    model: str
    width: int
    num_classes: int
    epochs: int
    batch_size: int
    seed: int
    every_s: float = 0.0
    """Seconds between saves, where the tool has such a setting; 0 is its default, once an epoch."""


def parse_peer(argv: list[str]) -> PeerArguments:
    """A peer's arguments."""
    return parse_arguments(PeerArguments, argv, "peer")


def peer_model(arguments: PeerArguments) -> nn.Module:
    """The model, initialised alike on every rank."""
    torch.manual_seed(arguments.seed)
    return build_model(ModelConfig(name=arguments.model, width=arguments.width), arguments.num_classes)


def peer_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD as ast_dist.train has it, at a constant learning rate."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-5)


def peer_images(path: Path) -> TensorDataset:
    """Decoded training images, (N, 3, H, W) uint8, with their labels, (N,) int64."""
    content = torch.load(path, weights_only=True, mmap=True)
    return TensorDataset(content["images"], content["labels"])


def augmented(images: Tensor) -> Tensor:
    """Random crops of the padded images, flipped at random, as floats: by torch's global generator, as theirs do."""
    count, _, height, width = images.shape
    padded = F.pad(images, [_PAD_PX] * 4)
    tops, lefts = torch.randint(2 * _PAD_PX + 1, (2, count)).tolist()
    flips = torch.rand(count) < 0.5
    corners = enumerate(zip(tops, lefts, strict=True))
    crops = torch.stack([padded[row, :, top : top + height, left : left + width] for row, (top, left) in corners])
    crops[flips] = crops[flips].flip(-1)
    return crops.float().sub_(127.5).div_(64.0).contiguous(memory_format=torch.channels_last)


def write_images(train: Path, image_px: int, path: Path) -> None:
    """Decode a split's images for the peers, which thereby need no decoding while they train."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import resize

    index = Index.open(train)
    images = torch.empty((index.num_samples, 3, image_px, image_px), dtype=torch.uint8)
    handles = [shard.open("rb") for shard in index.shard_paths]
    for sample in range(index.num_samples):
        handle = handles[int(index.shard[sample])]
        handle.seek(int(index.offset[sample]))
        data = torch.frombuffer(bytearray(handle.read(int(index.size[sample]))), dtype=torch.uint8)
        image = decode_image(data, mode=ImageReadMode.RGB)
        images[sample] = image if image.shape[1:] == images.shape[2:] else resize(image, [image_px, image_px])
    for handle in handles:
        handle.close()
    torch.save({"images": images, "labels": torch.from_numpy(index.label[:].astype("int64"))}, path)


def _words(module: str, training: Training, run_dir: Path, epochs: int, every_s: float) -> list[str]:
    return [
        *("-m", module, "--images", str(training.images), "--run-dir", str(run_dir), "--model", training.model),
        *(
            "--width",
            str(training.width),
            "--num-classes",
            str(training.num_classes),
            "--epochs",
            str(epochs),
            "--batch-size",
            str(training.batch_size),
        ),
        *("--seed", str(training.seed), "--every-s", str(every_s)),
    ]


def torchvision_tool() -> Tool:
    """torchvision's reference training: a file an epoch, started again by a person."""

    def command(training: Training, run_dir: Path, epochs: int) -> list[str]:
        words = _words("benchmarks.faults_torchvision", training, run_dir, epochs, 0.0)
        return [*torchrun(training.processes, 0), *words]

    return Tool("torchvision reference", command, True, "once an epoch", "checkpoint.pth")


def lightning_tool(every_s: float) -> Tool:
    """Lightning with ModelCheckpoint and ckpt_path="last", started again by torchrun. every_s: 0 is its default.

    With torchrun's defaults its restarted ranks read the addresses that the killed ones left in the store, and hang in
    gloo's connect until the time-out of half an hour (pytorch#135712): it gets a store of its own for each attempt.
    """

    def command(training: Training, run_dir: Path, epochs: int) -> list[str]:
        words = _words("benchmarks.faults_lightning", training, run_dir, epochs, every_s)
        return [*torchrun(training.processes, 1_000_000), *words]

    saves = f"every {every_s:g} s" if every_s else "once an epoch"
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return Tool("Lightning", command, False, saves, "checkpoints/last.ckpt", own_store)


def argv() -> list[str]:
    """The program's arguments."""
    return sys.argv[1:]
