"""Vision models that nobody here wrote: architectures of transformers, small, with random weights and no downloads.

`dualtoken export --model benchmarks/foreign_zoo.py:NAME` takes each of them. A classifier's seed is the first whose
eager logits leave no photograph near a tie (CLEAR): which of two level classes comes first says nothing of a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Least distance of the two best logits of any photograph, in root mean squares of the logits. A target at 40 dB, the
# loosest of float16, is off by 0.01 of them.
CLEAR = 0.03
# Random batch normalisations one after the other blow rounding up: MobileNetV2 had 20 dB in PyTorch's own float16. They
# do so less where most units pass what they get, with biases this far above zero, and where no channel that hardly
# varies, below this part of its layer's mean variance, is stretched to one.
CALM = 1.0
FLOOR = 0.1


@dataclass(frozen=True)
class Foreign:
    """A model by the name of its function here, what kind of thing it is, and how it is exported."""

    name: str
    kind: str
    task: str = "classify"
    size: int = 64
    output_names: tuple[str, ...] = ()


def _make(seed: int, model: str, config: str, **options: Any) -> nn.Module:
    """The model of a configuration, with random weights by which pictures are told apart.

    Initialisations are made for training: at their 0.02 a deep network's outputs hardly depend on the picture, and then
    every top-1 is the same. So weights keep the variance of what they read; biases, gains and positions are random too,
    or a fault in them would not show; batch statistics are those of the built-in photographs; and the mean of the
    logits over those is taken off the classifier's bias.
    """
    import transformers

    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if tensor.is_floating_point() and not key.endswith(("running_mean", "running_var")):
                _fill(key, tensor, generator)
        _settle(made)
    return made


def _fill(key: str, tensor: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if "layer_scale" in key or "lambda1" in key or "logit_scale" in key:
        tensor.copy_(0.5 + 0.1 * noise)
    elif tensor.ndim == 1 and key.endswith("weight"):
        tensor.copy_(1 + 0.2 * noise)
    elif tensor.ndim == 1 or "position" in key or "relative" in key:
        tensor.copy_(0.1 * noise)
    elif key.endswith("weight"):
        tensor.copy_(noise / tensor[0].numel() ** 0.5)
        if tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[2] > 1:  # of a channel alone
            tensor[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2] += 1  # noise alone is what takes a map's edges
    else:
        tensor.copy_(0.1 * noise)


def _settle(made: nn.Module) -> None:
    """Batch statistics, and logits around zero, over the built-in photographs."""
    pictures = photographs()
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        norm.bias.add_(CALM)
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all that is seen
        norm.train()
    given = made(pixel_values=pictures)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()
        variance = norm.running_var
        assert variance is not None  # noqa: S101
        variance.copy_(variance.maximum(FLOOR * variance.mean()))  # what hardly varies would be rounding, blown up
    logits = getattr(given, "logits", None)
    if logits is None or logits.ndim != 2:
        return
    mean = made(pixel_values=pictures).logits.mean(0)
    for module in made.modules():
        if isinstance(module, nn.Linear) and module.out_features == len(mean) and module.bias is not None:
            module.bias.sub_(mean)


def clearness(model: nn.Module) -> float:
    """Of a classifier over the photographs: what CLEAR asks for."""
    with torch.no_grad():
        logits: Tensor = model(pixel_values=photographs()).logits
    best = logits.topk(2).values
    return float((best[:, 0] - best[:, 1]).min() / logits.square().mean().sqrt())


def photographs(size: int = 64) -> Tensor:
    """The built-in photographs as the models get them, (16, 3, size, size)."""
    from dualtoken_deploy.data.images import preprocess
    from dualtoken_deploy.data.pictures import open_pictures
    from dualtoken_deploy.spec import InputContract, TensorSpec

    contract = InputContract(TensorSpec("input", "float32", "NCHW", (1, 3, size, size)), "tensor", (size, size))
    pictures = open_pictures("photographs")
    return torch.stack([torch.from_numpy(preprocess(pictures[i].image, contract)) for i in range(len(pictures))])


def convnext(seed: int = 0) -> nn.Module:
    return _make(seed, "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[24, 32, 48, 64],
                 depths=[1, 1, 2, 1], num_labels=10, image_size=64)  # fmt: skip


def convnext_v2(seed: int = 0) -> nn.Module:
    return _make(seed, "ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[24, 32, 48, 64],
                 depths=[1, 1, 2, 1], num_labels=10, image_size=64)  # fmt: skip


def swin(seed: int = 1) -> nn.Module:
    return _make(seed, "SwinForImageClassification", "SwinConfig", image_size=64, patch_size=4, embed_dim=24,
                 depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10)  # fmt: skip


def swin_v2(seed: int = 1) -> nn.Module:
    return _make(seed, "Swinv2ForImageClassification", "Swinv2Config", image_size=64, patch_size=4, embed_dim=24,
                 depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10)  # fmt: skip


def vit(seed: int = 3) -> nn.Module:
    return _make(seed, "ViTForImageClassification", "ViTConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=10)  # fmt: skip


def beit(seed: int = 1) -> nn.Module:
    return _make(seed, "BeitForImageClassification", "BeitConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=10,
                 use_relative_position_bias=True)  # fmt: skip


def deit(seed: int = 2) -> nn.Module:
    return _make(seed, "DeiTForImageClassificationWithTeacher", "DeiTConfig", image_size=64, patch_size=8,
                 hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                 num_labels=10)  # fmt: skip


def dinov2(seed: int = 3) -> nn.Module:
    return _make(seed, "Dinov2ForImageClassification", "Dinov2Config", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, num_labels=10)  # fmt: skip


def mobilevit(seed: int = 5) -> nn.Module:
    return _make(seed, "MobileViTForImageClassification", "MobileViTConfig", image_size=64, hidden_sizes=[24, 32, 40],
                 neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96], num_attention_heads=4, num_labels=10)  # fmt: skip


def mobilenet_v2(seed: int = 1) -> nn.Module:
    return _make(seed, "MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=64, depth_multiplier=0.35,
                 num_labels=10)  # fmt: skip


def resnet(seed: int = 0) -> nn.Module:
    return _make(seed, "ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 2, 1], layer_type="basic", num_labels=10)  # fmt: skip


def regnet(seed: int = 0) -> nn.Module:
    return _make(seed, "RegNetForImageClassification", "RegNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 2, 1], groups_width=8, num_labels=10)  # fmt: skip


def efficientnet(seed: int = 0) -> nn.Module:
    return _make(seed, "EfficientNetForImageClassification", "EfficientNetConfig", image_size=64, width_coefficient=0.5,
                 depth_coefficient=0.5, hidden_dim=640, num_labels=10)  # fmt: skip


def pvt_v2(seed: int = 0) -> nn.Module:
    return _make(seed, "PvtV2ForImageClassification", "PvtV2Config", image_size=64, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], num_labels=10)  # fmt: skip


def poolformer(seed: int = 1) -> nn.Module:
    return _make(seed, "PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_labels=10)  # fmt: skip


def levit(seed: int = 0) -> nn.Module:
    return _make(seed, "LevitForImageClassification", "LevitConfig", image_size=64, hidden_sizes=[32, 48, 64],
                 num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[16, 16, 16], num_labels=10)  # fmt: skip


def segformer(seed: int = 0) -> nn.Module:
    return _make(seed, "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=32,
                 num_labels=5)  # fmt: skip


def yolos(seed: int = 0) -> nn.Module:
    return _make(seed, "YolosForObjectDetection", "YolosConfig", image_size=[64, 64], patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_detection_tokens=20,
                 num_labels=6)  # fmt: skip


def detr(seed: int = 0) -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
                                         layer_type="basic", out_features=["stage4"])  # fmt: skip
    return _make(seed, "DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, backbone_config=backbone,
                 use_pretrained_backbone=False, backbone=None, d_model=48, encoder_layers=2, decoder_layers=2,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
                 num_queries=20, num_labels=6)  # fmt: skip


def clip_vision(seed: int = 0) -> nn.Module:
    return _make(seed, "CLIPVisionModelWithProjection", "CLIPVisionConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, projection_dim=32)  # fmt: skip


def siglip_vision(seed: int = 0) -> nn.Module:
    return _make(seed, "SiglipVisionModel", "SiglipVisionConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)  # fmt: skip


def dpt(seed: int = 0) -> nn.Module:
    return _make(seed, "DPTForDepthEstimation", "DPTConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, backbone_out_indices=[0, 1, 2, 3],
                 neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16, is_hybrid=False)  # fmt: skip


ZOO = {
    row.name: row
    for row in (
        Foreign("convnext", "convolutions, layer scale"),
        Foreign("convnext_v2", "convolutions, response normalisation"),
        Foreign("swin", "shifted windows, relative position bias"),
        Foreign("swin_v2", "shifted windows, cosine attention, continuous position bias"),
        Foreign("vit", "transformer"),
        Foreign("beit", "transformer, relative position bias"),
        Foreign("deit", "transformer, two heads"),
        Foreign("dinov2", "transformer, layer scale"),
        Foreign("mobilevit", "convolutions and transformer"),
        Foreign("mobilenet_v2", "inverted residuals"),
        Foreign("resnet", "residual convolutions"),
        Foreign("regnet", "grouped convolutions, squeeze and excitation"),
        Foreign("efficientnet", "inverted residuals, squeeze and excitation"),
        Foreign("pvt_v2", "pyramid transformer"),
        Foreign("poolformer", "pooling as the mixer"),
        Foreign("levit", "convolutions and attention with biases"),
        Foreign("segformer", "segmentation", "segment"),
        Foreign("yolos", "detection by a transformer", "tensors", output_names=("logits", "pred_boxes")),
        Foreign("detr", "detection by queries", "tensors", output_names=("logits", "pred_boxes")),
        Foreign("clip_vision", "image encoder", "embed", output_names=("image_embeds",)),
        Foreign("siglip_vision", "image encoder, attention pooling", "embed", output_names=("pooler_output",)),
        Foreign("dpt", "depth", "tensors", output_names=("predicted_depth",)),
    )
}
