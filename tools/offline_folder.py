"""Make a folder of the packages that a GPU machine without a network lacks, which has PyTorch, Triton, NumPy,
TensorBoard and Matplotlib:

    python tools/offline_folder.py site --python 3.12
    PYTHONPATH=site python tools/gpu_check.py --out gpu.jsonl        (there)

Needs pip and a network here, and no GPU. bitsandbytes keeps its library for one release of CUDA only, which is a
thirtieth of its wheel. The folder holds compiled files for x86-64 Linux and one release of Python.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.checkpoint.whole import refuse_existing
from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
WITH_NEEDS = ("pydantic", "fire", "jinja2")
"""Packages that come with what they need, which is small."""
ALONE = ("bitsandbytes", "gguf", "safetensors", "sentencepiece", "protobuf", "tokenizers", "PyYAML", "tqdm")
"""Packages that come without: it is PyTorch or NumPy, or is not used here."""
FROM_SOURCE = ("fairscale",)
"""Packages in plain Python that have no wheel."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64")  # fmt: skip
MOST = 60_000_000
"""Bytes, beyond which something came along that should not have."""
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")


def main(target: str, python: str = "3.12", cuda: str = "13.0") -> None:
    """Make the new folder TARGET, to be put on PYTHONPATH.

    Args:
        target: a new folder.
        python: the release of Python there, such as 3.12.
        cuda: the release of CUDA that PyTorch was built for there, such as 13.0.
    """
    if not re.fullmatch(r"3\.1[1-9]", str(python)) or not re.fullmatch(r"\d+\.\d", str(cuda)):
        raise ConfigError(f"--python {python} --cuda {cuda}: expected releases such as 3.12 (3.11 at least) and 13.0.")
    folder = Path(str(target))
    refuse_existing(folder)
    with TemporaryDirectory() as aside:
        wheels = _download(Path(aside), str(python))
        made = Path(aside, "site")
        made.mkdir()
        for wheel in wheels:
            _unpack(wheel, made, str(cuda))
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        if size > MOST:
            raise ConfigError(f"The folder would have {size / 1e6:.1f} MB; expected {MOST / 1e6:.0f} at most.")
        shutil.copytree(made, folder)
    print(f"{folder}: {len(wheels)} packages for Python {python}, {size / 1e6:.1f} MB")


def _download(aside: Path, python: str) -> list[Path]:
    """Wheels of the releases in requirements.txt."""
    folder, pins = aside / "wheels", _pins()
    kind = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    kind += [word for platform in PLATFORMS for word in ("--platform", platform)]
    _pip("download", "-d", str(folder), *kind, *(pins[name.lower()] for name in WITH_NEEDS))
    _pip("download", "-d", str(folder), *kind, "--no-deps", *(pins[name.lower()] for name in ALONE))
    _pip("wheel", "-w", str(folder), "--no-deps", *(pins[name.lower()] for name in FROM_SOURCE))
    return sorted(folder.glob("*.whl"))


def _pins() -> dict[str, str]:
    """Name, in small letters -> name==release."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower(): line for line in lines if "==" in line}


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", words[0], "-q", *words[1:]], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"pip {words[0]} failed; is there a network?\n{done.stderr.strip()[-2000:]}")


def _unpack(wheel: Path, folder: Path, cuda: str) -> None:
    """A wheel is what is to be installed; of bitsandbytes' libraries, that for `cuda` and for a CPU.

    Raises `ConfigError` where it has none for `cuda`.
    """
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        libraries = {found[1]: name for name in names if (found := _LIBRARY.fullmatch(name))}
        kept = f"cuda{cuda.replace('.', '')}"
        if libraries and kept not in libraries:
            raise ConfigError(f"--cuda {cuda}: {wheel.name} has libraries for {', '.join(sorted(libraries))}.")
        needless = {name for kind, name in libraries.items() if kind not in (kept, "cpu")}
        packed.extractall(folder, [name for name in names if name not in needless])


if __name__ == "__main__":
    run_tool(from_command_line(main))
