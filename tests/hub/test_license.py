"""The licence in a card is that of the base model, where its card names one, and nothing else."""

import pytest
from hub_http_server import Repository
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from llada_trm_hf import DimensionCompressor, DimensionCompressorConfig, model_card

OTHER = "license: other\nlicense_name: llama3\nlicense_link: {}"
CASES = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "license: [mit, cc-by-4.0]": {"license": ["mit", "cc-by-4.0"]},
    OTHER.format("https://example.org/terms"): {
        "license": "other",
        "license_name": "llama3",
        "license_link": "https://example.org/terms",
    },
    "license: \"other: # 'x'\"": {"license": "other: # 'x'"},
    "tags: [a]": {},
    "license_name: llama3": {},
    "license: 3": {},
    "license: [": {},
    "[1, 2]": {},
    "": {},
}


def card_of(folder, base):
    config = DimensionCompressorConfig(hidden_size=8, compressed_size=4, backbone_name_or_path=base)
    DimensionCompressor(config).save_pretrained(folder)
    return ModelCard((folder / "README.md").read_text())


def license_fields(card):
    return {name: value for name, value in card.data.to_dict().items() if name.startswith("license")}


@pytest.mark.parametrize("metadata", CASES)
def test_license_of_a_base_in_a_folder(tmp_path, metadata):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{metadata}\n---\n# Base\n")
    assert license_fields(card_of(tmp_path / "model", str(base))) == CASES[metadata]


def test_base_without_a_card(tmp_path):
    (tmp_path / "base").mkdir()
    for base in (str(tmp_path / "base"), str(tmp_path / "nothing"), None, "no name of: a repository"):
        assert license_fields(card_of(tmp_path / "model", base)) == {}
    (tmp_path / "base/README.md").write_text("# Without metadata\nlicense: mit\n")
    assert license_fields(card_of(tmp_path / "model", str(tmp_path / "base"))) == {}


def test_license_of_a_base_in_the_cache(hub, monkeypatch, tmp_path):
    """Saving asks nobody; what lies in the cache is read. A link to a file beside the card leads there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    text = f"---\n{OTHER.format('./LICENSE')}\n---\n"
    hub.repositories["user/base"] = Repository(private=False)
    hub.repositories["user/base"].commit("main", {"README.md": text.encode()})
    assert license_fields(card_of(tmp_path / "model", "user/base")) == {} and hub.requests == []
    hf_hub_download("user/base", "README.md", cache_dir=tmp_path / "cache")
    asked = len(hub.requests)
    expected = {"license": "other", "license_name": "llama3"}
    expected["license_link"] = f"{hub.url}/user/base/blob/main/LICENSE"
    assert license_fields(card_of(tmp_path / "model", "user/base")) == expected
    assert len(hub.requests) == asked
    # Beside a card in a folder, which is nowhere on the Hub, the link would lead to nothing.
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(text)
    del expected["license_link"]
    assert license_fields(card_of(tmp_path / "other", str(tmp_path / "base"))) == expected


def test_given_license_comes_first(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text(f"---\n{OTHER.format('https://example.org')}\n---\n")
    card_of(tmp_path / "model", str(tmp_path / "base"))
    card = model_card(tmp_path / "model", "user/model", license='mit "x": #')
    assert license_fields(card) == {"license": 'mit "x": #'}
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
