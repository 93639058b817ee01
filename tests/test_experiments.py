"Every experiment notebook at smoke size, run as a user runs it: through make, Snakemake and papermill, in a copy of the checkout."
import json, re, shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, call, make
from mlds.phantoms.oct import save_phantoms
from mlds.study.plan import ARMS, LOWER_NAMES, PAPER1, PAPER2, make_plan

ALWAYS = {'params.json', 'manifest.json', 'metrics.json', 'environment.json'}
KEPT = dict(train={'history.csv', 'per_image.csv', 'examples.npz', 'teaching.npz'}, joint={'history.csv', 'per_image.csv', 'examples.npz'},
            classify={'auroc.csv', 'probs.csv'}, localise={'localisation.csv', 'gallery.npz'}, explain=set(), pretrain={'history.csv'},
            finetune={'scores.csv', 'curves.csv'})
LEFT = dict(train={'weights.safetensors'}, joint=set(), classify={'weights.safetensors'}, localise=set(), explain={'doll'},
            pretrain={'weights.safetensors', 'weights.md'}, finetune=set())


def papermill(notebook, folder, **params):
    "Run an experiment notebook from the root of the checkout."
    given = [x for k, v in params.items() for x in ('-p', k, v)]
    return call('papermill', '--no-progress-bar', '-k', 'python3', f'nbs/experiments/{notebook}.ipynb', folder/'out.ipynb', *given)

def trained(folder, **params):
    "The only run in the folder, after train.ipynb with these parameters."
    done = papermill('train', folder, runs=folder/'runs', **params)
    assert done.returncode == 0, done.stderr
    run, = (p.parent for p in (folder/'runs').glob('*/metrics.json'))
    return run, json.loads((run/'metrics.json').read_text())

def plan_of(copy): return make_plan(copy/'settings.ini', 'smoke', runs=copy/'runs')

def drawn(folder): return {f.name: f.read_text() for f in folder.glob('*.[cm][sd]*')}


def test_one_command_makes_everything(smoke):
    copy, said = smoke
    plan, folder = plan_of(copy), copy/'figures/smoke'
    assert said.startswith(f"smoke: {len(plan['runs'])} runs, 0 of them finished")
    assert f"[{len(plan['runs'])}/{len(plan['runs'])}]" in said
    assert (folder/'table2.md').read_text().strip() in said
    for name in PAPER1 + PAPER2:
        assert f'figures/smoke/{name}.png' in said
        assert np.asarray(Image.open(folder/f'{name}.png').convert('L')).std() > 5
        assert 'Profile smoke: 64x64 pixels' in (folder/f'{name}.md').read_text()
        origin = json.loads((folder/f'{name}.json').read_text())
        assert set(origin) <= set(plan['runs'])

def test_runs_are_complete(smoke):
    copy, _ = smoke
    plan = plan_of(copy)
    for run, params in plan['runs'].items():
        assert {f.name for f in (copy/'runs'/run).iterdir()} == ALWAYS | KEPT[plan['notebook'][run]] | LEFT[plan['notebook'][run]]
        if plan['notebook'][run] != 'train': continue
        drawn = json.loads((copy/'runs'/run/'metrics.json').read_text())['drawn']
        n = params['iterations']*params['bs']
        assert drawn == ({'mask': n} if params['kind'] == 'none' else {'mask': n, params['kind']: n})
    assert not list((copy/'runs').glob('*.partial'))

@pytest.mark.parametrize('table, rows', [('table1', LOWER_NAMES.values()), ('table2', ARMS)])
def test_numbers_are_those_of_the_runs(smoke, table, rows):
    copy, _ = smoke
    found = pd.read_csv(copy/f'figures/smoke/{table}.csv', dtype={'column': str}).set_index(['row', 'column', 'seed']).value
    for c in plan_of(copy)[table]:
        metrics = json.loads((copy/'runs'/c['run']/'metrics.json').read_text())
        assert found[c['row'], str(c['column']), c['seed']] == pytest.approx(metrics['mean_iou'])
    assert set(found.index.get_level_values('row')) == set(rows)
    assert len(found) == len(plan_of(copy)[table])

def test_finished_runs_stay_as_they_are(smoke):
    copy, _ = smoke
    def times(): return {f: f.stat().st_mtime_ns for r in plan_of(copy)['runs'] for f in (copy/'runs'/r).iterdir()}
    before = times()
    said = make('reproduce', 'PROFILE=smoke', 'CORES=2', cwd=copy)
    assert f'{len(plan_of(copy)["runs"])} of them finished' in said.splitlines()[0]
    assert times() == before

def test_a_removed_run_is_done_again(smoke):
    copy, _ = smoke
    file = copy/'runs'/plan_of(copy)['table2'][1]['run']/'per_image.csv'
    before = drawn(copy/'figures/smoke'), file.read_text()
    shutil.rmtree(file.parent)
    make('reproduce', 'PROFILE=smoke', 'CORES=2', cwd=copy)
    assert (drawn(copy/'figures/smoke'), file.read_text()) == before

def test_redrawn_from_what_is_committed(smoke):
    copy, _ = smoke
    make('results', 'PROFILE=smoke', cwd=copy)
    for run, notebook in plan_of(copy)['notebook'].items():
        assert {f.name for f in (copy/'results/smoke'/run).iterdir()} - {'weights.md'} == ALWAYS | KEPT[notebook]
    make('redraw', 'PROFILE=smoke', 'FIGURES=again', cwd=copy)
    assert drawn(copy/'again/smoke') == drawn(copy/'figures/smoke')
    assert len(drawn(copy/'again/smoke')) == 6 + 11

def test_a_table_without_its_runs(tmp_path):
    done = papermill('table1', tmp_path, runs=tmp_path, figures=tmp_path)
    assert done.returncode and 'run the experiments of this profile first' in done.stderr


def test_a_cell_of_the_phantoms(tmp_path):
    run, metrics = trained(tmp_path, kind='tags', teacher='self', lower='upsample', masks=4, size='32x48', precision='bf16')
    assert metrics['drawn'] == {'mask': 24, 'tags': 24}
    assert 0 <= metrics['mean_iou'] <= 1 and set(metrics['iou']) == {'background', 'IRF', 'SRF', 'PED'}
    counts = pd.read_csv(run/'per_image.csv').drop(columns=['id', 'group']).to_numpy()
    assert (counts >= 0).all() and (counts[:, 0] > 0).all()

def scores(folder): return {p.parent.name: json.loads(p.read_text()) | dict(seconds=0) for p in folder.glob('*/metrics.json')}

def test_seeds_in_one_process_are_those_alone(tmp_path):
    "A run does not depend on what its process did before."
    for part, given in (('both', dict(seeds='0 1')), ('alone', dict(seed=1))):
        done = papermill('train', tmp_path, runs=tmp_path/part, kind='boxes', teacher='ema', iterations=8, **given)
        assert done.returncode == 0, done.stderr
    both, alone = scores(tmp_path/'both'), scores(tmp_path/'alone')
    assert len(both) == 2 and len(alone) == 1
    assert alone.items() <= both.items()

def test_a_cell_of_a_folder(tmp_path):
    "Images of another size than the training's, classes and splits of the folder's own; the scores are those of the full-sized masks."
    data = save_phantoms(tmp_path/'mine', 6, 3, (48, 64))
    for f in (data/'masks').iterdir(): Image.fromarray((np.asarray(Image.open(f)) > 0).astype(np.uint8)).save(f)
    (data/'classes.txt').write_text('background\nfluid\n')
    labels = pd.read_csv(data/'labels.csv')[['id', 'group']]
    sides = dict(zip(sorted(labels.group.unique()), ('test', 'test', 'valid', 'train', 'train', 'train')))
    labels.assign(split=labels.group.map(sides)).to_csv(data/'labels.csv', index=False)
    run, metrics = trained(tmp_path, data=data, kind='boxes', teacher='ema', masks=2, size='32x40', positive_only=False)
    assert metrics['drawn'] == {'mask': 24, 'boxes': 24} and list(metrics['iou']) == ['background', 'fluid']
    rows = pd.read_csv(run/'per_image.csv')
    assert set(rows.group) == {'v000', 'v001'} and len(rows) == 6
    assert (rows['fluid TP'] + rows['fluid FN']).tolist() == [(np.asarray(Image.open(data/'masks'/f'{i}.png')) > 0).sum() for i in rows.id]

@pytest.mark.parametrize('name, value, words', [
    ('mask', 3, "unknown parameter 'mask'. Did you mean 'masks'"),
    ('teacher', 'emma', "'teacher'"),
    ('seeds', '0, 1', "write whole numbers with spaces between"),
    ('size', '64x', "write HEIGHTxWIDTH")])
def test_a_parameter_that_is_refused(tmp_path, name, value, words):
    done = papermill('train', tmp_path, runs=tmp_path/'runs', **{name: value})
    assert done.returncode and words in done.stderr
    assert not list(tmp_path.glob('runs/*/metrics.json'))


@pytest.mark.parametrize('profile, apart', [('smoke', ''), ('quick', ''), ('quick', 'true'), ('full', '')])
def test_what_a_profile_would_do(checkout, tmp_path, profile, apart):
    runs, figures = tmp_path/'runs', tmp_path/'figures'
    done = call('snakemake', '--dry-run', '--nolock', '--cores', 1, '--config', f'profile={profile}', f'runs={runs}', f'figures={figures}', f'apart={apart}', cwd=checkout)
    assert done.returncode == 0, done.stderr
    jobs = dict(re.findall(r'^(\w+) +(\d+)$', done.stdout + done.stderr, flags=re.M))
    n = len(make_plan(ROOT/'settings.ini', profile)['runs' if apart else 'jobs'])
    assert jobs == {'all': '1', 'draw': '10', 'phantoms': '1', 'train': str(n), 'total': str(n+12)}

@pytest.mark.parametrize('args, words', [(['PROFILE=fast'], "profile 'fast' is unknown"), (['DATA=nowhere'], 'nowhere/labels.csv does not exist')])
def test_a_wrong_word_after_make(checkout, args, words):
    done = call('make', '-s', '-o', 'install', 'reproduce', *args, cwd=checkout)
    assert done.returncode and words in done.stderr and 'Traceback' not in done.stderr
