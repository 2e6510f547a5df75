"""Sphinx configuration; what can be read from the code is written by generate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kilobayes import __version__

project = "kilobayes"
author = "the kilobayes contributors"
copyright = "the kilobayes contributors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generate"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"kilobayes {version}"
html_math_renderer = "mathml"  # of generate.py: the pages need no script from elsewhere
html_show_sphinx = False
