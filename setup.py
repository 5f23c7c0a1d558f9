"""Package metadata of kdfast."""

from setuptools import find_packages, setup

setup(
    name="kdfast",
    version="0.1.0",
    description="Distil extractive question-answering readers, fast.",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["kdfast", "kdfast.*"]),
    package_data={"kdfast.demo": ["*.yaml", "domains/*.yaml", "teacher/*"]},
    install_requires=[
        "torch>=2.5",
        "triton>=3.1; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=1.26",
        "transformers>=5.0",
        "datasets>=4.0",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.16"],
        "test": [
            "pytest>=8.0",
            "pytest-benchmark>=5.0",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "tensorboard>=2.16",
        ],
    },
)
