"Profile `evidence` on made runs with known effects: from its plan through export and commit to what its tables claim."
import re
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT
from mlds.study.plan import LONG, LONGER, PLAIN, PLAIN_AVERAGED, TWICE, data_manifest, describe, draw, make_plan
from mlds.study.results import commit_results, compare, export, read_results, table_values, verdict
from mlds.study.runs import Run
from mlds.study.tables import start_differences, table_inputs

TABLES = ['table1', 'table2', 'table7']
PATIENTS, SEEDS = 60, 6
UNIONS = np.random.default_rng(0).integers(150, 250, (PATIENTS, 3))
PROFILE = f"""
[made]
extends = evidence
results = {' '.join(TABLES)}
budgets = 6 24
focus = 24
seeds = {' '.join(map(str, range(SEEDS)))}
[made chest]
results =
"""

# expected IoU less that of all masks, .8; what is not named here is as good as the first word of its row says
EFFECTS = {(PLAIN, 'all'): 0, (TWICE, 'all'): -.01, (LONG, 'all'): .03, (PLAIN_AVERAGED, 'all'): -.015, ('masks alone', 'all'): -.02,
           ('masks alone', '6'): -.2, ('masks alone', '24'): -.1,
           ('EMA-taught, tight boxes', '24'): -.002, ('EMA-taught, points', '24'): .03,
           ('EMA-taught, nothing', '6'): -.24, ('EMA-taught, scribbles', '24'): -.04,
           ('EMA-taught, points' + LONGER, '24'): .028, ('EMA-taught, nothing' + LONGER, '24'): 0, (TWICE + LONGER, '24'): -.01,
           ('self-taught, scribbles', '24'): -.01, ('boxes as masks', '24'): -.15,
           ('decay .9, tight boxes', '24'): -.05, ('no region term, tight boxes', '24'): -.002}
USUAL = {'EMA-taught': -.05, 'self-taught': -.06, 'untaught': -.07, 'boxes as masks': -.15}

def effect(cells):
    "Of a run that stands in these cells."
    for c in cells:
        if (found := EFFECTS.get((c['row'], c['column']))) is not None: return found
    return USUAL.get(cells[0]['row'].partition(',')[0], -.07 if cells[0]['table'] == 'table2' else -.04)

def is_run(c):
    "Untaught rows were not reached, nor the last seeds of one row."
    return not c['row'].startswith('untaught') and not (c['row'] == 'EMA-taught, jittered boxes' and c['seed'] > 2)

def per_image(loss, name):
    "Two images of each patient, and what a run found of three classes; patients 0 to 5 are the worst tenth."
    rng = np.random.default_rng(crc32(name.encode())) # the same whatever other runs there are
    share = .8 + loss + rng.normal(0, .002) + rng.normal(0, .03, UNIONS.shape)
    share[:6] -= .3
    found = (UNIONS*share.clip(0, 1)).round().astype(int)
    lines = [(f'{p}-{half}', f'v{p:03d}', name, (tp + half)//2, 0, (union - tp + half)//2)
             for p in range(PATIENTS) for half in (0, 1)
             for name, tp, union in zip(('IRF', 'SRF', 'PED'), found[p], UNIONS[p])]
    return pd.DataFrame(lines, columns=['id', 'group', 'class', 'TP', 'FP', 'FN']).assign(variant='')

def do_run(plan, name, loss):
    "What a training leaves."
    run = plan['runs'][name]
    folder = Run(plan['root'], run['notebook'], run['params'], data_manifest(run['params'])).start('CPU')
    assert folder.id == name
    folder.environments[-1] |= dict(commit='c0ffee', changes=[])
    counts = per_image(loss, describe(plan, name))
    sums = counts.groupby('class')[['TP', 'FP', 'FN']].sum()
    folder.save_table('per_image.csv', counts)
    folder.finish(dict(images=2*PATIENTS, mean_iou=(sums.TP/sums.sum(axis=1)).mean()))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The plan, and the results of its runs as exported."
    root = tmp_path_factory.mktemp('made')
    (root/'settings.ini').write_text((ROOT/'settings.ini').read_text() + PROFILE)
    plan = make_plan(root/'settings.ini', 'made', runs=root/'runs')
    order = sorted(plan['cells'], key=lambda c: ['table2', 'table1', 'table7'].index(c['table']))
    for name in plan['runs']:
        cells = [c for c in order if c['run'] == name]
        collapsed = cells[0]['row'] == 'EMA-taught, nothing' and cells[0]['column'] == '6' and cells[0]['seed'] == 0
        if any(map(is_run, cells)): do_run(plan, name, -.75 if collapsed else effect(cells))
    return plan, export(plan)

@pytest.fixture(scope='module')
def drawn(made):
    "The folder of tables and figures."
    _, results = made
    figures = results.parent.parent/'figures'
    draw('made', 'phantoms', results.parent, figures, TABLES, results.parent.parent/'logs')
    return figures/'made'

def table(folder, name): return pd.read_csv(folder/f'{name}.csv', dtype={'column': str}).set_index(['row', 'column'])


def test_counts_of_patients_take_the_place_of_images(made):
    plan, folder = made
    results = read_results(folder)
    assert results.per_image.empty and results.about == dict(design='evidence', margin=.02, partial='yes', named='24')
    counts = results.counts(results.runs.run)
    assert counts.shape == (len(results.runs), PATIENTS, 3, 3) and (counts.sum((2, 3)) == UNIONS.sum(1)).all()
    scores = (counts.sum(1)[..., 0]/counts.sum((1, 3))).mean(1)
    assert scores == pytest.approx(results.runs['metric.mean_iou'].to_numpy())
    assert sum(f.stat().st_size for f in folder.rglob('*.npz'))/len(results.runs) < 1000

def test_partial_results_are_committed_and_compared(made, tmp_path):
    plan, folder = made
    (tmp_path/'results/made/per_group').mkdir(parents=True)
    (tmp_path/'results/made/per_group/9.npz').touch()
    kept = commit_results(folder, tmp_path/'results/made')
    files = {f.relative_to(kept): f.read_bytes() for f in kept.rglob('*.*')}
    assert files == {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*.*')}
    values = table_values(read_results(kept))
    assert set(values.table) == set(TABLES) and verdict(compare(values, values)) == 'agrees'

def test_committed_runs_are_kept_and_joined_by_new_ones(made, tmp_path):
    plan, folder = made
    committed = commit_results(folder, tmp_path/'results/made')
    def files(folder): return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*.*')}
    nothing_new = plan | dict(root=str(tmp_path/'runs'), committed=str(committed))
    assert files(export(nothing_new)) == files(committed)
    again = export(plan | dict(committed=str(committed)))
    assert files(again) == files(committed), 'runs that are there as well count once'
    half = read_results(committed)
    kept = half.runs.run.iloc[::2]
    half.runs[half.runs.run.isin(kept)].to_csv(committed/'runs.csv', index=False)
    joined = read_results(export(plan | dict(committed=str(committed))))
    assert sorted(joined.runs.run) == sorted(half.runs.run) and set(joined.per_group) == set(half.runs.run)
    pd.testing.assert_frame_equal(table_values(joined), table_values(half))

def test_verdicts_are_those_of_the_effects(drawn):
    verdicts = table(drawn, 'table2_forest').verdict
    assert verdicts['EMA-taught, tight boxes', '24'] == 'non-inferior'
    assert verdicts['EMA-taught, points', '24'] == 'superior'
    assert verdicts['masks alone', '24'] == verdicts['EMA-taught, scribbles', '24'] == 'inferior'
    assert verdicts['EMA-taught, jittered boxes', '6'] == 'hint'
    found = table(drawn, 'table2_forest')
    for cell, loss in EFFECTS.items():
        if cell not in found.index or cell == ('EMA-taught, nothing', '6'): continue
        more = EFFECTS[LONG, 'all'] if cell[0].endswith(LONGER) and cell[0] != LONG else 0
        assert abs(found.value[cell] - loss + more) < .01

def test_what_is_trained_longer_is_compared_with_what_is_too(drawn):
    rows = [f'EMA-taught, {what}{LONGER}' for what in ('points', 'nothing', 'tight boxes')]
    to_all, to_twice = table(drawn, 'table2_forest'), table(drawn, 'table2_batch')
    assert [to_all.verdict[row, '24'] for row in rows] == ['non-inferior', 'inferior', 'inferior']
    assert set(to_all.other[row, '24'] for row in rows) == {LONG}
    assert to_twice.value[rows[1], '24'] == pytest.approx(.01, abs=.01) and to_twice.other[rows[1], '24'] == TWICE + LONGER
    assert {r for r in pd.read_csv(drawn/'table2_harm.csv').row if r.endswith(LONGER)} == {LONG}

def test_what_table_2_says(drawn):
    text = (drawn/'table2.md').read_text()
    said = dict(re.findall(r'^- \*\*(.+?)\*\*: (.+)\.$', text, flags=re.M))
    assert said['superior'] == f'EMA-taught, points (24); {LONG} (all)'
    assert 'EMA-taught, tight boxes (24)' in said['non-inferior'] and 'boxes as masks (6, 24)' in said['inferior']
    assert 'EMA-taught, jittered boxes (6, 24)' in said['hint']
    assert re.search(r'EMA-taught, jittered boxes .*\(3 seeds: a hint\)', text)
    assert 'Holm-adjusted lower bound above 0:\nself-taught, scribbles (24).' in text
    assert re.search(r'EMA-taught, nothing +\|.*seeds 0\.0\d to 0\.\d\d', text)
    assert re.search(r'24: untaught, image labels; untaught, points; ', text)
    assert '6 (seeds 3, 4, 5), 24 (seeds 3, 4, 5): EMA-taught, jittered boxes.' in text
    assert 'Profile made: 64x64 pixels' in text and 'nan' not in text

def test_the_claim_is_judged_against_every_reference(drawn):
    verdicts = table(drawn, 'table2_headline').verdict
    assert set(verdicts.index.get_level_values('column')) == {'masks alone', TWICE, PLAIN, PLAIN_AVERAGED, LONG}
    expected = {'points': ['superior', 'superior', 'non-inferior'],
                'tight boxes': ['superior', 'non-inferior', 'inferior'],
                'loose boxes': ['inferior', 'inferior', 'inferior']}
    for what, by_reference in expected.items():
        assert [verdicts[f'EMA-taught, {what}', r] for r in ('masks alone', PLAIN, LONG)] == by_reference

def test_harm_and_the_worst_tenth(drawn):
    harm = pd.read_csv(drawn/'table2_harm.csv').set_index('row')
    assert harm.loc['EMA-taught, nothing', ['runs', 'harmed', 'collapsed']].tolist() == [2*SEEDS, SEEDS, 1]
    assert harm.loc['EMA-taught, all rows', 'harmed'] == SEEDS and harm.loc['EMA-taught, points', 'harmed'] == 0
    lines = pd.read_csv(drawn/'table2.csv')
    sound = lines[lines.value > .4]
    assert (sound.value - sound.worst_tenth).between(.2, .33).all()

def test_what_tables_1_and_7_say(drawn):
    text = (drawn/'table1.md').read_text()
    behind = re.search(r'by however little:\n(.+)\. The differences', text)[1]
    assert set(behind.split('; ')) == {f'{name}, {what} (24)' for what in ('tight boxes', 'points') for name in
                                       ('nothing', 'nearest neighbour', 'up-sampled logits', 'MLDS, softmax')}
    assert 'lower bound above 0:\nMLDS, sigmoid, tight boxes (24); MLDS, sigmoid, points (24).' in text
    text = (drawn/'table7.md').read_text()
    assert 'decay .9, tight boxes (24)' in re.search(r'Worse after Holm:\n(.+)\.\n', text)[1]

def test_a_table_of_which_no_run_is_there(made, tmp_path):
    "It is not drawn, and says why when it is asked for."
    plan, folder = made
    copy = commit_results(folder, tmp_path/'made')
    cells = pd.read_csv(copy/'cells.csv')
    cells.loc[cells.table == 'table7', 'run'] = 'not run'
    cells.to_csv(copy/'cells.csv', index=False)
    assert read_results(copy).drawable() == ['table1', 'table2']
    with pytest.raises(ValueError, match='no finished run of table7 yet'):
        table_inputs('table7', 'made', results=tmp_path)

def test_pictures(drawn):
    for name in ('table1', 'table1_forest', 'table2', 'table2_forest', 'table2_margins', 'table7'):
        assert np.asarray(Image.open(drawn/f'{name}.png').convert('L')).std() > 5 and (drawn/f'{name}.svg').exists()


# paper 2: a start is worth .05, a pre-training differs from the next by .01

STARTS = '''
[starts]
extends = evidence
results =
[starts chest]
results = table4 table5 figure6 figure7
seeds = 0 1 2 3 4 5
rates = 0.01
lengths = 300 3000
pools = 0.25 0.85
'''
CHEST = dict(anatomy=['lungs', 'heart', 'clavicles'], infection=['infection'])
WORTH = {'doll': .05, 'matched backbone': -.05}

VARIANTS = pd.DataFrame([(v, f'p{p}', f'p{p}', 'Edema', 5, p, 1) for v in ('IG', 'centre') for p in range(2)],
                        columns=['variant', 'id', 'group', 'class', 'TP', 'FP', 'FN'])

def jitter(name, sd): return np.random.default_rng(crc32(name.encode())).normal(0, sd)

def tuned(run, name):
    "What a fine-tuning finds of the classes of 60 patients."
    share = .7 + WORTH.get(run['params']['init'], 0) - .05*(run['params']['tuning'] == 'last block')
    share += jitter(run['params']['source'], .01) + jitter(name, .002)
    return pd.DataFrame([(f'p{p}', f'p{p}', c, round(200*share), round(200 - 200*share), 0)
                         for p in range(PATIENTS) for c in CHEST[run['params']['task']]],
                        columns=['id', 'group', 'class', 'TP', 'FP', 'FN']).assign(variant='')

def finish(plan, name):
    run = plan['runs'][name]
    folder = Run(plan['root'], run['notebook'], run['params'], data_manifest(run['params'])).start('CPU')
    folder.environments[-1] |= dict(commit='c0ffee', changes=[])
    if run['notebook'] == 'pretrain':
        own = dict(own=.1*np.log10(run['params']['iterations']), mean_label=.15)
        return folder.finish(dict(training_images=int(1000*run['params']['image_share']), agreement=own))
    counts = tuned(run, name) if run['notebook'] == 'finetune' else VARIANTS
    folder.save_table('per_image.csv', counts)
    if run['notebook'] == 'localise': return folder.finish(dict(images=2))
    iou = (counts.groupby('class').TP.sum()/(200*PATIENTS)).to_dict()
    dice = {c: 2*v/(1 + v) for c, v in iou.items()}
    trained = 1000 if run['params']['tuning'] == 'full' else 100
    folder.finish(dict(iou=iou, dice=dice, trained=trained, valid_dice=dice[min(dice)], images=PATIENTS))

@pytest.fixture(scope='module')
def starts(tmp_path_factory):
    root = tmp_path_factory.mktemp('starts')
    (root/'settings.ini').write_text((ROOT/'settings.ini').read_text() + STARTS)
    plan = make_plan(root/'settings.ini', 'starts', runs=root/'runs')
    for name, run in plan['runs'].items():
        if run['notebook'] in ('pretrain', 'finetune', 'localise'): finish(plan, name)
    results = export(plan)
    draw('starts', 'phantoms', results.parent, root/'figures', ['table5', 'figure6', 'figure7'], root/'logs')
    return results, root/'figures/starts'

def test_starts_are_compared_over_pretrainings(starts):
    results, drawn = starts
    found = read_results(results)
    of = start_differences(found.cells[found.cells.table == 'table5'], found, 'backbone, compute-matched')
    of = of.set_index(['row', 'column', 'class'])
    doll = of.loc['DoLL, end to end', 'anatomy 2%', 'heart']
    assert doll.families == 3 and abs(doll.value - .1) < .03 and doll.low > 0
    same = of.loc['mean position, end to end', 'infection 2%', 'infection']
    assert same.families == 3 and same.high - same.low > .02, 'three pre-trainings are no six repetitions'
    saved = pd.read_csv(drawn/'table5_differences.csv').query('less == "backbone, compute-matched"')
    assert saved.value.to_numpy() == pytest.approx(of.value.to_numpy(), abs=1e-6)
    assert (saved.least > saved.high - saved.value).all(), 'to be found in 80 of 100 studies takes more than an interval'

def test_runs_that_others_need_stay_among_committed_ones(starts, tmp_path):
    "No cell names a pre-training, but Table 5 reports it."
    results, _ = starts
    plan = make_plan(results.parents[2]/'settings.ini', 'starts', runs=tmp_path/'runs', committed=results.parent)
    before, after = (read_results(folder).runs for folder in (results, export(plan)))
    assert set(after.run) == set(before.run) and 'pretrain' in set(after.notebook)

def test_variants_of_one_run_keep_their_images(starts):
    results, _ = starts
    kept = read_results(results).per_image
    assert kept[VARIANTS.columns].to_dict('records') == VARIANTS.to_dict('records')
    assert table_values(read_results(results)).query('table == "table4"').value.round(3).tolist() == [.769, .769]

def test_figures_of_what_is_trained_and_for_how_long(starts):
    _, drawn = starts
    what = pd.read_csv(drawn/'figure6.csv').set_index(['tuned', 'class'])
    assert what.weights['everything', 'heart'] == 1000 and what.weights['batch norms', 'infection'] == 100
    assert (what.seeds == 6).all() and len(what) == 4*8
    compared = what[what.iou_less.notna()]
    worse = compared.index.get_level_values('tuned') == 'last block'
    assert len(compared) == 4*7 and (compared.verdict[worse] == 'inferior (a hint)').all()
    assert (compared.value[~worse].abs() < .005).all() and not compared.verdict[~worse].str.startswith('inferior').any()
    long = pd.read_csv(drawn/'figure7.csv')
    assert set(long.images) == {250, 850} and set(long.iterations) == {300, 3000} and long.what.nunique() == 3
    own = long[long.what == 'IoU with own labels'].groupby('iterations').value.mean()
    assert own[3000] - own[300] == pytest.approx(.1)
    for name in ('table5', 'figure6', 'figure7'):
        assert np.asarray(Image.open(drawn/f'{name}.png').convert('L')).std() > 5
        assert 'nan' not in (drawn/f'{name}.md').read_text()


# paper 1 on a folder: a cross-validation, in which tight boxes are worth .15

def found_in_fold(row, seed, n=4):
    "What a run finds in the images of the patients of its fold; patients of a fold share its luck."
    rng = np.random.default_rng(seed)
    union = rng.integers(150, 600, n)
    share = .5 + .15*(row == 'EMA-taught, tight boxes') + rng.normal(0, .03, n) + jitter(row + str(seed), .01)
    found = (union*share).round().astype(int)
    patients = [f'p{seed}-{k}' for k in range(n)]
    return pd.DataFrame(dict(variant='', id=patients, group=patients, TP=found, FP=0, FN=union - found)).assign(**{'class': 'fluid'})

def test_a_cross_validation_of_real_images(tmp_path):
    "From a folder to a table whose intervals go over the folds, and which says what it could have shown."
    (tmp_path/'eyes').mkdir()
    (tmp_path/'eyes/labels.csv').write_text('id,group\n')
    plan = make_plan(ROOT/'settings.ini', 'evidence', str(tmp_path/'eyes'), tmp_path/'runs')
    for c in {c['run']: c for c in reversed(plan['cells'])}.values():
        run = plan['runs'][c['run']]
        assert (run['params']['folds'], run['params']['fold']) == (5, c['seed'])
        folder = Run(plan['root'], 'train', run['params'], data_manifest(run['params'])).start('CPU')
        folder.environments[-1] |= dict(commit='c0ffee', changes=[])
        counts = found_in_fold(c['row'], c['seed'])
        folder.save_table('per_image.csv', counts)
        validation = .5 - .2*('as in the paper' in c['row']) + .01*c['seed']
        folder.save_table('curves.csv', pd.DataFrame([dict(step=200, name='foreground_iou', value=validation)]))
        folder.finish(dict(images=4, mean_iou=float(counts.TP.sum()/(counts.TP + counts.FN).sum())))
    results, figures = export(plan), tmp_path/'figures'
    assert set(read_results(results).runs.data) == {'eyes'}, 'the place of a folder is nobody\'s business'
    draw('evidence', str(tmp_path/'eyes'), results.parent, figures, ['table2', 'table7'], tmp_path/'logs')
    drawn = figures/'evidence-eyes'
    chosen = table(drawn, 'table7_validation').value
    assert chosen['as in the paper, tight boxes', '6'] == pytest.approx(-.2) and chosen['no CutMix, nothing', '6'] == 0
    assert 'intervals over the 5 folds' in (drawn/'table7.md').read_text()
    found = table(drawn, 'table2_batch')
    boxes, nothing = (found.loc[f'EMA-taught, {what}', '6'] for what in ('tight boxes', 'nothing'))
    assert boxes.low < .15 < boxes.high and boxes.p < .05 and nothing.low < 0 < nothing.high and boxes.df < 5
    text = (drawn/'table2.md').read_text()
    assert 'over the 20 test images' in text and 'intervals over the 5 folds' in text and 'nan' not in text
    assert re.search(r'A true difference of 0\.0\d\d would be told from zero .* about \d+\.\d times the patients', text)
    assert '**EMA-taught, tight boxes**' not in text and 'Is anything else better' not in text and '/' + 'tmp' not in text
