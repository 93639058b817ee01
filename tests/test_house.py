"Notebooks, modules, README, requirements and profiles agree with one another."
import ast, re, statistics, sys, zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import nbformat, pandas as pd, pytest, yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import mlds
from conftest import ROOT, call, git_files, make
from mlds.study.numbers import number_functions, stale_notebooks

README = (ROOT/'README.md').read_text()
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
EXPERIMENTS = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))
MODULES = [p for p in (ROOT/'mlds').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')]


def project():
    tomllib = pytest.importorskip('tomllib')
    return tomllib.loads((ROOT/'pyproject.toml').read_text())['project']

def cells(notebook): return nbformat.read(notebook, 4).cells

def module_of(notebook):
    "The module that a chapter exports, if it exports one."
    found = re.search(r'#\| default_exp ([\w.]+)', '\n'.join(c.source for c in cells(notebook)))
    return found and found[1]


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
    assert {'mlds[reproduce]', 'mlds[formats,onnx]'} < set(extras['dev']) and 'mlds[run]' in extras['reproduce']
    named = sum((extras[e] for e in ('formats', 'onnx', 'run', 'reproduce', 'dev')), project()['dependencies'])
    names = [Requirement(r).name for r in named]
    assert sorted(n for n in names if n != 'mlds') == sorted({n for n in names if n != 'mlds'})

def test_locked_versions_are_within_what_is_required():
    lines = (ROOT/'requirements.lock').read_text().split()
    locked = {canonicalize_name(name): version for name, version in (l.split('==') for l in lines)}
    extras = {k: v for k, v in project()['optional-dependencies'].items() if k != 'bench'} # peers of a benchmark
    loose = project()['dependencies'] + sum(extras.values(), [])
    named = [r for r in map(Requirement, loose) if r.name != 'mlds']
    assert [r for r in named if not r.specifier.contains(locked[canonicalize_name(r.name)])] == []

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
    for file in (ROOT/folder).rglob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
            if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

@pytest.mark.parametrize('folder', ['mlds', 'tests'])
def test_every_import_is_required(folder):
    "What is installed here by hand only is missing elsewhere."
    extras = project()['optional-dependencies']
    wanted = sum((extras[e] for e in ('formats', 'onnx', 'run', 'reproduce', 'dev', 'docs')), project()['dependencies'])
    there, known = brought([Requirement(r).name for r in wanted]), packages_distributions()
    own = {'mlds', *(f.stem for f in (ROOT/'tests').glob('*.py'))}
    foreign = set(imports(folder)) - set(sys.stdlib_module_names) - own
    assert not [m for m in foreign if not {d.lower().replace('_', '-') for d in known.get(m, [m])} & there]


def test_readme_is_the_index(tmp_path):
    make('readme', f'README={tmp_path}/README.md', cwd=ROOT)
    assert (tmp_path/'README.md').read_text() == README, 'run `make readme`'

def test_readme_is_a_front_page():
    assert len(README.split()) < 900
    assert '<!--' not in README
    links = [l for l in re.findall(r'\]\(([^)#]+)\)', README) if not l.startswith('http')]
    assert not [l for l in links if not (ROOT/l).exists()]
    assert {f'nbs/{n.name}' for n in CHAPTERS} <= set(links)

def test_numbers_in_prose_are_those_of_the_results():
    names = number_functions(ROOT/'figures')
    assert stale_notebooks(ROOT/'nbs', names) == [], 'run `make numbers`'
    assert any('<!--= ' in c.source for n in CHAPTERS for c in cells(n))

def without_levels(markdown): return re.sub(r'^#+ ', '', markdown, flags=re.M).strip()

def test_tables_shown_in_chapters_are_those_of_the_results():
    "A chapter stores what it shows of figures/, and is run again where that has changed."
    written = {without_levels(f.read_text()) for f in (ROOT/'figures').rglob('*.md')}
    stored = [(n.name, o.data.get('text/markdown')) for n in CHAPTERS for c in cells(n) if c.cell_type == 'code'
              for o in c.outputs if 'data' in o]
    shown = [(name, without_levels(text)) for name, text in stored if text]
    assert {name for name, _ in shown} == {'40_results.ipynb', '41_speed.ipynb'}
    assert [name for name, text in shown if text not in written] == [], 'run `nbdev-test nbs/NAME --save --n-workers 0`'

def test_lines_of_the_readme(tmp_path):
    "The ten lines run as they stand, end in scores and leave masks and a model."
    code, = re.findall(r'```python\n(.*?)```', README, flags=re.S)
    assert len(code.splitlines()) == 10
    (tmp_path/'lines.py').write_text(code)
    done = call(sys.executable, 'lines.py', cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    score = float(re.search(r'^mean foreground +([\d.]+)', done.stdout, flags=re.M)[1])
    assert .5 < score < 1
    assert len(list((tmp_path/'eyes/predicted').glob('*.png'))) == 72 and (tmp_path/'eyes.safetensors').exists()


def test_modules_are_those_of_the_notebooks(checkout):
    def modules(): return {p.relative_to(checkout/'mlds'): p.read_text() for p in (checkout/'mlds').rglob('*.py')}
    before = modules()
    done = call('nbdev-export', cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert modules() == before, 'run `nbdev-export`'
    exported = {Path(m.replace('.', '/') + '.py') for n in CHAPTERS if (m := module_of(n))}
    assert {p for p in before if not p.name.startswith('_')} == exported

def test_notebooks_are_clean(checkout):
    def notebooks(): return {p.name: p.read_text() for p in (checkout/'nbs').rglob('*.ipynb')}
    before = notebooks()
    done = call('nbdev-clean', cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert [k for k, v in notebooks().items() if v != before[k]] == [], 'run `nbdev-clean`'

def imported(module):
    "Modules of mlds that a module imports, by their names in the package."
    file = ROOT/'mlds'/(module.replace('.', '/') + '.py')
    above = {1: module.split('.')[:-1], 2: module.split('.')[:-2]}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        names = [node.module] if node.module else [a.name for a in node.names if a.name[0] != '_']
        if node.level: yield from ('.'.join([*above[node.level], n]) for n in names)
        elif names[0].startswith('mlds.'): yield names[0].removeprefix('mlds.')

def test_chapters_import_earlier_ones_only():
    order = [m for n in CHAPTERS if (m := module_of(n))]
    for i, name in enumerate(order):
        assert set(imported(name)) <= set(order[:i]), f'{name} imports {set(imported(name)) - set(order[:i])}'

def test_the_library_knows_nothing_of_the_study():
    library = [m for n in CHAPTERS if (m := module_of(n)) and not m.startswith('study.')]
    assert not [(m, i) for m in library for i in imported(m) if i.startswith('study')]

def test_rooms_are_those_of_contributing():
    "Every module stands in one room of the table, and imports nothing from a later one."
    table = re.search(r'^\| rooms .*?\n\n', (ROOT/'CONTRIBUTING.md').read_text(), flags=re.S | re.M)[0]
    rooms = [re.findall(r'`(?:mlds\.)?(\w+)`', line.split('|')[2]) for line in table.split('\n')[2:-2]]
    room = {name: k for k, names in enumerate(rooms) for name in names}
    modules = [m for n in CHAPTERS if (m := module_of(n))]
    assert {m.split('.')[0] for m in modules} == set(room) and len(room) == sum(map(len, rooms))
    of = {m: room[m.split('.')[0]] for m in modules}
    assert not [(m, i) for m in modules for i in imported(m) if of[i] > of[m]]

def test_one_version_everywhere():
    citation, changelog = yaml.safe_load((ROOT/'CITATION.cff').read_text()), (ROOT/'CHANGELOG.md').read_text()
    assert citation['version'] == mlds.__version__ == re.search(r'^## (\S+)', changelog, flags=re.M)[1]

def test_sizes_in_reproducibility_are_those_of_the_runs():
    lines = [[w.strip() for w in l.split('|')[1:-1]] for l in (ROOT/'REPRODUCIBILITY.md').read_text().splitlines()]
    sizes = {l[0]: l[1:] for l in lines if len(l) == 6 and (ROOT/'results'/l[0]/'runs.csv').exists()}
    assert sizes.keys() == {'quick', 'evidence'}
    for profile, numbers in sizes.items():
        runs = pd.read_csv(ROOT/'results'/profile/'runs.csv', low_memory=False)
        runs = runs[runs.notebook == 'train']
        found = [runs.seed.nunique(), *(runs[c].mode()[0] for c in ('volumes', 'metric.groups', 'iterations', 'size'))]
        assert [n if 'x' in n else float(n) for n in numbers] == found

def test_what_is_stale_is_counted(checkout):
    "Each committed run is either planned or left over, with a reason."
    said = make('status', 'PROFILE=quick', cwd=checkout)
    there = int(re.match(r'quick: (\d+) of \d+ planned runs', said)[1])
    left = re.findall(r'^  (\d+) more there .*; changed since: \S.*$', said, flags=re.M)
    assert there + sum(map(int, left)) == len(pd.read_csv(ROOT/'results/quick/runs.csv', low_memory=False))

def test_chapters_are_numbered_without_gaps():
    assert [int(n.name[:2]) for n in CHAPTERS] == list(range(len(CHAPTERS)))

def test_every_chapter_has_one_title():
    for n in [*CHAPTERS, *EXPERIMENTS]:
        titles = [l for c in cells(n) if c.cell_type == 'markdown' for l in c.source.splitlines() if re.match(r'# ', l)]
        assert len(titles) == 1 and not titles[0].startswith('# #'), n.name

def test_the_wheel_is_whole(checkout, tmp_path):
    "All rooms are in the wheel: it imports from an empty folder."
    done = call(sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--quiet', '-w', tmp_path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(tmp_path/'wheel')
    rooms = [m for n in CHAPTERS if (m := module_of(n))]
    code = '; '.join(f'import mlds.{m}' for m in rooms) + '; print(mlds.__file__)'
    done = call(sys.executable, '-c', code, cwd=tmp_path/'wheel')
    assert done.stdout.strip() == str(tmp_path/'wheel/mlds/__init__.py'), done.stderr

def test_no_large_file_is_committed():
    assert not [str(p) for p in git_files() if (ROOT/p).stat().st_size > 3e6]

def test_pictures_are_small():
    "A notebook's pictures stay in the history whenever it is executed anew."
    def bytes_of(file): return sum(map(len, re.findall(r'"image/png": "([^"]+)', file.read_text())))
    size = {file.name: bytes_of(file) for file in (ROOT/'nbs').rglob('*.ipynb')}
    assert sum(size.values()) < 7e6, f'run `python .ci/pictures.py`: {max(size, key=size.get)} has the most'

def test_nothing_committed_was_made_with_local_changes():
    made = [p for p in git_files() if p.parts[0] in ('figures', 'results') and p.suffix in ('.md', '.json', '.csv')]
    assert made and not [str(p) for p in made if 'local changes' in (ROOT/p).read_text()]


def bodies():
    "Lines and syntax nodes of each function's body, its docstring left out."
    for file in MODULES:
        for f in ast.walk(ast.parse(file.read_text())):
            if not isinstance(f, ast.FunctionDef): continue
            body = [n for n in f.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            if body: yield body[-1].end_lineno - body[0].lineno + 1, sum(1 for n in body for _ in ast.walk(n))

def test_functions_are_small_and_lines_are_simple():
    lengths, nodes = map(sorted, zip(*bodies()))
    assert statistics.median(lengths) <= 5 and lengths[int(.9*len(lengths))] <= 15
    assert sum(nodes)/sum(lengths) <= 20

def test_lines_are_short():
    def code(file): # without the lists of names that nbdev writes
        text = re.sub(r'# %% auto #0.*?(?=\n# %%)', '', file.read_text(), flags=re.S)
        return (l for l in text.splitlines() if not l.startswith(('# %%', '"""')))
    assert [f'{p.name}: {l}' for p in MODULES for l in code(p) if len(l) > 120] == []
