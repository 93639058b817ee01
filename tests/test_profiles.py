"Parameter cells, settings.ini and the command line: what they say, and what they refuse in one line."
import re, shutil, subprocess, sys
from configparser import ConfigParser

import matplotlib, nbformat, papermill, pytest
import pandas as pd

import mlds.learner
from conftest import ROOT, call
from mlds.annotations import KINDS
from mlds.learner import BATCH_STATISTICS, TEACHERS
from mlds.phantoms.chest import CHEST_TASKS
from mlds.phantoms.oct import save_phantoms
from mlds.pseudolabels import CONFIDENCE
from mlds.study.parameters import check_parameters, notebook_file, schema
from mlds.study.plan import AVERAGED, HEADLINE, INITS, PAPERS, REFERENCES, find_data, make_plan, read_profile
from mlds.study.results import main
from mlds.supervision import AUX_SUPERVISION

EXPERIMENTS = [n for paper in PAPERS.values() for n in paper['notebooks']]
DRAWINGS = [r for paper in PAPERS.values() for r in paper['results']]


# parameter cells

@pytest.mark.parametrize('notebook', EXPERIMENTS + DRAWINGS)
def test_papermill_sees_every_parameter(notebook):
    "`papermill --help-notebook` shows what the library reads."
    seen = papermill.inspect_notebook(str(notebook_file(notebook)))
    ours = schema(notebook)
    assert list(seen) == list(ours)
    for name, p in ours.items():
        assert seen[name]['help'] == (f'{p.help}; {p.allowed}' if p.allowed else p.help) and p.help
        assert eval(seen[name]['default']) == p.default

@pytest.mark.parametrize('notebook', EXPERIMENTS + DRAWINGS)
def test_the_parameter_cell_is_the_first_and_is_checked_at_once(notebook):
    code = [c for c in nbformat.read(notebook_file(notebook), 4).cells if c.cell_type == 'code']
    assert code[0].metadata.get('tags') == ['parameters']
    assert f"read_parameters('{notebook}', globals())" in code[1].source

def test_a_shared_name_means_the_same():
    meanings = {}
    for notebook in EXPERIMENTS + DRAWINGS:
        for name, p in schema(notebook).items(): meanings.setdefault(name, {}).setdefault(p.help, []).append(notebook)
    assert {name: m for name, m in meanings.items() if len(m) > 1} == {}

@pytest.mark.parametrize('profile', ['quick', 'evidence'])
def test_trainings_keep_their_names(profile):
    "What is committed still belongs to the plan: a parameter that came later stands in `LATER`."
    made = pd.read_csv(ROOT/f'results/{profile}/runs.csv')
    plan = make_plan(ROOT/'settings.ini', profile)
    trained = set(made.run[made.notebook == 'train'])
    assert len(trained) > 20 and trained <= set(plan['runs'])

def test_paper_2_on_a_folder(tmp_path):
    "Real findings have no masks; and where a run ends early, every start has as many seeds."
    for task in CHEST_TASKS:
        (tmp_path/task).mkdir()
        (tmp_path/task/'labels.csv').write_text('id,group\n')
    plan = make_plan(ROOT/'settings.ini', 'evidence', str(tmp_path), tmp_path/'runs')
    cells = pd.DataFrame(plan['cells']).query('table == "table5"')
    order = {name: k for k, name in enumerate(plan['runs'])}
    assert plan['results'] == ['table3', 'table5', 'figure3', 'figure4']
    assert set(cells.row) == {INITS[i] for i in ('doll', 'mean explanation', 'matched backbone', 'random')}
    assert cells.assign(turn=cells.run.map(order)).sort_values('turn').seed.is_monotonic_increasing
    assert all(order[need] < order[name] for name, run in plan['runs'].items() for need in run['needs'])
    sources = {run['params']['source'] for run in plan['runs'].values() if run['notebook'] == 'finetune'}
    assert len(sources) == 3*3 + 1, 'three of each that is pre-trained, and none'

PARAMETERS = {
    'unknown': (dict(mask=3), ["unknown parameter 'mask'", "Did you mean 'masks'"]),
    'unknown value': (dict(kind='box'), ["'kind'", "'box'", 'boxes']),
    'not a number': (dict(lr='fast'), ["'lr'", "'fast'", '(0, 1]']),
    'NaN': (dict(lr=float('nan')), ["'lr'", 'nan']),
    'below the range': (dict(iterations=0), ["'iterations'", '[1, inf)']),
    'above the range': (dict(decay=1.), ["'decay'", '.99999]']),
    'half an image': (dict(masks=1.5), ["'masks'", '1.5']),
    'odd size': (dict(size='12by3'), ["'size'", '12by3', 'HEIGHTxWIDTH']),
    'tiny size': (dict(size='16x16'), ["'size'", '16x16']),
}

@pytest.mark.parametrize('case', PARAMETERS)
def test_parameter(case):
    given, words = PARAMETERS[case]
    with pytest.raises(ValueError) as e: check_parameters(given, 'train')
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'
    assert len(str(e.value).splitlines()) == 1

class Began(Exception): "Training was about to begin."

@pytest.fixture
def start(monkeypatch, tmp_path):
    "What the train notebook does, cell by cell, up to the first step of training."
    def alarm(*args, **kwargs): raise Began
    def go(**given):
        scope, given = {}, dict(size='32x48', epochs=1, volumes=5, scans=2, runs=str(tmp_path/'runs')) | given
        for cell in nbformat.read(notebook_file('train'), 4).cells:
            if cell.cell_type == 'code': exec(cell.source, scope)
            if 'parameters' in cell.metadata.get('tags', []): scope.update(given)
    matplotlib.use('agg')
    monkeypatch.setattr(mlds.learner, 'fit', alarm)
    return go

TOGETHER = {
    'no full epochs': (dict(iterations=5, epochs=2), ['iterations=5', 'multiple of epochs=2']),
    'budget larger than the pool': (dict(masks=99), ['99']),
    'pool larger than the data': (dict(masks=2, pool=99), ["99"]),
    'no share for the test': (dict(test=0), ['test']),
    'no share for validation': (dict(valid=0), ['valid']),
    'shares that leave no training': (dict(valid=.6, test=.6), ['5 groups', 'smaller shares']),
    'classes that the masks do not have': (dict(classes='background,IRF', data='folder'), ['2 classes', '0..1']),
    'no such folder': (dict(data='/no/such/folder'), ['/no/such/folder']),
}

@pytest.mark.parametrize('case', TOGETHER)
def test_parameters_that_do_not_fit_together_or_the_data(start, tmp_path, case):
    given, words = TOGETHER[case]
    if given.get('data') == 'folder': given = given | dict(data=str(save_phantoms(tmp_path/'eyes', 5, 2, (32, 48))))
    with pytest.raises((ValueError, OSError)) as e: start(**given)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'

def test_sound_parameters_reach_training(start):
    with pytest.raises(Began): start(masks=2, kind='boxes')

@pytest.mark.parametrize('name, known', [
    ('kind', ['none', *KINDS]), ('teacher', TEACHERS), ('aux_supervision', AUX_SUPERVISION), ('confidence', CONFIDENCE),
    ('batch_statistics', BATCH_STATISTICS)])
def test_choices_are_those_of_the_library(name, known):
    choices = schema('train')[name].allowed.removeprefix('one of ').split(', ')
    assert set(choices) | {'mask'} == {*known, 'mask'}, 'a mask is no weakening'

def test_numbers_as_text():
    found = check_parameters(dict(size=' 64x96'.strip(), lr='1e-3', masks='12', bs=4., data=7), 'train')
    assert [found[k] for k in ('size', 'lr', 'masks', 'bs', 'data')] == ['64x96', .001, 12, 4, '7']

def test_a_notebook_with_an_unknown_value(tmp_path):
    done = call('papermill', '--no-progress-bar', '-k', 'python3', notebook_file('train'), tmp_path/'out.ipynb',
                '-p', 'teacher', 'mean', '-p', 'runs', tmp_path/'runs')
    words = r"parameter 'teacher' .* is 'mean'; allowed: one of none, self-training, mean-teacher, "
    assert done.returncode and re.search(words, done.stderr)
    assert not (tmp_path/'runs').exists()


# settings.ini

def profiles():
    ini = ConfigParser(inline_comment_prefixes='#')
    ini.read(ROOT/'settings.ini')
    return ini, [s for s in ini.sections() if s != 'data' and ' ' not in s]

@pytest.mark.parametrize('data', ['phantoms', 'a folder'])
def test_every_profile_is_valid(data):
    ini, names = profiles()
    assert {'smoke', 'quick', 'full'} <= set(names)
    parts = {s.removesuffix(' folder').partition(' ')[::2] for s in ini.sections() if ' ' in s}
    allowed = {'', 'folder', 'chest', *EXPERIMENTS} - {'train'}
    assert {p for p, _ in parts} <= set(names) and {n for _, n in parts} <= allowed
    for name in names:
        oct_, chest = (read_profile(ROOT/'settings.ini', name, data, paper) for paper in PAPERS)
        of_chest = ((n, chest) for n in ('classify', 'pretrain', 'finetune', 'joint'))
        for notebook, profile in [('train', oct_), *of_chest]:
            assert profile[notebook]['iterations'] % profile[notebook]['epochs'] == 0
        assert sorted(set(oct_['budgets'])) == oct_['budgets']
        for p in (oct_, chest): assert len(set(p['seeds'])) == len(p['seeds']) >= 1

def test_the_chain_of_paper_2_fits_together():
    for name in profiles()[1]:
        chest = read_profile(ROOT/'settings.ini', name, paper='chest')
        for n in ('pretrain', 'finetune', 'joint'):
            assert chest[n]['encoder'] == chest['archs'][0], 'the backbone comes from the first member'
        for same in ('data_seed', 'size', 'images'):
            assert len({chest[n][same] for n in PAPERS['chest']['notebooks'] if same in chest[n]}) == 1
        for same in ('width', 'head_width', 'negative_slope'): assert chest['pretrain'][same] == chest['finetune'][same]

INI = {
    'unknown profile': ('[tiny]\nbudgets = 3\nseeds = 0\n', ['quick', 'tiny', 'settings.ini']),
    'unknown parameter': ('[quick]\nbudgets = 3\nseeds = 0\niteration = 5\n', ["'iteration'", "'iterations'"]),
    'unknown value': ('[quick]\nbudgets = 3\nseeds = 0\nprecision = fp8\n', ["'precision'", 'fp8', 'bf16']),
    'not a number': ('[quick]\nbudgets = 3\nseeds = 0\niterations = many\n', ["'iterations'", 'many']),
    'no budgets': ('[quick]\nseeds = 0\n', ['budgets', 'quick']),
    'empty budgets': ('[quick]\nbudgets =\nseeds = 0\n', ['budgets']),
    'budgets with text': ('[quick]\nbudgets = 3, 6\nseeds = 0\n', ['budgets', '3,']),
    'a budget of nothing': ('[quick]\nbudgets = 0\nseeds = 0\n', ["'masks'", '[1, inf)']),
    'seeds with text': ('[quick]\nbudgets = 3\nseeds = one\n', ['seeds', 'one']),
    'odd size': ('[quick]\nbudgets = 3\nseeds = 0\nsize = 64\n', ["'size'", 'HEIGHTxWIDTH']),
    'unknown result': ('[quick]\nbudgets = 3\nseeds = 0\nresults = table9\n', ["'table9'", 'table1']),
    'a result of another design': ('[quick]\nbudgets = 3\nseeds = 0\ndesign = headline\nresults = table1\n',
                                   ["'table1'", 'table2']),
    'unknown design': ('[quick]\nbudgets = 3\nseeds = 0\ndesign = long\n', ["'design'", 'long', 'evidence']),
    'a margin in points': ('[quick]\nbudgets = 3\nseeds = 0\nmargin = 2\n', ["'margin'", '(0, 1)']),
    'results that keep patients': ('[quick]\nbudgets = 3\nseeds = 0\nkeep = patients\n', ["'keep'", 'groups']),
    'an option of the whole in a part': ('[quick]\nbudgets = 3\nseeds = 0\n[quick chest]\nseeds = 0\nkeep = groups\n',
                                         ["unknown parameter 'keep'"]),
    'extends itself': ('[quick]\nextends = quick\nbudgets = 3\nseeds = 0\n', ['extends itself', 'quick -> quick']),
    'a share of paper 2': ('[quick]\nbudgets = 3\nseeds = 0\n[quick chest]\nseeds = 0\nshares = 2\n',
                           ['shares', 'quick chest']),
    'a parameter of paper 2': ('[quick]\nbudgets = 3\nseeds = 0\n[quick finetune]\nseed = 0\nshares = 1\n'
                               '[quick chest]\nseeds = 0\n', ["'shares'", "'share'"]),
    'no section': ('budgets = 3\n', ['settings.ini']),
    'a parameter twice': ('[quick]\nbudgets = 3\nbudgets = 6\n', ['settings.ini', 'budgets']),
    'a percent sign': ('[quick]\nbudgets = 3\nseeds = 0\nvalid = 10%\n', ['valid']),
    'no file': (None, ['settings.ini', 'does not exist']),
}

@pytest.mark.parametrize('case', INI)
def test_settings(tmp_path, monkeypatch, case):
    "The command line says `error: ...` and no traceback, whatever settings.ini holds."
    text, words = INI[case]
    if text is not None: (tmp_path/'settings.ini').write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(['status', 'quick'])
    assert str(e.value).startswith('error: ')
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'
    assert len(str(e.value).splitlines()) == 1, 'the command line promises one line'


# the command line

@pytest.mark.parametrize('args, words', [
    (['begin'], ['begin', 'status', 'compare']), (['status', 'smoke', 'phantoms', 'r', 'f', 'c', 'x'], ['not understood']),
    ([''], ['not understood']), (['status', 'smoke', 'no/data'], ['no/data', 'labels.csv', 'does not exist']),
    (['compare', 'smoke', 'phantoms', 'nowhere'], ['no results in'])])
def test_command_line(monkeypatch, args, words):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as e: main(args)
    for word in ['error: ', *words]: assert word in str(e.value)

def test_the_program_itself(tmp_path):
    "`mlds-plan status` as `make reproduce` calls it: one line, exit status 1."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    done = subprocess.run([sys.executable, '-c', 'from mlds.study.results import main; main()', 'status', 'fast'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    known = ', '.join(profiles()[1])
    assert done.stderr == f"error: profile 'fast' is unknown; settings.ini has {known}\n"

@pytest.mark.parametrize('data', ['phantoms', 'eyes'])
def test_a_plan_needs_no_torch(tmp_path, data):
    "It is made whenever `make` or Snakemake is called, and torch takes seconds to load."
    if data == 'eyes':
        (tmp_path/'eyes').mkdir()
        (tmp_path/'eyes'/'labels.csv').write_text('id,group\na,p\n')
        data = str(tmp_path/'eyes')
    code = ("import sys; from mlds.study.results import main; "
            f"main(['status', 'quick', {data!r}, {str(tmp_path)!r}]); print('torch' in sys.modules)")
    done = call(sys.executable, '-c', code)
    assert done.stdout.splitlines()[-1] == 'False', done.stdout + done.stderr

def test_a_folder_of_runs_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path/'runs').write_text('a file')
    words = 'error: cannot write to .*runs/logs/smoke .*: choose another folder with RUNS=FOLDER'
    with pytest.raises(SystemExit, match=words):
        main(['status', 'smoke', 'phantoms', str(tmp_path/'runs')])

def test_a_profile_may_be_another_one_and_something_more(tmp_path):
    "Runs that two profiles share are the same runs."
    shares, quick = (make_plan(ROOT/'settings.ini', name)['runs'] for name in ('shares', 'quick'))
    shared = [n for n in shares if n in quick]
    assert {shares[n]['notebook'] for n in shared} >= {'classify', 'explain', 'pretrain'}
    assert all(shares[n]['notebook'] == quick[n]['notebook'] for n in shared)

def test_evidence_begins_with_the_headline():
    "Seed by seed in turns, of which the first is the main claim, then whole columns."
    plan = make_plan(ROOT/'settings.ini', 'evidence', cores=1)
    names = [name for name, run in plan['runs'].items() if run['notebook'] == 'train']
    cells = [c for c in plan['cells'] if c['run'] in names]
    jobs = [runs for runs in plan['jobs'].values() if runs[0] in names]
    assert sum(jobs, []) == names and max(map(len, jobs)) <= 8
    place = {name: k for k, name in enumerate(names)}
    first = [c for c in cells if c['table'] == 'table2' and c['row'] in [AVERAGED, *HEADLINE, *REFERENCES]
             and c['column'] in ('24', 'all')]
    assert {place[c['run']] for c in first} == set(range(120)) and len({c['seed'] for c in first}) == 10
    taught = [c for c in cells if c['table'] == 'table2' and c not in first and not c['row'].startswith(('self', 'un'))]
    def turn(cell): return {'24': 0, '6': 1}.get(cell['column'], 2), cell['seed']
    assert [turn(c) for c in sorted(taught, key=lambda c: place[c['run']])] == sorted(map(turn, taught))
    later = {c['run'] for c in cells if c['table'] != 'table1'} - {c['run'] for c in first + taught}
    assert max(place[c['run']] for c in taught) < min(place[run] for run in later)

def test_evidence_at_another_size():
    "The headline alone, with the same rows, on the same patients."
    small, large = (make_plan(ROOT/'settings.ini', name) for name in ('evidence', 'evidence128'))
    assert {(c['row'], c['column']) for c in large['cells']} == \
        {(r, '24') for r in [AVERAGED, *HEADLINE, *REFERENCES[:1]]} | {(r, 'all') for r in HEADLINE[:1] + REFERENCES}
    params = [next(iter(plan['runs'].values()))['params'] for plan in (small, large)]
    assert {k for k in params[0] if params[0][k] != params[1][k]} == {'size'}
    assert (small['margin'], small['keep'], small['partial']) == (.02, 'groups', 'yes')

def test_a_data_folder_with_a_difficult_name(tmp_path):
    folder = tmp_path/"Anna's scans 2"
    folder.mkdir()
    (folder/'labels.csv').write_text('id,group\n')
    assert find_data(ROOT/'settings.ini', str(folder)) == str(folder)
    assert make_plan(ROOT/'settings.ini', 'smoke', str(folder))['name'] == "smoke-Anna's scans 2"
