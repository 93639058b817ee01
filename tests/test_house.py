"Notebooks, modules, README, requirements and profiles agree with one another."
import ast, json, re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import nbformat, pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from conftest import ROOT, call, git_files, make
from mlds.study.plan import PAPERS, make_plan

README = (ROOT/'README.md').read_text()
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))


def project():
    tomllib = pytest.importorskip('tomllib')
    return tomllib.loads((ROOT/'pyproject.toml').read_text())['project']

def module_of(notebook):
    "The module that a chapter exports."
    return re.search(r'#\| default_exp (\w+)', '\n'.join(c.source for c in nbformat.read(notebook, 4).cells))[1]


def test_conda_environment_is_that_of_pyproject():
    conda = yaml.safe_load((ROOT/'environment.yml').read_text())
    names = {d.split('=')[0]: d for d in conda['dependencies'] if isinstance(d, str)}
    pip, = (d['pip'] for d in conda['dependencies'] if isinstance(d, dict))
    assert conda['name'] == project()['name'] and 'pip' in names
    assert SpecifierSet(project()['requires-python']).contains(names['python'].split('=')[1] + '.0')
    wanted = Requirement('mlds' + pip[0].removeprefix('-e .'))
    assert len(pip) == 1 and wanted.extras == {'dev'} and wanted.extras <= set(project()['optional-dependencies'])

def test_dev_is_everything_and_names_nothing_twice():
    "The one word by which environment.yml and `make install` ask for all requirements."
    extras = project()['optional-dependencies']
    assert 'mlds[reproduce]' in extras['dev']
    names = [Requirement(r).name for r in project()['dependencies'] + extras['reproduce'] + extras['dev']]
    assert sorted(n for n in names if n != 'mlds') == sorted({n for n in names if n != 'mlds'})

def brought(names, seen=frozenset()):
    "What an installation of packages brings: they and what they require, normalized names."
    for name in {n.lower().replace('_', '-') for n in names} - seen:
        seen = seen | {name}
        try: wanted = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError: continue
        seen = brought([w.name for w in wanted if not w.marker or w.marker.evaluate({'extra': ''})], seen)
    return seen

def imports(folder):
    "Modules from elsewhere that the Python files of a folder import, inside a function or not."
    for file in (ROOT/folder).glob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
            if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

@pytest.mark.parametrize('folder', ['mlds', 'tests'])
def test_every_import_is_required(folder):
    "What is installed here by hand only is missing elsewhere."
    extras = project()['optional-dependencies']
    wanted = project()['dependencies'] + extras['reproduce'] + extras['dev']
    there, known = brought([Requirement(r).name for r in wanted]), packages_distributions()
    foreign = set(imports(folder)) - set(sys.stdlib_module_names) - {'mlds', 'conftest'}
    assert not [m for m in foreign if not {d.lower().replace('_', '-') for d in known.get(m, [m])} & there]


def test_readme_is_the_index(tmp_path):
    make('readme', f'README={tmp_path}/README.md', cwd=ROOT)
    assert (tmp_path/'README.md').read_text() == README, 'run `make readme`'

def test_readme_is_finished():
    assert not re.findall(r'@@\w+@@', README)
    links = [l for l in re.findall(r'\]\(([^)#]+)\)', README) if not l.startswith('http')]
    assert len(links) > len(CHAPTERS)
    assert not [l for l in links if not (ROOT/l).exists()]

def test_readme_shows_every_chapter():
    rows = re.findall(r'^\| \[(\d+\w+)\]\(nbs/(\w+)\.ipynb\) \| `mlds\.(\w+)` \|', README, flags=re.M)
    assert rows == [(n.stem, n.stem, module_of(n)) for n in CHAPTERS]

def test_readme_knows_the_number_of_runs():
    assert f"{len(make_plan(ROOT/'settings.ini', 'quick')['runs'])} runs" in README

@pytest.mark.parametrize('k, lines', enumerate([10, 14]))
def test_lines_of_the_readme(tmp_path, k, lines):
    code = re.findall(r'```python\n(.*?)```', README, flags=re.S)[k]
    assert len(code.splitlines()) == lines
    (tmp_path/'lines.py').write_text(code)
    done = call(sys.executable, 'lines.py', cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    score = float(re.search(r'^mean foreground +([\d.]+)', done.stdout, flags=re.M)[1])
    assert .5 < score < 1


def test_modules_are_those_of_the_notebooks(checkout):
    def modules(): return {p.name: p.read_text() for p in (checkout/'mlds').glob('*.py')}
    before = modules()
    done = call('nbdev-export', cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert modules() == before, 'run `nbdev-export`'
    assert {p for p in before if not p.startswith('_')} == {f'{module_of(n)}.py' for n in CHAPTERS}

def test_notebooks_are_clean(checkout):
    def notebooks(): return {p.name: p.read_text() for p in (checkout/'nbs').rglob('*.ipynb')}
    before = notebooks()
    done = call('nbdev-clean', cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert [k for k, v in notebooks().items() if v != before[k]] == [], 'run `nbdev-clean`'

def test_chapters_import_earlier_ones_only():
    order = [module_of(n) for n in CHAPTERS]
    for i, name in enumerate(order):
        tree = ast.parse((ROOT/f'mlds/{name}.py').read_text())
        froms = [n.module.removeprefix('mlds.') for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
                 and (n.level == 1 or n.module.startswith('mlds.'))]
        assert set(froms) <= set(order[:i]), f'{name} imports {set(froms) - set(order[:i])}'

def test_no_large_file_is_committed():
    assert not [str(p) for p in git_files() if (ROOT/p).stat().st_size > 3e6]


def test_drawing_notebooks_share_their_parameters():
    cells = {n: [c.source for c in nbformat.read(ROOT/f'nbs/experiments/{n}.ipynb', 4).cells if 'parameters' in c.metadata.get('tags', [])]
             for paper in PAPERS.values() for n in paper['results']}
    assert len({json.dumps(c) for c in cells.values()}) == 1 and len(cells['table1']) == 1
