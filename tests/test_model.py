"""ast_dist/model.py: the model by its name, its optimizer, and the learning rate at any point of a run."""

import pytest
import torch
from torch import nn

from ast_dist.config import DataConfig, ModelConfig, OptimConfig
from ast_dist.errors import UserError
from ast_dist.model import Normalize, build_model, build_optimizer, lr_at


def small_cnn(**options):
    torch.manual_seed(0)
    return build_model(ModelConfig(name="small_cnn", width=8, **options), 10)


def images(count=6, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


class TestLearningRate:
    @pytest.mark.parametrize("schedule", ["cosine", "linear"])
    def test_it_rises_from_0_to_its_peak_and_falls_to_0(self, schedule):
        config = OptimConfig(lr=0.4, warmup_epochs=2, schedule=schedule)
        assert lr_at(0.0, 20, config) == 0.0
        assert lr_at(0.05, 20, config) == pytest.approx(0.2)
        assert lr_at(0.1, 20, config) == pytest.approx(0.4)
        assert lr_at(0.55, 20, config) == pytest.approx(0.2)  # half of the way down
        assert lr_at(1.0, 20, config) == pytest.approx(0.0, abs=1e-12)
        rates = [lr_at(step / 1000, 20, config) for step in range(1001)]
        assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)

    def test_cosine_and_linear_differ_between_their_ends(self):
        cosine, linear = (OptimConfig(lr=1.0, warmup_epochs=0, schedule=name) for name in ("cosine", "linear"))
        assert lr_at(0.25, 10, cosine) == pytest.approx(0.853553, abs=1e-6)
        assert lr_at(0.25, 10, linear) == pytest.approx(0.75)

    def test_without_warm_up_it_starts_at_its_peak(self):
        assert lr_at(0.0, 20, OptimConfig(lr=0.4, warmup_epochs=0)) == 0.4

    @pytest.mark.parametrize("warmup_epochs", [5, 8])
    def test_a_warm_up_longer_than_the_run_takes_its_first_30_percent(self, warmup_epochs):
        config = OptimConfig(lr=0.4, warmup_epochs=warmup_epochs)
        assert lr_at(0.15, 5, config) == pytest.approx(0.2)
        assert lr_at(0.3, 5, config) == pytest.approx(0.4)
        assert lr_at(0.999, 5, config) < 0.001


class TestOptimizer:
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_norms_and_biases_have_no_weight_decay_and_all_parameters_are_trained_once(self, name):
        model = small_cnn()
        decayed, plain = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3)).param_groups
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
        assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
        trained = [id(p) for group in (decayed, plain) for p in group["params"]]
        assert sorted(trained) == sorted(id(p) for p in model.parameters())

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_a_step_without_gradient_shrinks_weights_and_leaves_biases(self, name):
        model = nn.Linear(4, 3)
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.9))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert model.weight.norm() < weight.norm()
        torch.testing.assert_close(model.bias, bias, rtol=0, atol=0)

    def test_frozen_parameters_are_left_out(self):
        model = nn.Linear(4, 3)
        model.weight.requires_grad_(False)
        assert [len(group["params"]) for group in build_optimizer(model, OptimConfig()).param_groups] == [0, 1]

    def test_the_configuration_reaches_the_optimizer(self):
        sgd = build_optimizer(small_cnn(), OptimConfig(name="sgd", momentum=0.8))
        assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
        adamw = build_optimizer(small_cnn(), OptimConfig(name="adamw", momentum=0.8))
        assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.8, 0.999)

    def test_sgd_without_momentum_works(self):
        build_optimizer(small_cnn(), OptimConfig(name="sgd", momentum=0.0)).step()


class TestNorm:
    @staticmethod
    def others_change_a_samples_output(model):
        batch = images()
        changed = torch.cat([batch[:1], 1 - batch[1:]])
        with torch.no_grad():
            return not torch.allclose(model(batch)[0], model(changed)[0], atol=1e-6)

    def test_with_group_norm_a_samples_output_does_not_depend_on_its_batch(self):
        assert not self.others_change_a_samples_output(small_cnn(norm="group").train())

    def test_with_batch_norm_it_does_in_training_and_not_in_evaluation(self):
        assert self.others_change_a_samples_output(small_cnn().train())
        assert not self.others_change_a_samples_output(small_cnn().eval())

    @pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121"])
    def test_group_norm_replaces_every_batch_norm_of_any_model(self, name):
        model = build_model(ModelConfig(name=name, norm="group"), 10)
        kinds = {type(module) for module in model.modules()}
        assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
        with torch.no_grad():
            assert model.train()(images(2, side=64)).shape == (2, 10)

    def test_sync_norm_replaces_every_batch_norm(self):
        kinds = {type(module) for module in small_cnn(norm="sync").modules()}
        assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds

    @pytest.mark.parametrize("norm", ["group", "sync"])
    @pytest.mark.parametrize("name", ["squeezenet1_1", "convnext_tiny"])
    def test_a_model_without_batch_norm_has_none_to_replace(self, name, norm):
        with torch.device("meta"), pytest.raises(UserError) as caught:
            build_model(ModelConfig(name=name, norm=norm), 10)
        assert str(caught.value) == f"model.norm is {norm}, but {name} has no batch norm to replace. Use batch."


class TestModel:
    @pytest.mark.parametrize("side", [8, 16, 33, 64])
    def test_small_cnn_takes_images_of_8_to_64_pixels(self, side):
        assert small_cnn()(images(2, side)).shape == (2, 10)

    @pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vit_b_32", "googlenet", "inception_v3"])
    def test_a_model_gives_one_tensor_of_logits_in_training_too(self, name):
        side = 299 if name == "inception_v3" else 224
        with torch.device("meta"):
            logits = build_model(ModelConfig(name=name), 7).train()(torch.empty(2, 3, side, side))
        assert isinstance(logits, torch.Tensor) and logits.shape == (2, 7)

    def test_the_same_seed_gives_the_same_weights(self):
        one, other = (small_cnn().state_dict() for _ in range(2))
        assert all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize(
        ("name", "near"), [("resnet5", "resnet50"), ("smal_cnn", "small_cnn"), ("efficientnet-b0", "efficientnet_b0")]
    )
    def test_a_name_that_does_not_exist_gets_the_nearest(self, name, near):
        with pytest.raises(UserError) as caught:
            build_model(ModelConfig(name=name), 10)
        assert str(caught.value).startswith(f"model.name is {name}: ") and near in str(caught.value)

    def test_a_detection_model_is_not_a_classifier(self):
        with pytest.raises(UserError, match="no such classification model"):
            build_model(ModelConfig(name="fasterrcnn_resnet50_fpn"), 10)

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_weights_and_images_have_the_memory_format_asked_for(self, channels_last):
        model = small_cnn(channels_last=channels_last)
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        normalized = Normalize(DataConfig(), torch.device("cpu"), channels_last)(torch.zeros(2, 3, 8, 8).byte())
        assert model[3].weight.is_contiguous(memory_format=wanted)
        assert normalized.is_contiguous(memory_format=wanted)


def test_normalize_takes_mean_and_std_out_of_pixels_in_0_to_1():
    pixels = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    found = Normalize(config, torch.device("cpu"), True)(pixels)
    expected = (pixels / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_strided_stem_halves_the_side_of_the_first_stage_and_keeps_the_rest():
    plain, strided = small_cnn(), small_cnn(stem_stride=2)
    images = torch.randn(2, 3, 32, 32)
    sizes = {}
    for name, model in (("plain", plain), ("strided", strided)):
        model.eval()
        hooks = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        hooks[0].register_forward_hook(lambda _m, _i, output, name=name: sizes.update({name: output.shape[-1]}))
        assert model(images).shape == (2, 10)
    assert sizes == {"plain": 32, "strided": 16}
    tails = [[p.shape for p in model.parameters()][-14:] for model in (plain, strided)]
    assert tails[0] == tails[1]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 160, 200), (40, 3, 32, 32), (1, 3, 400, 400), (0, 3, 8, 8)])
def test_normalizing_some_images_at_a_time_changes_no_bit(shape, channels_last):
    config = DataConfig()
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255.0 for values in (config.mean, config.std))
    expected = (images.float() - mean) * (1.0 / std)
    normalize = Normalize(config, torch.device("cpu"), channels_last)
    assert torch.equal(normalize(images), expected)
    assert torch.equal(normalize(images, torch.bfloat16), expected.bfloat16())
