"""The package. Settings of tools: pyproject.toml. Versions tested on machines without a GPU:
constraints-cpu.txt."""

from setuptools import find_packages, setup

PACKAGES = [
    f"{name}{children}"
    for name in ("lckv", "megatron_ext", "checkpoints_conversion", "tools")
    for children in ("", ".*")
]

# One reason for each: CONTRIBUTING.md, "Dependencies".
INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.17",
    "psutil>=5.9",
    "numpy>=1.26",
    "jsonargparse[signatures]>=4.40",
    "docstring-parser>=0.16",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "sentencepiece>=0.2",
    "tiktoken>=0.8",
    "transformers>=5",
    "huggingface-hub>=1.0",
    "packaging>=23.0",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "zstandard>=0.22",
    "tensorboard>=2.16",
]

EXTRAS_REQUIRE = {
    "gpu": ["transformer-engine[pytorch]>=2.0", "flash-attn>=2.7"],
    "wandb": ["wandb>=0.19"],
    "eval": ["lm-eval>=0.4.9"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.21"],
    "parquet": ["pyarrow>=15"],
    "gguf": ["gguf>=0.10", "accelerate>=1.1"],
    "dev": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.15",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
        "wandb>=0.19",
        "triton>=3.2; platform_system == 'Linux'",
        "lm-eval>=0.4.9",
        "fastapi>=0.115",
        "uvicorn>=0.34",
        "prometheus-client>=0.21",
        "openai>=2",
        "pyarrow>=15",
        "gguf>=0.10",
        "accelerate>=1.1",
    ],
}

setup(
    name="lckv-megatron",
    version="0.1.0",
    description="Pretraining of language models whose KV cache is small by construction, on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=PACKAGES),
    py_modules=["pretrain_lckv"],
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
