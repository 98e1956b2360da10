"""Packages and dependencies. The ranges are wide; constraints.txt pins the set that is tested."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "deepspeed": ["deepspeed>=0.18"],
    "bnb": ["bitsandbytes>=0.48"],
    "xformers": ["xformers>=0.0.30"],
    "wandb": ["wandb>=0.18"],
    "datasets": ["datasets>=4"],  # from 4 on it runs no code of a data set
    "ocr": ["rapidocr>=3.4", "onnxruntime>=1.20"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "spacy": ["spacy>=3.7"],
}
EXTRAS["test"] = [
    *EXTRAS["bnb"],
    *EXTRAS["deepspeed"],
    *EXTRAS["ocr"],
    *EXTRAS["serve"],
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
]

setup(
    name="fastloop",
    version="0.1.0",
    description="LOOP (leave-one-out PPO) fine-tuning of text-to-image diffusion models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The folder kernels/ is installed as fastloop.kernels only: Hugging Face has a package of the name `kernels`.
    packages=[*find_packages(include=["fastloop", "fastloop.*"]), "fastloop.kernels"],
    package_dir={"fastloop.kernels": "kernels"},
    package_data={"fastloop": ["assets/**/*"], "fastloop.report": ["*.jinja", "*.css"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; sys_platform == 'linux'",  # PyTorch with CUDA brings its own; that for CPUs has none
        "diffusers>=0.37",
        "transformers>=5",
        "peft>=0.15",
        "httpx2>=2",
        "accelerate>=1.0",
        "safetensors>=0.5",
        "pydantic>=2.9",
        "pyyaml>=6",
        "jinja2>=3.1",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10",
        "psutil>=5.9",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastloop=fastloop.cli:main"]},
)
