"""Vision models that nobody here wrote: architectures of transformers, small, with random weights and no downloads.

`dualtoken export --model benchmarks/foreign_zoo.py:NAME` takes each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Foreign:
    """A model by the name of its function here, what kind of thing it is, and how it is exported."""

    name: str
    kind: str
    task: str = "classify"
    size: int = 64
    output_names: tuple[str, ...] = ()


def _make(model: str, config: str, **options: Any) -> nn.Module:
    """The model of a configuration; biases, gains and statistics are random too, or a fault in them would not show."""
    import transformers

    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif "layer_scale" in name or "lambda1" in name:
                tensor.copy_(0.5 + 0.1 * noise)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim == 1 or "position" in name or "relative" in name:
                tensor.copy_(0.1 * noise)
    return made


def convnext() -> nn.Module:
    return _make("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[24, 32, 48, 64], depths=[1, 1, 2, 1],
                 num_labels=10, image_size=64)  # fmt: skip


def convnext_v2() -> nn.Module:
    return _make("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[24, 32, 48, 64],
                 depths=[1, 1, 2, 1], num_labels=10, image_size=64)  # fmt: skip


def swin() -> nn.Module:
    return _make("SwinForImageClassification", "SwinConfig", image_size=64, patch_size=4, embed_dim=24, depths=[2, 2],
                 num_heads=[2, 4], window_size=4, num_labels=10)  # fmt: skip


def swin_v2() -> nn.Module:
    return _make("Swinv2ForImageClassification", "Swinv2Config", image_size=64, patch_size=4, embed_dim=24,
                 depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10)  # fmt: skip


def vit() -> nn.Module:
    return _make("ViTForImageClassification", "ViTConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=10)  # fmt: skip


def beit() -> nn.Module:
    return _make("BeitForImageClassification", "BeitConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=10,
                 use_relative_position_bias=True)  # fmt: skip


def deit() -> nn.Module:
    return _make("DeiTForImageClassificationWithTeacher", "DeiTConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_labels=10)  # fmt: skip


def dinov2() -> nn.Module:
    return _make("Dinov2ForImageClassification", "Dinov2Config", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, num_labels=10)  # fmt: skip


def mobilevit() -> nn.Module:
    return _make("MobileViTForImageClassification", "MobileViTConfig", image_size=64, hidden_sizes=[24, 32, 40],
                 neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96], num_attention_heads=4, num_labels=10)  # fmt: skip


def mobilenet_v2() -> nn.Module:
    return _make("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=64, depth_multiplier=0.35,
                 num_labels=10)  # fmt: skip


def resnet() -> nn.Module:
    return _make("ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 2, 1], layer_type="basic", num_labels=10)  # fmt: skip


def regnet() -> nn.Module:
    return _make("RegNetForImageClassification", "RegNetConfig", embedding_size=16, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 2, 1], groups_width=8, num_labels=10)  # fmt: skip


def efficientnet() -> nn.Module:
    return _make("EfficientNetForImageClassification", "EfficientNetConfig", image_size=64, width_coefficient=0.5,
                 depth_coefficient=0.5, hidden_dim=640, num_labels=10)  # fmt: skip


def pvt_v2() -> nn.Module:
    return _make("PvtV2ForImageClassification", "PvtV2Config", image_size=64, hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], num_labels=10)  # fmt: skip


def poolformer() -> nn.Module:
    return _make("PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_labels=10)  # fmt: skip


def levit() -> nn.Module:
    return _make("LevitForImageClassification", "LevitConfig", image_size=64, hidden_sizes=[32, 48, 64],
                 num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[16, 16, 16], num_labels=10)  # fmt: skip


def segformer() -> nn.Module:
    return _make("SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[16, 24, 32, 48],
                 depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=32,
                 num_labels=6)  # fmt: skip


def yolos() -> nn.Module:
    return _make("YolosForObjectDetection", "YolosConfig", image_size=[64, 64], patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, num_detection_tokens=20,
                 num_labels=6)  # fmt: skip


def detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
                                         layer_type="basic", out_features=["stage4"])  # fmt: skip
    return _make("DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, backbone_config=backbone,
                 use_pretrained_backbone=False, backbone=None, d_model=48, encoder_layers=2, decoder_layers=2,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
                 num_queries=20, num_labels=6)  # fmt: skip


def clip_vision() -> nn.Module:
    return _make("CLIPVisionModelWithProjection", "CLIPVisionConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, projection_dim=32)  # fmt: skip


def siglip_vision() -> nn.Module:
    return _make("SiglipVisionModel", "SiglipVisionConfig", image_size=64, patch_size=8, hidden_size=48,
                 num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)  # fmt: skip


def dpt() -> nn.Module:
    return _make("DPTForDepthEstimation", "DPTConfig", image_size=64, patch_size=8, hidden_size=48,
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
