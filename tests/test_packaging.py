"""The package imports where GPU, triton and cuda-python are missing, and its pins are complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINS = {
    path.stem: [
        line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-c"))
    ]
    for path in (ROOT / "constraints").glob("*.txt")
}


def name_of(requirement: str) -> str:
    return re.split(r"[\s;<>=!~\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy() -> None:
    run_python(
        "import sys, breakgraph.server_args\n"
        "heavy = {'torch', 'transformers', 'triton', 'cuda', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_every_module_imports_without_triton_and_cuda_python() -> None:
    run_python(
        """
import importlib, pkgutil, sys
sys.modules["triton"] = sys.modules["cuda"] = None  # an import of either now fails
import breakgraph
# The extras serve, eval and ray.
optional = {"fastapi", "lm_eval", "prometheus_client", "pydantic", "ray", "starlette", "uvicorn"}
for module in pkgutil.walk_packages(breakgraph.__path__, "breakgraph."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in optional:
            raise
"""
    )


def test_public_names_resolve() -> None:
    import breakgraph

    assert all(getattr(breakgraph, name) is not None for name in breakgraph.__all__)
    assert set(breakgraph.__all__) == set(dir(breakgraph))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = breakgraph.nothing


def test_every_requirement_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"cuda", "flashinfer", "linear", "serve", "ray", "eval", "dev"}
    needed = {name_of(r) for r in project["dependencies"]}
    needed |= {name_of(r) for extra in ("serve", "eval", "ray", "dev") for r in extras[extra]}
    common = {name_of(line) for line in PINS["common"]}
    assert needed - common == {"torch"}
    assert {name_of(line) for line in PINS["cpu"]} == {"setuptools", "torch"}
    assert {name_of(line) for line in PINS["cuda"]} == {"setuptools", "torch", "triton"}
    cuda_python = next(r for r in project["dependencies"] if name_of(r) == "cuda-python")
    assert all(word in cuda_python for word in ("Linux", "x86_64", "aarch64"))


def test_pins_are_exact_and_name_no_index() -> None:
    assert set(PINS) == {"common", "cpu", "cuda"}
    for name, lines in PINS.items():
        bad = [line for line in lines if not re.match(r"^[\w.-]+==[\w.]+(; [\w.<>=\" ]+)?$", line)]
        assert not bad, (name, bad)
    assert "torch==2.13.0" in PINS["cpu"]


def test_a_start_loads_no_compiler(tmp_path: Path) -> None:
    """Each of these takes 0.3 s or more, for nothing: no model here is traced or compiled."""
    shape = ROOT / "benchmarks" / "shapes" / "tiny-qwen3.json"
    (tmp_path / "config.json").write_text(shape.read_text())
    run_python(
        f"""
import sys
from breakgraph import Engine
engine = Engine(
    model_path={str(tmp_path)!r}, load_format="dummy", skip_tokenizer_init=True, device="cpu",
    enable_breakable_cuda_graph=True, piecewise_cuda_graph_tokens=(16,),
)
assert engine.generate([[1, 2, 3]], 1)[0].bucket == 16
heavy = {{"sympy", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "triton"}}
heavy |= {{"transformers.modeling_utils", "transformers.tokenization_utils_base"}}
heavy |= {{"transformers.models.auto.modeling_auto", "transformers.generation.utils"}}
heavy |= {{"fastapi", "lm_eval", "datasets", "pandas", "scipy", "sklearn", "torchvision"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    )


def test_files_that_are_no_python_are_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    given = project["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, patterns in given.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    listed = (path for path in (ROOT / "breakgraph").rglob("*") if path.is_file())
    others = {path for path in listed if path.suffix not in (".py", ".pyc")}
    assert packaged == others
