"""What the documents say of names, links and messages; docs/options.md has a row for every key, and nothing else."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from deformable_detr import load_config
from deformable_detr.config import KEYS
from deformable_detr.startup.options import option_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "options.md"
YAML = re.compile(r"^\| `([A-Z][A-Z0-9_.]*)` \| (?:`([a-z0-9_.]+)`)? ?\| `(.*?)` \| (.+) \|$", re.MULTILINE)
LAZY = re.compile(r"^\| `([a-z_.]+)` \| `(.*?)` \| (.+) \|$", re.MULTILINE)
# Of later versions of Detectron2 than 0.6.
LATER = {
    "DATALOADER.RANDOM_SUBSET_RATIO",
    "DATALOADER.REPEAT_SQRT",
    "FLOAT32_PRECISION",
    "SOLVER.BASE_LR_END",
    "SOLVER.NUM_DECAYS",
    "SOLVER.RESCALE_INTERVAL",
}


def flatten(node: CfgNode, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return flat


def read_keys() -> dict[str, object]:
    """The keys that something reads, with the values of the base model."""
    keys = flatten(load_config("deformable_detr_R_50"))
    return {key: value for key, value in keys.items() if option_of(key) is None and key not in LATER}


def default_of(value: object) -> str:
    return str(value) or '""'


def rows() -> dict[str, tuple[str, str]]:
    """yaml key -> LazyConfig key and default."""
    return {key: (lazy, default) for key, lazy, default, _ in YAML.findall(PAGE.read_text(encoding="utf-8"))}


def test_every_key_has_a_row():
    lazy = dict(KEYS.values())
    missing = [
        f"| `{key}` | `{lazy.get(key, 'THE LAZYCONFIG KEY, OR NOTHING')}` | `{default_of(value)}` | WHAT IT SETS |"
        for key, value in read_keys().items()
        if key not in rows()
    ]
    assert not missing, "add to the table of its section in docs/options.md:\n" + "\n".join(missing)


def test_every_row_is_a_key():
    extra = sorted(rows().keys() - flatten(load_config("deformable_detr_R_50")).keys())
    assert not extra, f"take out of docs/options.md, as there is no such key: {extra}"


def test_defaults_are_those_of_the_base_model():
    keys, told = read_keys(), rows()
    wrong = {key: (told[key][1], default_of(keys[key])) for key in told.keys() & keys.keys()}
    wrong = {key: values for key, values in wrong.items() if values[0] != values[1]}
    assert not wrong, f"docs/options.md: key -> its default there, its value in deformable_detr_R_50: {wrong}"


def test_keys_of_the_view_have_the_lazy_configs_key_beside_them():
    told = rows()
    wrong = {yaml: (told[yaml][0], lazy) for yaml, lazy in KEYS.values() if yaml and told[yaml][0] != lazy}
    assert not wrong, f"docs/options.md: yaml key -> LazyConfig key there, and in config/view.py: {wrong}"


def test_every_lazy_config_key_exists():
    text = PAGE.read_text(encoding="utf-8")
    keys = {lazy for lazy, _ in rows().values() if lazy} | {key for key, _, _ in LAZY.findall(text)}
    path = DOCS.parent / "configs" / "COCO-Detection" / "deformable_detr_R_50.py"
    assert len(keys) > 60
    # Parts before what they are parts of. It raises a KeyError with the name of one that does not exist.
    load_config(str(path), [f"{key}=null" for key in sorted(keys, key=lambda key: -key.count("."))])


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s:]+)\)", text)):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}, which {path.name} does not have"


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_what_the_documents_import_exists(page):
    imports = re.findall(
        r"^ *from (deformable_detr[\w.]*) import ([\w, ]+)", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    for module, names in imports:
        for name in names.replace(" ", "").split(","):
            assert hasattr(importlib.import_module(module), name), f"{page.name}: {module} has no {name}"


# Messages of the troubleshooting page that are not this project's.
THEIRS = {
    "No module named 'deformable_detr'",
    "no kernel image is available for execution on the device",
    "undefined symbol",
    "invalid command 'bdist_wheel'",
    "libGL.so.1: cannot open shared object file",
    "Address already in use",
    "CUDA out of memory",
    "DataLoader worker … is killed by signal",
    "Bus error",
}


def texts(path: Path) -> Iterator[str]:
    """All texts of a Python file, with … in place of values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_troubleshooting_page_quotes_messages_as_they_are():
    """The messages in its first column, in which … is any value or words."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    quoted = {text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if " " in text} - THEIRS
    root = DOCS.parent
    known = [text for path in [root / "setup.py", *root.glob("projects/**/*.py")] for text in texts(path)]
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL) for text in quoted}
    unknown = {text for text, pattern in patterns.items() if not any(map(pattern.search, known))}
    assert len(quoted) > 15
    assert not unknown, f"docs/troubleshooting.md quotes what no message says: {unknown}"
