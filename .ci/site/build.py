"""Build the site: notebooks as nbdev processes them, laid out in a folder, then Sphinx. `python build.py OUT [PAGE...]`

With pages named, of all others only the headings are there, which is quick and leaves every link its target."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from ast import ImportFrom, parse
from pathlib import Path

import nbformat
from nbdev.serve import proc_nbs
from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STAGE = ROOT/'build'/'site'
PAGES = ('CONTRIBUTING.md', 'CHANGELOG.md', 'REPRODUCIBILITY.md')


# Links. A page of nbs/ stands at the site's root, everything else where it is.

def site_path(path): return Path(*path.parts[1:]) if path.parts[0] == 'nbs' else path


def copy(path):
    "A file that a page links to."
    if not (ROOT/path).exists(): raise FileNotFoundError(f'{path}: a page links to it, and it is not there')
    (STAGE/site_path(path)).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT/path, STAGE/site_path(path))


def moved(target, source):
    "A link of a notebook or Markdown file as the page has it."
    if re.match(r'[a-z]+:|#|$', target): return target
    file, anchor = re.match(r'([^#]*)(#.*)?', target).groups()
    there = Path(os.path.normpath(source.parent/file))
    if (ROOT/there).is_dir(): there = there/'index.md'
    elif there.suffix not in ('.ipynb', '.md'): copy(there)
    return os.path.relpath(site_path(there), site_path(source).parent) + (anchor or '')


def move_links(text, source): return re.sub(r'(\]\()([^)\s]+)(?=\))', lambda m: m[1] + moved(m[2], source), text)


# Cells

DIRECTIVE = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)\n?', flags=re.M)
PLAIN = re.compile(r'<!--.*?-->|```.*?```|!\[[^\]]*\]\([^)]*\)|^[#>|].*$', flags=re.S | re.M)


def plain(markdown):
    "Prose without markup, its first sentences up to 300 characters."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', PLAIN.sub('', markdown))
    text = ' '.join(re.sub(r'[*`$]', '', text).split())
    return text if len(text) <= 300 else text[:300].rsplit(' ', 1)[0] + ' ...'


def alternative(before, code):
    "What a picture shows in words: the prose above its cell and the call that drew it."
    call = re.sub(r'\s+', ' ', code.strip().splitlines()[-1].rstrip(';')) if code.strip() else ''
    return ' '.join(filter(None, [before, f'Drawn by {call[:120]}' if call else 'A picture.']))


def shown_outputs(cell):
    "Outputs that a page can show: no widgets, which need a kernel, nor what is said in their place."
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        if data.pop('application/vnd.jupyter.widget-view+json', None): data.pop('text/plain', None)
        if out.output_type in ('stream', 'error') or data: yield out


def page_cell(cell, source, before):
    "A code cell with its directives as tags, its outputs as they can be shown, its pictures described."
    said = dict(DIRECTIVE.findall(cell.source))
    cell.source = DIRECTIVE.sub('', cell.source).strip()
    cell.outputs = list(shown_outputs(cell))
    for out in cell.outputs:
        if 'text/markdown' in out.get('data', {}):
            out.data['text/markdown'] = move_links(out.data['text/markdown'], source)
    if said.get('echo') == 'false': cell.metadata['tags'] = ['remove-input']
    cell.metadata['mystnb'] = dict(image=dict(alt=said.get('fig-alt') or alternative(before, cell.source)))
    return cell


def page(notebook, source):
    "A processed notebook as Sphinx gets it."
    cells, before = [], ''
    for cell in notebook.cells:
        if cell.cell_type == 'markdown':
            cell.source = move_links(re.sub(r'<!--.*?-->', '', cell.source, flags=re.S), source)
            before = plain(cell.source) or before
        else: cell = page_cell(cell, source, before)
        if cell.source or cell.get('outputs'): cells.append(cell)
    notebook.cells = cells
    notebook.metadata.pop('widgets', None)
    return notebook


def headings(notebook):
    "Nothing but the headings of a page."
    prose = [c.source for c in notebook.cells if c.cell_type == 'markdown']
    texts = ['\n\n'.join(re.findall(r'^#+ .*', p, flags=re.M)) for p in prose]
    notebook.cells = [nbformat.v4.new_markdown_cell(t) for t in texts if t]
    return notebook


def lay_out_notebooks(wanted):
    "Each notebook as a page; pyproject.toml says that nbdev leaves exported cells in it."
    cache = proc_nbs(n_workers=1)
    for file in sorted(cache.rglob('*.ipynb')):
        source = 'nbs'/file.relative_to(cache)
        out = STAGE/site_path(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = page(nbformat.read(file, 4), source)
        nbformat.write(whole if wanted(str(site_path(source).with_suffix(''))) else headings(whole), out)


# The other pages

def chapters():
    "Caption and chapters of each row in the index's table of chapters."
    text = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs/index.ipynb', 4).cells if c.cell_type == 'markdown')
    files = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
    for first, last, row in re.findall(r'^\| (\d\d) to (\d\d) \| (.*)\|$', text, flags=re.M):
        names = [f.stem for f in files if first <= f.stem[:2] <= last]
        yield row.split(':')[0].capitalize(), names


def title(name):
    "The title of a page that is laid out."
    file = next(f for f in (STAGE/f'{name}{s}' for s in ('.ipynb', '.md', '.rst')) if f.exists())
    text = nbformat.read(file, 4).cells[0].source if file.suffix == '.ipynb' else file.read_text()
    return text.lstrip('# ').splitlines()[0]


def entry(name):
    "A line of a table of contents; chapters begin with their number."
    number = re.match(r'(\d\d)_', name)
    return f'{number[1]} {title(name)} <{name}>' if number else f'{title(name)} </{name}>'


def toctree(caption, names):
    there = [n for n in names if any((STAGE/f'{n}{s}').exists() for s in ('.ipynb', '.md', '.rst'))]
    body = '\n'.join(map(entry, there))
    return f'```{{toctree}}\n:caption: {caption}\n:hidden:\n:maxdepth: 1\n\n{body}\n```\n' if there else ''


def list_page(name, heading, text, names):
    "A page that lists others."
    lines = '\n'.join(f'- [{title(n)}](/{n})' for n in names)
    (STAGE/name).parent.mkdir(parents=True, exist_ok=True)
    hidden = toctree(heading, names).replace(f':caption: {heading}\n', '')
    (STAGE/f'{name}.md').write_text(f'# {heading}\n\n{text}\n\n{lines}\n\n{hidden}')


def lay_out_texts():
    "What stands beside the notebooks: notes, tables and figures."
    for name in [p for p in PAGES if (ROOT/p).exists()]:
        (STAGE/name).write_text(move_links((ROOT/name).read_text(), Path(name)))
    shutil.copytree(ROOT/'figures', STAGE/'figures', dirs_exist_ok=True)
    for file in (STAGE/'figures').glob('*/*.md'): file.write_text(result_page(file))


def result_page(file):
    "A table or figure with its picture and, where there is one, its numbers as a file."
    text, name = file.read_text(), file.stem
    profile = file.parent.name
    text = text.replace('\n', f'\n\n*Profile {profile}.*\n', 1)
    for png in sorted(file.parent.glob(f'{name}*.png')): text += f'\n\n![{text[2:].splitlines()[0]}, drawn]({png.name})'
    files = [f'[{f.name}]({f.name})' for f in sorted(file.parent.glob(f'{name}*.csv'))]
    return text + (f'\n\nNumbers: {", ".join(files)}.' if files else '') + '\n'


def modules():
    "Names of the modules in reading order, with the chapter that each is exported from."
    for file in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        found = re.search(r'#\| default_exp ([\w.]+)', file.read_text())
        if found: yield f'mlds.{found[1]}', file.stem


def module_page(module, whole):
    "The directive that documents a module; of the front door, the names it passes on."
    if not whole: return ''
    if module != 'mlds.all': return f'.. automodule:: {module}\n   :members:\n   :undoc-members:\n'
    nodes = [n for n in parse((ROOT/'mlds/all.py').read_text()).body if isinstance(n, ImportFrom)]
    names = [f'mlds.{n.module}.{a.name}' for n in nodes for a in n.names]
    return '\n'.join(f'* :py:obj:`{n.split(".")[-1]} <{n}>`' for n in names)


def lay_out_api(wanted):
    "A page for each module, in reading order."
    (STAGE/'api').mkdir(parents=True)
    for module, chapter in modules():
        text = f'{module}\n{"="*len(module)}\n\nExplained in :doc:`/{chapter}`.\n\n'
        (STAGE/f'api/{module}.rst').write_text(text + module_page(module, wanted(f'api/{module}')))
    names = [f'api/{m}' for m, _ in modules()]
    list_page('api/index', 'Reference', 'Every public name, its arguments and its source, module by module.', names)


def lay_out_index():
    "The front page's tables of contents, and the lists of experiments and results."
    experiments = [f'experiments/{f.stem}' for f in sorted((STAGE/'experiments').glob('*.ipynb'))]
    about = 'Parametrized notebooks: one for each kind of run, one for each table and figure.'
    list_page('experiments/index', 'Experiments', about, experiments)
    tables = [str(f.relative_to(STAGE).with_suffix('')) for f in sorted((STAGE/'figures').glob('*/*.md'))]
    list_page('figures/index', 'All tables and figures', 'As the runs left them, by profile.', tables)
    howtos = [f'howto/{f.stem}' for f in sorted((STAGE/'howto').glob('*.ipynb'))]
    list_page('howto/index', 'How to', 'Answers to what users ask; each is a notebook that runs.', howtos)
    (STAGE/'bibliography.rst').write_text('Bibliography\n============\n\n.. bibliography::\n   :all:\n')
    book = [*(n for _, names in chapters() for n in names)]
    parts = [('Start here', ['tour', 'howto/index']), *chapters(), ('Results', ['figures/index', 'experiments/index']),
             ('Look up', ['api/index', 'bibliography']), ('Carry on', [Path(p).stem for p in PAGES])]
    add_to_index('\n'.join(toctree(c, n) for c, n in parts))


def add_to_index(text):
    notebook = nbformat.read(STAGE/'index.ipynb', 4)
    notebook.cells.append(nbformat.v4.new_markdown_cell(text))
    nbformat.write(notebook, STAGE/'index.ipynb')


# MathJax and Sphinx

def fetch_mathjax(version='3.2.2'):
    "MathJax from npm, once."
    folder = ROOT/'build'/f'mathjax-{version}'
    if folder.exists() or not shutil.which('npm'): return folder
    with tempfile.TemporaryDirectory(dir=ROOT/'build') as tmp:
        subprocess.run(['npm', 'pack', '--silent', f'mathjax@{version}'], cwd=tmp, check=True, capture_output=True)
        shutil.unpack_archive(Path(tmp)/f'mathjax-{version}.tgz', tmp)
        shutil.move(f'{tmp}/package/es5', folder)
    return folder


def lay_out_static():
    "Style, scripts and MathJax."
    shutil.copytree(HERE/'static', STAGE/'_static')
    shutil.copy(HERE/'conf.py', STAGE)
    shutil.copy(ROOT/'nbs/references.bib', STAGE)
    there = fetch_mathjax()
    if not there.exists(): return print('Without npm formulas stay as they are written in TeX.', file=sys.stderr)
    for part in ('tex-svg.js', 'input', 'a11y', 'sre', 'ui'):
        copy = shutil.copytree if (there/part).is_dir() else shutil.copy
        (STAGE/'_static/mathjax').mkdir(exist_ok=True)
        copy(there/part, STAGE/'_static/mathjax'/part)


def unlink_sources(html):
    "Take the links from sources to the reference away: viewcode gets those of modules with patched methods wrong."
    for file in (html/'_modules').rglob('*.html'):
        file.write_text(re.sub(r'<a class="viewcode-back"[^>]*>.*?</a>', '', file.read_text()))


def build(out, pages):
    "The site in a folder; all of it, unless pages are named."
    def wanted(name): return not pages or name in pages
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    lay_out_notebooks(wanted)
    lay_out_texts()
    lay_out_api(wanted)
    lay_out_static()
    lay_out_index()
    html = STAGE.parent/'html'  # myst-nb leaves pictures beside it
    shutil.rmtree(html, ignore_errors=True)
    workers = '1' if pages else '2'  # each of them imports torch
    failed = sphinx(['-b', 'html', '-j', workers, '-q', '-W', '--keep-going', '-d', str(STAGE.parent/'doctrees'),
                     str(STAGE), str(html)])
    unlink_sources(html)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(html, out)
    return failed


if __name__ == '__main__': sys.exit(build(Path(sys.argv[1]).resolve(), sys.argv[2:]))
