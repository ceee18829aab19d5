"""The model, its optimizer, and the learning rate as a pure function of progress."""

import difflib
import math

import torch
import torchvision
from torch import Tensor, nn

from ast_dist.config import DataConfig, ModelConfig, OptimConfig
from ast_dist.errors import UserError

_GROUPS = 8
_VALUES_AT_ONCE = 150_528  # one image of 224 × 224
# A trial run of one or two epochs would otherwise end at the peak of the learning rate.
_LONGEST_WARMUP = 0.3


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build a classifier with `num_classes` outputs: small_cnn or a torchvision model by name.

    Raises UserError for a name that torchvision does not know, and for another norm where there is no batch norm.
    """
    if config.name == "small_cnn":
        model: nn.Module = SmallCnn(num_classes, config.width, config.stem_stride)
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if config.name not in known:
            near = difflib.get_close_matches(config.name, [*known, "small_cnn"], n=3)
            hint = f" Perhaps you meant: {', '.join(near)}." if near else ""
            raise UserError(f"model.name is {config.name}: torchvision has no such classification model.{hint}")
        # These two would give the logits of auxiliary heads beside the classifier's, which no other model has.
        options = {"aux_logits": False, "init_weights": True} if config.name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **options)
    if config.norm != "batch" and not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise UserError(f"model.norm is {config.norm}, but {config.name} has no batch norm to replace. Use batch.")
    if config.norm == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif config.norm == "group":
        _replace_batch_norm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def _replace_batch_norm(module: nn.Module) -> None:
    """Put group norm where batch norm is: a sample's output then does not depend on the rest of its batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(math.gcd(_GROUPS, child.num_features), child.num_features))
        else:
            _replace_batch_norm(child)


class SmallCnn(nn.Sequential):
    """Six 3 × 3 convolutions in three stages with pooling between, for images of 8 to 64 pixels.

    width: channels of the first stage; the next ones have two and four times as many. stem_stride: 2 puts one 4 × 4
    convolution of that stride in the place of the first stage and its pooling, which took most of the time.
    """

    def __init__(self, num_classes: int, width: int = 64, stem_stride: int = 1) -> None:
        def conv(channels_in: int, channels_out: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
            return [
                nn.Conv2d(channels_in, channels_out, size, stride, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(inplace=True),
            ]

        plain_stem = [*conv(3, width), *conv(width, width), nn.MaxPool2d(2)]
        super().__init__(
            *(plain_stem if stem_stride == 1 else conv(3, width, 2 * stem_stride, stem_stride)),
            *conv(width, 2 * width),
            *conv(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *conv(2 * width, 4 * width),
            *conv(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )


class Normalize:
    """Turns uint8 images into the model's input, on the device."""

    def __init__(self, config: DataConfig, device: torch.device, channels_last: bool) -> None:
        self._mean = torch.tensor(config.mean, device=device).view(1, 3, 1, 1) * 255.0
        self._scale = 1.0 / (torch.tensor(config.std, device=device).view(1, 3, 1, 1) * 255.0)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """images: (n, 3, H, W) uint8. Returns (n, 3, H, W) of `dtype` with the configured mean and std taken out.

        Half precision is rounded from float32, as autocast does it before a model's first convolution.
        """
        floats = torch.empty(images.shape, device=images.device, memory_format=self._format)
        # On a CPU a few images at a time, whose floats stay in its cache from one operation to the next.
        at_once = max(1, _VALUES_AT_ONCE // max(1, images[:1].numel())) if images.device.type == "cpu" else len(images)
        for first in range(0, len(images), at_once or 1):
            part = slice(first, first + at_once)
            torch.mul(torch.sub(images[part], self._mean), self._scale, out=floats[part])
        return floats.to(dtype)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer; parameters with fewer than two dimensions (norms, biases) have no weight decay.

    On a GPU it is fused: one kernel that can leave everything as it is when the gradient is not finite.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = True if any(p.device.type == "cuda" for p in (*decayed, *plain)) else None
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def lr_at(progress: float, epochs: int, config: OptimConfig) -> float:
    """Learning rate at a point of the run, a pure function: a resumed or gated run needs no scheduler state.

    progress: data passes done over all data passes, 0 … 1. A gated epoch is one pass, so a run that skips samples
    goes through the same schedule as one that does not.
    """
    warmup = min(config.warmup_epochs / epochs, _LONGEST_WARMUP)
    if progress < warmup:
        return config.lr * progress / warmup
    done = (progress - warmup) / (1.0 - warmup)
    return config.lr * (0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done)
