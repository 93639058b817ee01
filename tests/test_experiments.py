("Every experiment notebook at smoke size, run as a user runs it: through make, Snakemake and papermill, "
 "in a copy of the checkout.")
import json, os, re, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, call, make
from mlds.phantoms.oct import save_phantoms
from mlds.study.plan import ARMS, AUX_NAMES, describe, make_plan
from mlds.study.results import read_results, table_values

RESULTS = make_plan(ROOT/'settings.ini', 'smoke')['results']
KEPT = dict(train={'per_image.csv', 'curves.csv', 'examples.npz', 'model.safetensors', 'model.md'},
            classify={'per_case.csv', 'model.safetensors', 'model.md'}, explain={'doll'},
            localise={'per_image.csv', 'per_case.csv', 'examples.npz'})


def papermill(notebook, folder, **params):
    "Run an experiment notebook from the root of the checkout."
    given = [x for k, v in params.items() for x in ('-p', k, v)]
    file = f'nbs/experiments/{notebook}.ipynb'
    return call('papermill', '--no-progress-bar', '-k', 'python3', file, folder/'out.ipynb', *given)

def trained(folder, **params):
    "The only run in the folder, after train.ipynb with these parameters."
    done = papermill('train', folder, runs=folder/'runs', **params)
    assert done.returncode == 0, done.stderr
    run, = (p.parent for p in (folder/'runs').glob('*/run.json'))
    return run, record(run)['metrics']

@contextmanager
def started(command, cwd):
    "A command at work, killed with all its children when the block ends."
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {'PATH': path, 'PYTHONPATH': str(cwd)}
    process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

def record(run): return json.loads((run/'run.json').read_text())

def plan_of(copy): return make_plan(copy/'settings.ini', 'smoke', runs=copy/'runs')

def drawn(folder): return {f.name: f.read_text() for f in folder.glob('*.[cm][sd]*')}

def exported(folder): return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*.*')}


def test_one_command_makes_everything(smoke):
    copy, said = smoke
    plan, folder = plan_of(copy), copy/'figures/smoke'
    n = len(plan['runs'])
    assert said.startswith(f'smoke: {n} runs, 0 of them finished')
    counted = [int(k) for k in re.findall(rf'^\[(\d+)/{n}\] .+, \d+ s$', said, flags=re.M)]
    assert len(counted) == n and max(counted) == n
    assert (folder/'table2.md').read_text().strip() in said
    for name in RESULTS:
        assert f'figures/smoke/{name}.png' in said
        assert np.asarray(Image.open(folder/f'{name}.png').convert('L')).std() > 5
        assert 'Profile smoke: 64x64 pixels' in (folder/f'{name}.md').read_text()

def test_runs_are_complete(smoke):
    copy, _ = smoke
    for name, run in plan_of(copy)['runs'].items():
        there = {f.name for f in (copy/'runs'/name).iterdir()}
        assert {'run.json', '.run.json'} <= there and KEPT.get(run['notebook'], set()) <= there
        assert not {f for f in there if f.startswith('checkpoint') or f.endswith('.tmp') or f == '.lock'}
        assert (copy/'runs/logs'/f'{name}.ipynb').exists()
        if run['notebook'] != 'train': continue
        n, kind = run['params']['iterations']*run['params']['bs'], run['params']['kind']
        weak = {kind: n} if kind != 'none' else {}
        assert record(copy/'runs'/name)['metrics']['drawn'] == {'mask': n} | weak
    assert not list((copy/'runs').glob('*.partial'))

@pytest.mark.parametrize('table, rows', [('table1', AUX_NAMES.values()), ('table2', ARMS)])
def test_numbers_are_those_of_the_runs(smoke, table, rows):
    copy, _ = smoke
    written = pd.read_csv(copy/f'figures/smoke/{table}.csv', dtype={'column': str})
    found = written.set_index(['row', 'column', 'seed']).value
    cells = [c for c in plan_of(copy)['cells'] if c['table'] == table]
    for c in cells:
        score = record(copy/'runs'/c['run'])['metrics']['mean_iou']
        assert found[c['row'], c['column'], c['seed']] == pytest.approx(score)
    assert set(found.index.get_level_values('row')) == set(rows) and len(found) == len(cells)

def test_results_hold_every_table(smoke):
    "What is exported has a value in each cell, and counts that make the metrics."
    copy, _ = smoke
    results = read_results(copy/'runs/results/smoke')
    values = table_values(results)
    assert set(values.table) == {r for r in RESULTS if r.startswith('table')} and values.value.between(0, 1).all()
    assert set(results.cells.table) == set(RESULTS)
    run = results.runs[results.runs.notebook == 'train'].iloc[0]
    sums = results.per_image[results.per_image.run == run.run].groupby('class')[['TP', 'FP', 'FN']].sum()
    assert set(sums.index) == {'background', 'IRF', 'SRF', 'PED'}
    for name, s in sums.drop(index='background').iterrows():
        assert s.TP/s.sum() == pytest.approx(run[f'metric.iou.{name}'])

def test_finished_runs_stay_as_they_are(smoke):
    copy, _ = smoke
    def times(): return {f: f.stat().st_mtime_ns for r in plan_of(copy)['runs'] for f in (copy/'runs'/r).iterdir()}
    before = times()
    said = make('reproduce', 'PROFILE=smoke', 'CORES=2', cwd=copy)
    assert f'{len(plan_of(copy)["runs"])} of them finished' in said.splitlines()[0]
    assert times() == before

def test_redrawn_and_compared_with_what_is_committed(smoke):
    copy, _ = smoke
    make('results', 'PROFILE=smoke', cwd=copy)
    assert exported(copy/'results/smoke') == exported(copy/'runs/results/smoke')
    assert sum(f.stat().st_size for f in (copy/'results/smoke').rglob('*')) < 3e6
    make('redraw', 'PROFILE=smoke', 'FIGURES=again', cwd=copy)
    assert drawn(copy/'again/smoke') == drawn(copy/'figures/smoke')
    assert make('compare', 'PROFILE=smoke', cwd=copy).splitlines()[-1] == 'agrees'
    runs = pd.read_csv(copy/'results/smoke/runs.csv')
    runs.assign(**{'metric.mean_iou': 1 - runs['metric.mean_iou']}).to_csv(copy/'results/smoke/runs.csv', index=False)
    assert re.fullmatch(r'differs in \d+ of \d+ cells', make('compare', 'PROFILE=smoke', cwd=copy).splitlines()[-1])

def test_a_table_without_its_runs(tmp_path):
    done = papermill('table1', tmp_path, results=tmp_path, figures=tmp_path)
    assert done.returncode and 'run the experiments of this profile first' in done.stderr


def test_a_cell_of_the_phantoms(tmp_path):
    run, metrics = trained(tmp_path, kind='image labels', teacher='self-training', aux_supervision='upsample', masks=4,
                           size='32x48', precision='bf16')
    assert metrics['drawn'] == {'mask': 24, 'image labels': 24}
    assert 0 <= metrics['mean_iou'] <= 1 and set(metrics['iou']) == {'IRF', 'SRF', 'PED'}
    counts = pd.read_csv(run/'per_image.csv')
    assert (counts[['TP', 'FP', 'FN']] >= 0).all(axis=None) and counts[['TP', 'FP', 'FN']].sum().gt(0).all()

def test_a_killed_training_goes_on(tmp_path):
    "The real thing, once: torn out of its training, with kernel and all, then run again."
    given = dict(masks=3, kind='boxes', teacher='mean-teacher', size='32x48', iterations=40, epochs=20)
    for name in ('whole', 'torn'): (tmp_path/name).mkdir()
    whole, metrics = trained(tmp_path/'whole', **given)
    arguments = [str(x) for k, v in (given | dict(runs=tmp_path/'torn/runs')).items() for x in ('-p', k, v)]
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', '-k', 'python3', 'nbs/experiments/train.ipynb',
               tmp_path/'torn/out.ipynb', *arguments]
    with started(command, cwd=ROOT) as torn:
        while torn.poll() is None and not list((tmp_path/'torn/runs').glob('*.partial/checkpoint.pt')): time.sleep(.02)
    assert not list((tmp_path/'torn/runs').glob('*/run.json'))
    time.sleep(3) # the kernel notices that its parent is gone
    run, again = trained(tmp_path/'torn', **given)
    assert run.name == whole.name and again == metrics and len(record(run)['environment']['earlier']) == 1

def test_a_cell_of_a_folder(tmp_path):
    ("Images of another size than the training's, classes and splits of the folder's own; "
     "the scores are those of the full-sized masks.")
    data = save_phantoms(tmp_path/"Anna's scans", 6, 3, (48, 64))
    for f in (data/'masks').iterdir(): Image.fromarray((np.asarray(Image.open(f)) > 0).astype(np.uint8)).save(f)
    (data/'classes.txt').write_text('background\nfluid\n')
    (data/'observations.txt').unlink(missing_ok=True)
    labels = pd.read_csv(data/'labels.csv')[['id', 'group']]
    sides = dict(zip(sorted(labels.group.unique()), ('test', 'test', 'valid', 'train', 'train', 'train')))
    labels.assign(split=labels.group.map(sides)).to_csv(data/'labels.csv', index=False)
    run, metrics = trained(tmp_path, data=data, kind='boxes', teacher='mean-teacher', masks=2, size='32x40',
                           positive_only=False)
    assert metrics['drawn'] == {'mask': 24, 'boxes': 24} and list(metrics['iou']) == ['fluid']
    rows = pd.read_csv(run/'per_image.csv').query('`class` == "fluid"')
    assert set(rows.group) == {'v000', 'v001'} and len(rows) == 6
    masks = [np.asarray(Image.open(data/'masks'/f'{i}.png')) for i in rows.id]
    assert (rows.TP + rows.FN).tolist() == [(m > 0).sum() for m in masks]


@pytest.mark.parametrize('profile, job_per_run', [('smoke', ''), ('quick', ''), ('quick', 'true'), ('full', ''),
                                                  ('evidence', '')])
def test_what_a_profile_would_do(checkout, tmp_path, profile, job_per_run):
    done = call('snakemake', '--dry-run', '--nolock', '--cores', 2, '--config', f'profile={profile}',
                f'runs={tmp_path}/runs', f'job_per_run={job_per_run}', cwd=checkout)
    assert done.returncode == 0, done.stderr
    jobs = set(re.findall(r'^(\w+) +(\d+)$', done.stdout + done.stderr, flags=re.M))
    plan = make_plan(ROOT/'settings.ini', profile, cores=0 if job_per_run else 2)
    kinds = [re.sub('_.*', '', name) for name, n in jobs if name != 'total']
    assert kinds.count('run') == len(plan['jobs']) <= len(plan['runs'])
    others = {k: kinds.count(k) for k in set(kinds) - {'run'}}
    assert others == dict(all=1, phantoms=1, export=1, draw=1 if job_per_run else 2)

@pytest.mark.parametrize('args, words', [
    (['PROFILE=fast'], "profile 'fast' is unknown"), (['DATA=nowhere'], 'nowhere/labels.csv does not exist'),
    (['RUNS=Makefile'], 'choose another folder with RUNS=FOLDER')])
def test_a_wrong_word_after_make(checkout, args, words):
    done = call('make', '-s', '-o', 'install', 'reproduce', *args, cwd=checkout)
    assert done.returncode and words in done.stderr and 'Traceback' not in done.stderr

@pytest.fixture
def settings(checkout):
    "Write a profile of one's own into the copy's settings.ini."
    def write(text): (checkout/'settings.ini').write_text((ROOT/'settings.ini').read_text() + text)
    yield write
    shutil.copy2(ROOT/'settings.ini', checkout)

def test_a_long_series_is_done_in_order_and_goes_on(checkout, tmp_path, settings):
    ("The plan's first runs are done first, and are there when everything is killed; what is there is not done again, "
     "a run that is removed is. Folders may have spaces and apostrophes in their names.")
    settings('\n[series]\nextends = evidence128\n\n[series folder]\ndesign = headline\nfocus = 2\nbudgets = 2\n'
             'seeds = 0\nfolds = 0\nsize = 32x48\niterations = 2\nepochs = 1\nbs = 1\nwidth = 2\ndepth = 2\n')
    data = str(save_phantoms(tmp_path/"Anna's scans", 10, 2, (48, 64)))
    runs, figures = tmp_path/'my runs', tmp_path/'my figures'
    plan = make_plan(checkout/'settings.ini', 'series', data, runs, cores=1)
    arguments = ['reproduce', 'PROFILE=series', 'CORES=1', f'DATA={data}', f'RUNS={runs}', f'FIGURES={figures}']
    def done(): return [name for name in plan['runs'] if (runs/name/'run.json').exists()]
    names = list(plan['runs'])
    with started(['make', '-s', '-o', 'install', *arguments], cwd=checkout) as torn:
        while len(done()) < 3 and torn.poll() is None: time.sleep(.05)
    before = done()
    assert before == names[:len(before)] and 3 <= len(before) < len(names)
    time.sleep(3) # the kernel notices that its parent is gone
    said = make(*arguments, cwd=checkout)
    def executed(): return re.findall(rf'^\[\d+/{len(names)}\] (.+), \d+ s$', said, flags=re.M)
    assert said.startswith(f"series-Anna's scans: {len(names)} runs")
    assert executed() == [describe(plan, name) for name in names[len(before):]]
    others = {f: f.read_text() for f in runs.glob('*/run.json') if f.parent.name != names[1]}
    file = runs/names[1]/'per_image.csv'
    results = drawn(figures/"series-Anna's scans"), file.read_text()
    shutil.rmtree(file.parent)
    said = make(*arguments, cwd=checkout)
    assert executed() == [describe(plan, names[1])] and {f: f.read_text() for f in others} == others
    assert (drawn(figures/"series-Anna's scans"), file.read_text()) == results

def test_runs_where_nothing_can_be_written(checkout, tmp_path):
    "make says why it stops."
    (tmp_path/'file').write_text('mine')
    done = call('make', '-s', '-o', 'install', 'reproduce', 'PROFILE=smoke', f'RUNS={tmp_path}/file/runs', cwd=checkout)
    assert done.returncode and 'Not a directory' in done.stderr and 'another folder with RUNS=FOLDER' in done.stderr
