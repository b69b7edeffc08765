"""Makes what lies beside this file with transformers 5.24 and PEFT 0.21: python tests/data/hf-variant/make.py

- config.json, model.safetensors: a Sam3VisionModel with another rope_theta, eps and levels; its queries and keys are
  large, so that a wrong theta shows.
- expected.safetensors: an image and what the model gives for it.
- fields.json: the entries of transformers' config classes.
- adapters/NAME: LoRA adapters as PEFT saves them; merged.safetensors has the weights that they change, merged by PEFT.
"""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Sam3VisionConfig, Sam3VisionModel

HERE = Path(__file__).parent
BACKBONE = {
    "model_type": "sam3_vit_model",
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 84,
    "window_size": 3,
    "global_attn_indexes": [1],
    "pretrain_image_size": 42,
    "layer_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}
ADAPTERS = {
    "plain": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": r".*(q_proj|v_proj|fc1|proj1|proj2|projection)",
        "rank_pattern": {"fc1": 2, r"layers\.1\.attention\.q_proj": 3},
        "alpha_pattern": {"proj1": 11, r"layers\.[02]\..*v_proj": 5},
    },
    "rslora": {"r": 3, "lora_alpha": 4, "target_modules": ["k_proj", "o_proj", "fc2"], "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": True},
    "bias": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    "saved": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["layer_norm"]},
}


def new_model() -> Sam3VisionModel:
    """The same weights every time; biases, norms and positions are not left at their plain start."""
    torch.manual_seed(0)
    config = Sam3VisionConfig(backbone_config=BACKBONE, fpn_hidden_size=8, scale_factors=[2.0, 1.0, 0.5])
    model = Sam3VisionModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += torch.empty_like(weight).normal_(0, 0.1, generator=generator)
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight *= 12
    return model


model = new_model()
model.save_pretrained(HERE)
image = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    found = model(image)
expected = {"image": image}
for level, (feat, pos) in enumerate(zip(found.fpn_hidden_states, found.fpn_position_encoding, strict=True)):
    expected |= {f"sam3_feat_{level}": feat.contiguous(), f"sam3_pos_{level}": pos.contiguous()}
save_file(expected, HERE / "expected.safetensors")

whole = model.config.to_dict()
fields = {"sam3_vit_model": whole.pop("backbone_config"), "sam3_vision_model": whole}
(HERE / "fields.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")

base = dict(model.state_dict())
for name, options in ADAPTERS.items():
    folder = HERE / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(3)
    adapted = get_peft_model(new_model(), LoraConfig(**options))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:  # PEFT starts it at zero
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(key)))
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    if name in ("plain", "rslora"):
        merged = adapted.merge_and_unload().state_dict()
        changed = {key: value for key, value in merged.items() if not torch.equal(value, base[key])}
        save_file(changed, folder / "merged.safetensors")
