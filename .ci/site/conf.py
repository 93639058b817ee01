"Sphinx's settings for the site. Everything it needs is installed or in the folder that build.py lays out."
import inspect
import re

from fastcore.docments import docments

project = 'mlds'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.viewcode', 'sphinx.ext.mathjax', 'sphinxcontrib.bibtex']
root_doc = 'index'
exclude_patterns = ['_static']
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']
default_role = 'py:obj'

nb_execution_mode = 'off'
nb_ipywidgets_js = {}  # pictures take the place of widgets, which would fetch scripts
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_inline']
myst_heading_anchors = 4
mathjax_path = 'mathjax/tex-svg.js'
bibtex_bibfiles = ['references.bib']
bibtex_default_style = 'plain'

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = 'furo'
html_title = 'mlds'
html_static_path = ['_static']
html_css_files = ['style.css']
html_js_files = [('offline.js', {'priority': 600})]
html_show_copyright = False
html_copy_source = html_show_sourcelink = False
html_favicon = '_static/favicon.svg'
html_theme_options = dict(navigation_with_keys=True)


def escaped(line):
    "A docstring's line in which reStructuredText finds no markup but backticks."
    parts = re.split(r'(`[^`]*`)', line)
    return ''.join(p if p.startswith('`') else re.sub(r'([*|\\]|(?<=\w)_(?!\w))', r'\\\1', p) for p in parts)


def inherited(what, obj):
    "A class that is made as one of another library is."
    return what == 'class' and not getattr(inspect.unwrap(obj.__init__), '__module__', 'mlds').startswith('mlds')


def comments(obj):
    "The comment of each argument and of what is returned."
    try: return {k: v.docment for k, v in docments(obj, full=True).items() if v.docment}
    except (TypeError, ValueError, OSError): return {}


def add_docments(app, what, name, obj, options, lines):
    "What fastcore calls docments, a comment behind each argument, as fields of the docstring."
    lines[:] = [escaped(l) for l in inspect.cleandoc('\n'.join(lines)).splitlines()] + ['']
    if what not in ('function', 'method', 'class') or inherited(what, obj): return
    said = comments(obj)
    returned = said.pop('return', '')
    lines += [f':param {k}: {escaped(" ".join(v.split()))}' for k, v in said.items()]
    if returned: lines.append(f':returns: {escaped(" ".join(returned.split()))}')


def short_signature(app, what, name, obj, options, signature, returns):
    if inherited(what, obj): return '(...)', returns


def setup(app):
    app.connect('autodoc-process-docstring', add_docments)
    app.connect('autodoc-process-signature', short_signature)
