"""Settings of Sphinx for ``make docs``."""

import importlib
import os
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import dither

project = "dither"
project_copyright = "the authors of dither"
release = dither.__version__
version = ".".join(release.split(".")[:2])

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
autosummary_generate = False  # the tables link to the pages of the rooms
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dither {release}"
# Where one host serves several versions, search engines are to find the newest.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

autodoc_default_options = {"members": True, "no-value": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Hosts of integrations: their own pages say what they are.
autodoc_mock_imports = ["lightning", "peft", "transformers"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields stand in the class's own docstring, once

ROOMS = (
    *("core", "data", "formats", "encoders", "calibrate", "rewrite", "archive", "search", "train"),
    *("report", "activations", "recipes", "checkpoint", "testing"),
)


def shorten(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.Element
) -> nodes.reference | None:
    """Find what ``dither.Data`` and ``Data`` mean: a name of a room, which is documented."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    *_, name = target.rpartition(".")
    name = {"open": "Archive.open"}.get(name, name)
    for room in ROOMS:
        module = importlib.import_module(f"dither.{room}")
        if hasattr(module, name.partition(".")[0]):
            node["reftarget"] = f"dither.{room}.{name}"
            kind = node.get("reftype", "obj")
            found: Any = env.get_domain("py").resolve_xref(
                env, node["refdoc"], app.builder, kind, node["reftarget"], node, text
            )
            if found is not None:
                return found
    return None


def setup(app: Sphinx) -> None:
    """Let short names link."""
    app.connect("missing-reference", shorten)
