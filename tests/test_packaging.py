"""What is installed, who may import whom, and which torch the set-up picks."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = {"accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "triton"}


def python(code: str, **environment: str) -> str:
    """Run code in a new interpreter in the repository's folder, which is then on its sys.path."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def sources(root: str) -> list[Path]:
    files = sorted((REPOSITORY / root).rglob("*.py"))
    assert files, root
    return files


def imported(file: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {file}"
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_folder_kernels_is_no_package():
    assert not (REPOSITORY / "kernels/__init__.py").exists()
    find = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    # with the checkout on sys.path it is a namespace without a file, which transformers skips
    assert python(find) == "None" or str(REPOSITORY) not in python(find)
    # and as the image and the Makefile run Python, it is not to be seen at all
    safe = python(
        find.replace("s and s.origin", "s and s.submodule_search_locations"), PYTHONSAFEPATH="1"
    )
    assert str(REPOSITORY) not in safe


def test_transformers_loads_a_model_class_from_the_checkout():
    assert python("from transformers import LlamaForCausalLM; print('loaded')") == "loaded"


def test_a_bad_command_line_needs_no_torch():
    code = "import sys, lora_train.cli, lora_train.quickstart; print(*sys.modules)"
    assert not HEAVY & set(python(code).split())


def test_imports_point_one_way():
    for file in sources("kernels/lora_kernels"):
        assert "lora_train" not in imported(file), file
        # the bridge alone knows more than torch and triton
        if not file.name.startswith("peft_"):
            allowed = {"torch", "triton", "lora_kernels"} | set(sys.stdlib_module_names)
            assert imported(file) <= allowed, file
    for file in sources("lora_train") + sources("kernels/lora_kernels"):
        assert not imported(file) & {"tests", "benchmarks", "kernels"}, file


def test_the_wheel_holds_the_two_packages_and_their_data(tmp_path):
    # built from a copy: setuptools leaves build/ and an egg-info where it works
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("lora_train", "kernels", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("lora_hpc-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "lora_kernels",
        "lora_train",
    }
    assert "lora_train/quickstart.txt" in names
    for recipe in (REPOSITORY / "lora_train/recipes").glob("*.yaml"):
        assert f"lora_train/recipes/{recipe.name}" in names
    for table in (REPOSITORY / "kernels/lora_kernels/launch_tables").glob("*/*.json"):
        assert str(table.relative_to(REPOSITORY / "kernels")) in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_the_lock_pins_everything_but_torch_by_hash(lock):
    blocks = re.split(r"\n(?=\S)", (REPOSITORY / lock).read_text())
    pins = [block for block in blocks if not block.startswith("#")]
    assert len(pins) > 40
    for pin in pins:
        assert re.match(r"[a-z0-9._-]+==\S+", pin), pin
        assert "--hash=sha256:" in pin, pin
    assert not any(re.match(r"(torch|nvidia-(?!ml-py).*|cuda-.*)==", pin) for pin in pins)
    assert "://" not in "\n".join(pins)


@pytest.mark.parametrize(
    ("header", "driver", "capability", "expected"),
    [
        ("CUDA Version: 13.0", "580.65.06", "9.0", "cu130: NVIDIA driver 580.65.06 runs CUDA 13"),
        ("CUDA UMD Version: 13.2", "595.10", "12.0", "cu130: NVIDIA driver 595.10 runs CUDA 13"),
        ("CUDA Version: 12.4", "550.54.15", "8.0", "cu126: NVIDIA driver 550.54.15 runs CUDA 12"),
        ("CUDA Version: 11.8", "520.61.05", "8.0", "error: the NVIDIA driver 520.61.05 (CUDA 11)"),
        ("CUDA Version: 12.8", "570.86.10", "10.0", "update the driver to 580 or newer"),
    ],
)
def test_torch_is_chosen_by_the_driver(tmp_path, header, driver, capability, expected):
    stub = tmp_path / "nvidia-smi"
    stub.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  *driver_version*) echo "{driver}" ;;\n'
        f'  *compute_cap*) echo "{capability}" ;;\n'
        f'  *) echo "| NVIDIA-SMI {driver}    Driver Version: {driver}    {header}  |" ;;\n'
        "esac\n"
    )
    stub.chmod(0o755)
    assert expected in choose_torch(tmp_path)


def test_torch_for_the_cpu_without_a_working_driver(tmp_path):
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\necho 'could not communicate with the NVIDIA driver'; exit 9\n")
    stub.chmod(0o755)
    assert choose_torch(tmp_path) == "cpu: nvidia-smi finds no working driver"
    assert choose_torch(tmp_path, TORCH_CUDA="cu126") == "cu126: TORCH_CUDA=cu126"


def choose_torch(stubs: Path, **environment: str) -> str:
    result = subprocess.run(
        [REPOSITORY / "setup/install.sh", "choose-torch"],
        env={
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "TORCH_VERSION": "2.13.0",
            "TORCH_CUDA": "auto",
            "TORCH_INDEX": "",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    return (result.stdout + result.stderr).strip()
