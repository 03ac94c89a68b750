"""Sphinx configuration: ``sphinx-build -W docs docs/_build``.

The site needs nothing from the network, to be built or read. ``KDLAYERS_DOCS_ONLINE=1`` links
torch's names to torch's documentation, whose inventories are fetched for that.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import kdlayers

project = "kdlayers"
author = "The kdlayers developers"
copyright = author  # noqa: A001 # Sphinx's name
version = release = kdlayers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

if os.environ.get("KDLAYERS_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "torchvision": ("https://docs.pytorch.org/vision/stable", None),
    }

html_theme = "furo"
html_title = f"kdlayers {release}"
html_static_path = ["_static"]
html_css_files = ["kdlayers.css"]
html_theme_options = {
    "light_css_variables": {"diff-added": "#116329", "diff-removed": "#a40e26"},
    "dark_css_variables": {"diff-added": "#7ee787", "diff-removed": "#ffa198"},
}
mathjax = find_spec("sphinx-mathjax-offline")
if mathjax is not None and mathjax.origin is not None:
    # One file of that package, with the fonts in it, in the place of a download by the reader.
    html_static_path.append(str(Path(mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"))
    mathjax_path = "tex-svg.js"
exclude_patterns = ["_build", "data"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Their integrations are documented without them.
autodoc_mock_imports = ["transformers", "lightning", "pytorch_lightning"]
