"""What a user imports, and that importing it costs nothing before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import storm_vlm


@pytest.mark.parametrize("name", storm_vlm.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    public = getattr(storm_vlm, name)
    assert public.__name__ == name and public.__doc__
    assert name in dir(storm_vlm)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(storm_vlm.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    names = {(node.module, alias.name) for node in imports for alias in node.names}
    lazily = {(f"storm_vlm.{m}", name) for m, names in storm_vlm._MODULES.items() for name in names}
    assert names == lazily
    assert sorted(name for _, name in names) == sorted(storm_vlm.__all__)
    assert (Path(storm_vlm.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = storm_vlm.Nothing


@pytest.mark.parametrize(
    "code",
    [
        "import storm_vlm; dir(storm_vlm); storm_vlm.StormError",
        "from storm_vlm.cli.main import main; sys.argv[1:] = ['--help']; main()",
    ],
)
def test_neither_the_package_nor_help_imports_torch(code: str) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print(*({{"torch", "transformers"}} & set(sys.modules)), file=sys.stderr))
{code}
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr.split() == [], run.stderr
