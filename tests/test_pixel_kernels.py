"""ast_dist/data/pixel_kernels.py: what torchvision's v2 transforms make of an image, each image by itself."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, v2

import ast_dist.augmenter
import ast_dist.data.batch
from ast_dist.augmenter import Augmenter
from ast_dist.data.batch import Batch
from ast_dist.data.pixel_draws import Kernel, Round, Space
from ast_dist.data.pixel_kernels import erase, transform
from ast_dist.data_config import DataConfig

BINS = 31
# Below 9 pixels torch takes a matrix product without fused additions, and a pixel may be one off.
SIDES = (12, 33, 224)
AUTO = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}


@pytest.fixture(autouse=True)
def one_thread():
    """The bits of torchvision's matrix products depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(count, side, seed=0):
    """Smooth and noisy images, some of them grey, flat or black."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand((count, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = 60 * torch.randn((count, 3, side, side), generator=generator)
    images = (smooth + noise * torch.rand((count, 1, 1, 1), generator=generator)).clamp(0, 255).to(torch.uint8)
    images[0::7] = images[0::7, :1]
    images[1::7] = images[1::7, :, :1, :1]
    if count > 13:
        images[13] = 0
    return images


def changed(images, *rounds):
    images = images.clone()
    for each in rounds:
        order = np.argsort(each.kernels, kind="stable")
        transform(images, each.kernels, torch.from_numpy(order), torch.from_numpy(each.parameters[order]))
    return images


def each_row(count, *parts):
    return tuple(np.resize(np.array(part), count) for part in parts)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", AUTO)
def test_every_operation_at_every_strength_is_torchvisions_bit_for_bit(kind, side):
    """Their operation is run by its name and magnitude, as their class looks it up."""
    theirs = AUTO[kind](interpolation=InterpolationMode.BILINEAR)
    space = Space(kind, side)
    assert space.names == list(theirs._AUGMENTATION_SPACE)
    strengths = range(0, BINS, 1 if side < 100 else 10)
    for operation, (name, (magnitudes, is_signed)) in enumerate(theirs._AUGMENTATION_SPACE.items()):
        images = pictures(2 * len(strengths), side, seed=operation)
        bins, signs = each_row(len(images), strengths, [False] * len(strengths) + [True] * len(strengths))
        ours = changed(images, space.look_up(np.full(len(images), operation), bins, signs))
        values = magnitudes(BINS, side, side)
        for row, (strength, is_negative) in enumerate(zip(bins.tolist(), signs.tolist(), strict=True)):
            magnitude = 0.0 if values is None else float(values[strength])
            magnitude = -magnitude if is_signed and is_negative else magnitude
            expected = theirs._apply_image_or_video_transform(
                images[row], name, magnitude, theirs.interpolation, theirs._fill
            )
            assert torch.equal(ours[row], expected), (name, strength, is_negative)


@pytest.mark.parametrize("kind", AUTO)
def test_an_image_is_what_torchvisions_class_makes_of_it_when_it_draws_the_same(kind):
    theirs, space, side = AUTO[kind](interpolation=InterpolationMode.BILINEAR), Space(kind, 40), 40
    images = pictures(60, side)
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        rounds = []
        for _ in range(theirs.num_ops if kind == "randaugment" else 1):
            name, (magnitudes, is_signed) = theirs._get_random_item(theirs._AUGMENTATION_SPACE)
            has_strength = magnitudes(BINS, side, side) is not None
            strength = 9
            if kind == "trivialaugment" and has_strength:
                strength = int(torch.randint(BINS, ()))
            is_negative = has_strength and is_signed and bool(torch.rand(()) <= 0.5)
            operation = space.names.index(name)
            rounds.append(space.look_up(*(np.array([value]) for value in (operation, strength, is_negative))))
        assert torch.equal(changed(image[None], *rounds)[0], expected)


@pytest.mark.parametrize("side", SIDES)
def test_colour_jitter_is_torchvisions_bit_for_bit_in_any_order(side):
    theirs = v2.ColorJitter(0.8, 0.7, 1.5, 0.5)
    images = pictures(28, side)
    kernels = (Kernel.BRIGHTNESS, Kernel.CONTRAST, Kernel.SATURATION, Kernel.HUE)
    rounds = [Round(np.zeros(len(images), np.int64), np.zeros((len(images), 6), np.float32)) for _ in kernels]
    expected = []
    for row, image in enumerate(images):
        torch.manual_seed(row)
        expected.append(theirs(image))
        torch.manual_seed(row)
        drawn = theirs.make_params([image])
        factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
        for place, which in enumerate(drawn["fn_idx"].tolist()):
            rounds[place].kernels[row] = kernels[which]
            rounds[place].parameters[row, :2] = factors[which], 1.0 - factors[which]
    assert torch.equal(changed(images, *rounds), torch.stack(expected))


def test_an_erased_box_is_what_torchvisions_class_erases():
    theirs = v2.RandomErasing(p=1.0)
    images = torch.randn(40, 3, 24, 24)
    boxes, expected = [], []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        drawn = theirs.make_params([image])
        expected.append(theirs.transform(image, drawn))
        boxes.append([drawn[name] for name in ("i", "j", "h", "w")])
    assert torch.equal(erase(images.clone(), torch.zeros(40, 4, dtype=torch.int64)), images)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours = erase(images.clone(memory_format=memory_format), torch.tensor(boxes))
        assert torch.equal(ours, torch.stack(expected))


@pytest.mark.parametrize("kernel", [kernel for kernel in Kernel if kernel != Kernel.NONE], ids=lambda k: k.name)
@pytest.mark.parametrize("side", [17, 33, 300])
def test_an_image_does_not_depend_on_the_others_in_its_batch(kernel, side):
    """Odd sides: vectorised loops have a remainder. 300 pixels: float32 sums of so many depend on their order."""
    images = pictures(15, side)
    parameters = np.zeros((15, 6), dtype=np.float32)
    turn = np.linspace(-0.5, 0.5, 15)
    if kernel == Kernel.AFFINE:
        parameters[:] = np.stack([np.cos(turn), -np.sin(turn), turn, np.sin(turn), np.cos(turn), turn], axis=1)
        parameters /= np.float32(side / 2)
    elif kernel == Kernel.HUE:
        parameters[:, 0] = turn
    elif kernel in (Kernel.POSTERIZE, Kernel.SOLARIZE):
        parameters[:, 0] = np.linspace(0, 255, 15).astype(int)
    else:
        parameters[:, 0], parameters[:, 1] = 1.0 + turn, -turn
    together = changed(images, Round(np.full(15, kernel), parameters))
    assert not torch.equal(together, images)
    for rows in ([4], [14, 2, 9], list(range(1, 14))):
        apart = changed(images[rows], Round(np.full(len(rows), kernel), parameters[rows]))
        assert torch.equal(apart, together[rows])


def test_images_of_a_pixel_or_two_pass_every_operation():
    for kind in AUTO:
        for side in (1, 2, 3):
            space = Space(kind, side)
            operations = np.arange(len(space.names))
            images = pictures(len(operations), side)
            out = changed(images, space.look_up(operations, np.full(len(operations), 30), operations % 2 == 0))
            assert out.shape == images.shape


class NoNewTensors(TorchFunctionMode):
    """Fails where a tensor is made of Python's numbers, which on a GPU is a copy that the host waits for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.asarray), func
        return func(*args, **(kwargs or {}))


class NoCopies(TorchDispatchMode):
    """Fails where a tensor goes from the host to the (meta) device: a copy outside `upload` waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            assert all(value.device.type == "meta" or value.ndim == 0 for value in tensors), func
        return out


def test_a_batch_is_augmented_without_waiting_for_the_device(monkeypatch):
    """On torch's meta device there is no value to read: item, nonzero or a mask as an index would raise."""
    copies = []

    def upload(tensor, device):
        copies.append(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    monkeypatch.setattr(ast_dist.augmenter, "upload", upload)
    monkeypatch.setattr(ast_dist.data.batch, "upload", upload)
    for kind in AUTO:
        config = DataConfig(image_size=20, auto_augment=kind, color_jitter=(0.4, 0.4, 0.4, 0.1), erase_share=0.5)
        batch = Batch(
            step=0,
            ids=torch.arange(300),
            images=pictures(300, 20),
            labels=torch.zeros(300, dtype=torch.int64),
            weights=torch.ones(300),
            is_active=torch.ones(300, dtype=torch.bool),
            planned=300,
        )
        with NoCopies(), NoNewTensors():
            augmented = Augmenter(config, 0, torch.device("meta"))(batch, 0)
            erased = erase(augmented.images.float(), augmented.erased)
        assert augmented.images.device.type == erased.device.type == "meta"
        assert augmented.images.shape == batch.images.shape
    assert copies


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_nearly_a_cpus_pixels_and_nobody_waits_for_it():
    config = DataConfig(image_size=40, auto_augment="trivialaugment", color_jitter=(0.4, 0.4, 0.4, 0.1))
    batch = Batch(
        step=0,
        ids=torch.arange(300),
        images=pictures(300, 40),
        labels=torch.zeros(300, dtype=torch.int64),
        weights=torch.ones(300),
        is_active=torch.ones(300, dtype=torch.bool),
        planned=300,
    )
    augment = Augmenter(config, 0, torch.device("cuda"))
    augment(batch, 0)  # loads kernels, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = augment(batch, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # One level off before an equalize or a contrast is more after it, in few pixels.
    difference = (augmented.images.cpu().int() - Augmenter(config, 0, torch.device("cpu"))(batch, 1).images.int()).abs()
    assert (difference > 1).float().mean() < 0.01
