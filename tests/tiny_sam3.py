"""Tiny SAM 3 of transformers with random weights: one checkpoint, from which all four of its models load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Sam3Config,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
    Sam3VideoConfig,
    Sam3VideoModel,
    Sam3VisionConfig,
    Sam3ViTConfig,
)

SIZE = 112
WIDTH = 128
"""Channels of features and of everything behind them."""


def vision_config() -> Sam3VisionConfig:
    """Four blocks over a grid of 8 x 8; two of them attend to windows."""
    backbone = Sam3ViTConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIZE,
        window_size=4,
        global_attn_indexes=[1, 3],
        pretrain_image_size=56,
    )
    sizes = [[SIZE // 14 * scale] * 2 for scale in (4, 2, 1)]
    return Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=WIDTH, backbone_feature_sizes=sizes)


def video_config() -> Sam3VideoConfig:
    """Detector and tracker around that encoder."""
    small: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 2}
    deep = {**small, "intermediate_size": 64, "num_layers": 1}
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    detector = Sam3Config(
        vision_config=vision_config(),
        text_config=text,
        geometry_encoder_config=deep,
        detr_encoder_config=deep,
        detr_decoder_config={**deep, "num_queries": 4},
        mask_decoder_config={**small, "num_upsampling_stages": 3},
    )
    tracker = Sam3TrackerVideoConfig(
        vision_config=vision_config(),
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIZE},
        mask_decoder_config={
            **small,
            "mlp_dim": 64,
            "iou_head_hidden_dim": 16,
            "attention_downsample_rate": 2,
        },
        image_size=SIZE,
        memory_attention_hidden_size=WIDTH,
        memory_attention_num_layers=1,
        memory_attention_num_attention_heads=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[SIZE // 14] * 2,
        memory_encoder_hidden_size=WIDTH,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=WIDTH,
        memory_fuser_embed_dim=WIDTH,
        memory_fuser_intermediate_dim=64,
        memory_fuser_num_layers=1,
    )
    return Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker, score_threshold_detection=0.2, new_det_thresh=0.2
    )


def save_model(folder: Path) -> Path:
    """Writes the checkpoint."""
    torch.manual_seed(0)
    model = Sam3VideoModel(video_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # transformers' 0.02 would leave every feature near nothing
                parameter.normal_(0, parameter[0].numel() ** -0.5)
        # objects are seen, so that masks are compared and not their absence
        model.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(4)
        model.detector_model.detr_decoder.presence_head.layer3.bias.fill_(4)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer that reads letters, beside the checkpoint."""
    letters = {chr(code): code for code in range(32, 127)} | {"<end>": 49407}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 49407)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", unk_token="<end>").save_pretrained(folder)
    return folder


def frames(count: int) -> Tensor:
    """Normalized images (count, 3, SIZE, SIZE) with coarse shapes in them."""
    coarse = torch.randn(count, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=SIZE).clamp(-1, 1)


def text_ids(text: str) -> tuple[Tensor, Tensor]:
    """Token numbers of a text and their mask, (1, letters + 1): by its letters, the last one ends it."""
    ids = torch.tensor([[*(ord(letter) for letter in text), 49407]])
    return ids, torch.ones_like(ids)


def load_model(kind: type[PreTrainedModel], folder: Path) -> Any:
    """Loads one of the four models from the checkpoint."""
    if kind is not Sam3TrackerModel:
        return kind.from_pretrained(folder).eval()
    # transformers 5.24 leaves 147 of its tensors out
    whole = Sam3TrackerVideoModel.from_pretrained(folder)
    model = Sam3TrackerModel(Sam3TrackerConfig(**whole.config.to_dict()))
    missing, _ = model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    return model.eval()


def make_sure(model: Any) -> Any:
    """Lifts all mask logits far above zero.

    Videos threshold a mask and read it again in the next frame: a pixel within rounding of zero may fall to either
    side, and then every later number differs by a thousandth.
    """
    tracker, detector = getattr(model, "tracker_model", model), getattr(model, "detector_model", None)
    with torch.no_grad():
        tracker.mask_decoder.upscale_conv2.bias += 3
        for layers in tracker.mask_decoder.output_hypernetworks_mlps:
            layers.proj_out.bias += 1
        if detector is not None:
            detector.mask_decoder.instance_projection.bias += 1
            detector.mask_decoder.mask_embedder.layers[-1].bias += 0.5
    return model
