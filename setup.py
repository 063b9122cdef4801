"""llada-trm-hf: latent recursion for language models, Hugging Face-native."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": [
        "accelerate>=1.15",
        "datasets>=5.1",
        "pyyaml>=6.0.1",
        "tqdm>=4.66.3",
        "filelock>=3.16",
        "peft>=0.20",
        "scipy>=1.13",
        "math-verify>=0.9",
    ],
    "rl": ["trl>=1.14", "scipy>=1.13", "math-verify>=0.9"],
    "eval": ["lm-eval>=0.4.13", "accelerate>=1.15", "peft>=0.20", "scipy>=1.13"],
    "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5.7"],
    "demo": ["matplotlib>=3.9"],
    "quantize": ["torchao>=0.18", "bitsandbytes>=0.50", "accelerate>=1.15"],
}
EXTRAS["dev"] = [
    *EXTRAS["train"],
    *EXTRAS["demo"],
    *EXTRAS["rl"],
    *EXTRAS["eval"],
    *EXTRAS["onnx"],
    *EXTRAS["quantize"],
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.6.1",
    "ruff>=0.12",
    "tensorboard>=2.18",
    "types-pyyaml",
    "types-tqdm",
]

setup(
    name="llada-trm-hf",
    version="0.1.0",
    description="Latent recursion for language models: LLaDA with a recursive refiner, Hugging Face-native",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["llada_trm_hf", "llada_trm_hf.*"]),
    package_data={"llada_trm_hf": ["py.typed", "recipes/*.yaml", "inspection/*.html", "hub/*.md"]},
    install_requires=["torch>=2.10", "transformers>=5.18", "safetensors>=0.8", "huggingface_hub>=1.31"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["llada-trm = llada_trm_hf.cli.main:main"]},
)
