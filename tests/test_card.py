"""The folder for the Hugging Face Hub: its card says what the manifest says, renders, and passes the Hub's check."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from exporting import checkpoint_of, config_of, neck_export_cli, trace_quickly
from test_triton import write_plan

from engines.builder.onnx_graph import BuildError
from engines.card import base_model, card_text, write_card
from export import export_encoder
from export.contract.manifest import ManifestError, check_files, read_manifest

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install '.[hub]'")


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A verified FP16 file of a checkpoint."""
    trace_quickly(monkeypatch)
    checkpoint, config = checkpoint_of("meta-dual"), config_of("meta-dual")
    return export_encoder(checkpoint, tmp_path / "e.onnx", config=config, precision="fp16", neck="both").path


def rendered(text: str) -> str:
    """The card as HTML, by a Markdown parser that the command line's own dependencies bring."""
    from markdown_it import MarkdownIt

    return MarkdownIt().enable("table").render(text.split("---\n", 2)[2])


def test_the_card_says_what_the_manifest_says(exported: Path) -> None:
    ran = neck_export_cli("inspect", exported, "--card")
    folder = exported.with_name("e-hub")
    assert ran.code == 0 and ran.out.splitlines()[-1].endswith(f"hf upload OWNER/NAME {folder}")
    assert {path.name for path in folder.iterdir()} == {"README.md", "e.onnx", "e.onnx.data", "e.json"}
    manifest = read_manifest(folder / "e.json", "onnx")
    check_files(folder / "e.json", manifest)
    text = (folder / "README.md").read_text()
    for row in manifest["verification"]["outputs"]:
        assert f"| `{row['name']}` | {row['relative_l2']:.2e} | {row['cosine']:.8f} |" in text
    for said in (manifest["versions"]["torch"], manifest["weights"]["sha256"], "--precision fp16", "TensorRT 10.0"):
        assert said in text
    assert "112x112 pixels" in text and "sam2_feat_3" in text and "passed" in text
    assert str(exported.parent) not in text + (folder / "e.json").read_text()  # nothing of this machine
    assert str(checkpoint_of("meta-dual").parent) not in text + (folder / "e.json").read_text()
    again = neck_export_cli("inspect", exported, "--card")  # a card of ours is replaced
    assert again.code == 0 and (folder / "README.md").read_text() == text


def test_the_card_renders(exported: Path) -> None:
    manifest = read_manifest(exported.with_suffix(".json"), "onnx")
    html = rendered(card_text("e.onnx", manifest))
    assert html.count("<table>") == 3 and html.count("<h2>") == 5
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    broken = rendered(card_text("e.onnx", manifest).replace("| --- | --- | --- |\n", "| --- |\n", 1))
    assert broken.count("<table>") == 2  # the control


def test_the_metadata_passes_the_hubs_own_check(exported: Path) -> None:
    (folder, *_) = write_card(exported)
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.base_model == "facebook/sam3" and card.data.license == "other"
    assert card.data.license_name == "sam-license" and card.data.license_link.startswith("https://huggingface.co/")
    assert card.data.to_dict()["library_name"] == "onnx" and {"sam3", "fp16", "onnx"} <= set(card.data.tags)
    assert hub.ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    bad = str(card).replace("tags:\n", "tags: x\n", 1)
    with pytest.raises(Exception, match=r"yaml|YAML|block|mapping|expected"):
        _ = hub.ModelCard(bad).data  # the control


def test_what_the_weights_are_decides_license_and_base(exported: Path) -> None:
    manifest = read_manifest(exported.with_suffix(".json"), "onnx")
    assert base_model({"hub": {"repository": "someone/tuned", "commit": "0" * 40, "file": "a"}}) == "someone/tuned"
    random = manifest | {"weights": {"random": True, "seed": 3}}
    text = card_text("e.onnx", random)
    assert (
        "license: other" not in text
        and "base_model" not in text
        and "The weights are random" in text
        and "--seed 3" in text
    )
    failed = manifest["verification"] | {"verified": False}
    assert "FAILED" in card_text("e.onnx", manifest | {"verification": failed})
    unverified = card_text("e.onnx", manifest | {"verification": {"verified": False, "reason": "not asked"}})
    assert "was not verified: not asked" in unverified and "passed" not in unverified


def test_a_plan_has_a_card(tmp_path: Path) -> None:
    plan = tmp_path / "e.plan"
    write_plan(plan)
    text = (write_card(plan)[0] / "README.md").read_text()
    manifest = read_manifest(tmp_path / "e.plan.json", "plan")
    assert "library_name: tensorrt" in text and manifest["tensorrt_version"] in text
    assert hub.ModelCard(text).data.to_dict()["library_name"] == "tensorrt" and "<table>" in rendered(text)
    assert "later" not in text
    manifest["options"] |= {"version_compatible": True, "hardware_compatible": "ampere+"}
    text = card_text("e.plan", manifest)
    assert "or with a later version" in text and "compute capability 8.0 and later" in text


def test_what_cannot_be_a_card_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"missing\.onnx"):
        write_card(tmp_path / "missing.onnx")
    (tmp_path / "e-hub").mkdir()
    (tmp_path / "e-hub" / "mine.txt").write_text("mine")
    with pytest.raises(BuildError, match="e-hub"):
        write_card(exported)
    assert (tmp_path / "e-hub" / "mine.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "e-hub")
    exported.write_bytes(exported.read_bytes() + b" ")
    with pytest.raises(ManifestError, match=r"e\.onnx"):
        write_card(exported)
    assert not (tmp_path / "e-hub").exists()
